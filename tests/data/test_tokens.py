import copy
import threading

import numpy as np
import pytest

from hrwkv.data.documents import Document
from hrwkv.data.tokens import TokenStore, chat_renderer, in_order, tokenize_documents


def test_each_document_is_its_own_encoding_with_the_end_token(tokenizer):
    texts = ["def place(self):\n", "x", "The pass key is 48137, caf\u00e9.\n"]
    store = tokenize_documents((Document(str(i), text) for i, text in enumerate(texts)), tokenizer)
    assert len(store) == 3
    for i, text in enumerate(texts):
        assert store.document(i).tolist() == [*tokenizer.encode(text), tokenizer.eos_token_id]
    assert store.num_bytes == sum(len(text.encode()) for text in texts)
    assert store.tokens.dtype == np.int32


def test_the_begin_token_of_the_tokenizer_comes_first(merging_tokenizer):
    store = tokenize_documents([Document("a", "x"), Document("b", "y")], merging_tokenizer)
    begin, end = merging_tokenizer.bos_token_id, merging_tokenizer.eos_token_id
    assert store.tokens[store.offsets[:-1]].tolist() == [begin, begin]
    assert store.tokens[store.offsets[1:] - 1].tolist() == [end, end]
    assert store.document(0).tolist() == [*merging_tokenizer.encode("x"), end]


def test_progress_counts_documents_and_batches_do_not_change_the_result(tokenizer):
    documents = [Document(str(i), f"{i} words " * i) for i in range(1, 26)]
    seen: list[int] = []
    store = tokenize_documents(documents, tokenizer, progress=seen.append, batch_characters=300)
    assert len(seen) > 5
    assert seen == sorted(set(seen))
    assert seen[-1] == 25
    alone = [tokenize_documents([document], tokenizer).tokens for document in documents[-2:]]
    assert np.array_equal(np.concatenate(alone), store.tokens[store.offsets[-3] :])


def test_store_joins_documents_and_drops_empty_ones():
    store = TokenStore.from_documents([[1, 2, 0], [], np.array([3, 0])])
    assert [store.document(i).tolist() for i in range(len(store))] == [[1, 2, 0], [3, 0]]
    assert store.offsets.tolist() == [0, 3, 5]


def test_no_document_and_no_end_token_are_refused(tokenizer):
    with pytest.raises(ValueError, match="there is no document to tokenise"):
        tokenize_documents([], tokenizer)
    endless = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="the tokenizer has no end-of-text token"):
        tokenize_documents([Document("a", "x")], endless)


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_no_token(tokenizer, workers):
    documents = [Document(str(i), f"{i} words " * (i % 11 + 1)) for i in range(120)]
    one = tokenize_documents(documents, tokenizer, batch_characters=200)
    many = tokenize_documents(documents, tokenizer, batch_characters=200, workers=workers)
    assert np.array_equal(one.tokens, many.tokens)
    assert np.array_equal(one.offsets, many.offsets)
    assert one.num_bytes == many.num_bytes


def test_results_keep_the_order_of_items_whatever_ends_first():
    second_ran = threading.Event()

    def slow_first(item: int) -> int:
        if item == 0:
            assert second_ran.wait(timeout=60)
        if item == 1:
            second_ran.set()
        return item * item

    assert list(in_order(slow_first, range(30), workers=2)) == [item * item for item in range(30)]


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_comes_after_the_results_before_it_and_no_thread_stays(workers):
    def fails(item: int) -> int:
        if item == 5:
            raise ValueError("item 5 is bad")
        return item

    seen: list[int] = []
    with pytest.raises(ValueError, match="item 5 is bad"):
        seen.extend(one for one in map(seen.append, in_order(fails, range(20), workers=workers)) if one)
    assert seen == list(range(5))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tokenise")]


def test_chat_is_the_template_s_text_with_one_begin_token(merging_tokenizer, tokenizer):
    assert chat_renderer(tokenizer) is None
    chat = copy.deepcopy(merging_tokenizer)
    chat.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    text = chat_renderer(chat)(messages)
    assert text == "user: a\nassistant: b\n"
    ids = tokenize_documents([Document("a", text)], chat).tokens.tolist()
    assert ids == [*chat.apply_chat_template(messages)["input_ids"], chat.eos_token_id]
