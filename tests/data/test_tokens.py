import numpy as np
import pytest

from hrwkv.data.documents import Document
from hrwkv.data.tokens import TokenStore, tokenize_documents


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
