"""Train the small teacher that the repository ships: a Llama of 1.8M parameters on Python's standard library.

Run by hand, from the repository's root, with torch, transformers and tokenizers; on one GPU, then on a CPU:

    PYTHONPATH=. python examples/tiny_teacher/train.py --out OUT --steps 2500 --compile reduce-overhead
    PYTHONPATH=. python examples/tiny_teacher/train.py --out OUT --steps 5 --rows 4 --context 256

It trains a byte-level BPE tokenizer (2048 entries, digits split) and a LlamaForCausalLM on the train split,
and writes both to OUT with a chat template, a generation config and ``evaluation.json`` (held-out bits per
byte, passkey accuracy by length, tokens seen, versions, seeds, the command).

The whole tokenised corpus lies as one tensor on the device. A row is a random window of it; a few rows start
where a document starts, because a packed forward resets positions there. Few of them, and few epochs: with
half of the rows and 138 epochs a teacher knew its files by heart and was worse on others (docs/log.md). A
share of the rows are passkey rows: one needle over the text at a random place, one to three questions later
(`batches.py`).
`--minutes` is wall clock from the first compilation to the last step and drives the learning-rate schedule,
so every run anneals completely; evaluations come on top. Left out: several devices, resuming.
"""

import argparse
import copy
import json
import logging
import math
import platform
import random
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from batches import Batches, Corpus, PasskeyRows, tokenize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hrwkv.data.documents import Document, read_documents
from hrwkv.data.passkey import PasskeyTask, random_key

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PASSKEY_LENGTHS = (128, 256, 512, 768, 1024)
PASSKEY_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="directory to write; it must not exist")
    add("--text", type=Path, help="folder of .py sources instead of the running Python's standard library")
    add("--tokenizer", type=Path, help="directory of a tokenizer to use instead of training one")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument(
        "--minutes", type=float, help="wall clock of the training, with compilation, without evaluations"
    )
    budget.add_argument("--steps", type=int)
    for name, value in {
        "vocab": 2048, "hidden": 128, "layers": 8, "heads": 4, "kv-heads": 2, "head-dim": 32, "mlp": 384,
        "max-position": 1024, "context": 1024, "rows": 64, "seed": 1, "log-every": 50, "passkey-samples": 20,
    }.items():  # fmt: skip
        add(f"--{name}", type=int, default=value)
    for name, value in {
        "rope-theta": 10000.0, "lr": 4e-3, "weight-decay": 0.1, "warmup": 0.02, "final-lr": 0.02, "clip": 1.0,
        "passkey-share": 0.15, "document-starts": 0.1, "answer-weight": 8.0, "eval-every-minutes": 2.0,
    }.items():  # fmt: skip
        add(f"--{name}", type=float, default=value)
    add("--compile", choices=("none", "default", "reduce-overhead", "max-autotune"), default="none")
    return parser.parse_args()


def build_tokenizer(documents: list[Document], *, vocab: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE whose digits stay single tokens, so that a number is copied digit by digit."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END_OF_TEXT, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents), trainer=trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START, TURN_END], clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.chat_template = CHAT_TEMPLATE
    return fast


def logits_of(model: LlamaForCausalLM, ids: Tensor) -> Tensor:
    """Return logits [B, T, V]; the layers are called without a mask, so that SDPA takes its causal kernel."""
    backbone = model.model
    hidden = backbone.embed_tokens(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    rope = backbone.rotary_emb(hidden, position_ids=positions)
    for layer in backbone.layers:
        hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rope)
    return model.lm_head(backbone.norm(hidden))


def weighted_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Return the mean cross entropy in nats of labels [B, T], weighted by weights [B, T]; bf16 on CUDA."""
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=ids.device.type == "cuda"):
        logits = logits_of(model, ids)
    nats = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="none")
    flat = weights.flatten()
    return (nats * flat).sum() / flat.sum()


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, corpus: Corpus, *, context: int, end: int, rows: int) -> float:
    """Return held-out bits per byte: no overlap, every token predicted once, document ends included."""
    tokens = corpus.tokens.long()
    count = math.ceil(len(tokens) / context)
    first = tokens.new_full((1,), end)  # the first document is predicted from a document end, like the others
    ids = torch.cat([first, tokens, tokens.new_full((count * context - len(tokens),), end)])
    nats = torch.zeros((), device=ids.device, dtype=torch.float64)
    for start in range(0, count, rows):
        size = min(rows, count - start)
        at = start * context
        inputs = ids[at : at + size * context].view(size, context)
        labels = ids[at + 1 : at + size * context + 1]
        real = torch.arange(at, at + size * context, device=ids.device) < len(tokens)
        losses = F.cross_entropy(logits_of(model, inputs).flatten(0, 1).float(), labels, reduction="none")
        nats += (losses.double() * real).sum()
    return nats.item() / math.log(2) / corpus.num_bytes


def passkey_cases(
    task: PasskeyTask, filler: Tensor, *, context: int, samples: int, seed: int
) -> dict[int, tuple[Tensor, Tensor]]:
    """Return by length: ids [S, length] with the answer at the end, answers [S, 5]; depths in equal parts."""
    generator = random.Random(seed)
    cases = {}
    for length in (length for length in PASSKEY_LENGTHS if length <= context):
        pairs = []
        for depth in PASSKEY_DEPTHS:
            for _ in range(samples):
                key = random_key(generator)
                pairs.append(
                    task.make(filler, length=length - len(key), depth=depth, key=key, generator=generator)
                )
        ids = torch.tensor([prompt + answer for prompt, answer in pairs])
        cases[length] = (ids.to(filler.device), ids[:, -len(pairs[0][1]) :].to(filler.device))
    return cases


@torch.no_grad()
def passkey_accuracy(
    model: LlamaForCausalLM, cases: dict[int, tuple[Tensor, Tensor]], *, rows: int
) -> dict[str, dict]:
    """Return by length the share of answers that greedy decoding gives exactly, over all and by depth.

    Teacher-forced: the answer is right if and only if each of its tokens is the argmax after the right ones.
    """
    report = {}
    for length, (ids, answers) in cases.items():
        size = answers.shape[1]
        guesses = torch.cat(
            [logits_of(model, part[:, :-1])[:, -size:].argmax(-1) for part in ids.split(rows)]
        )
        right = (guesses == answers).all(1).double().view(len(PASSKEY_DEPTHS), -1).mean(1).tolist()
        by_depth = {str(depth): share for depth, share in zip(PASSKEY_DEPTHS, right, strict=True)}
        report[str(length)] = {"accuracy": sum(right) / len(right), "by_depth": by_depth}
    return report


@dataclass
class Clock:
    """How far the training is, 0 to 1, by steps or by wall clock, and the learning rate there."""

    steps: int | None
    seconds: float | None
    begin: float
    start: float

    def progress(self, step: int) -> float:
        """Return the share of the budget that is spent; compilation lies before `start` but in the budget."""
        if self.steps is not None:
            return step / self.steps
        assert self.seconds is not None
        left = self.begin + self.seconds - self.start
        return (time.perf_counter() - self.start) / left if left > 0 else 1.0

    def pause(self, seconds: float) -> None:
        """Leave `seconds` out of the budget: a pause must not skip a part of the schedule."""
        self.begin += seconds
        self.start += seconds

    @staticmethod
    def scale(progress: float, *, warmup: float, final: float) -> float:
        """Return the factor on the peak learning rate: linear warm-up, then a cosine down to `final`."""
        if progress < warmup:
            return max(progress, 0.02 * warmup) / warmup
        return final + (1 - final) * 0.5 * (
            1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup)))
        )


def build_optimizer(model: LlamaForCausalLM, arguments: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": arguments.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=arguments.lr, betas=(0.9, 0.95), fused=arguments.device.startswith("cuda")
    )


def train(
    model: LlamaForCausalLM, batches: Batches, arguments: argparse.Namespace, *, check: Callable[[], object]
) -> dict[str, float]:
    """Train until the budget is spent; return steps, tokens, seconds. `check` is called every few minutes."""
    optimizer = build_optimizer(model, arguments)
    loss_of = (
        weighted_loss if arguments.compile == "none" else torch.compile(weighted_loss, mode=arguments.compile)
    )
    begin = time.perf_counter()
    if arguments.compile != "none":
        for _ in range(3):  # compiles, then records the CUDA graphs, before the schedule's clock starts
            loss_of(model, *batches.draw()).backward()
            optimizer.zero_grad(set_to_none=True)
        print(f"compiled in {time.perf_counter() - begin:.0f} s", flush=True)
    seconds = None if arguments.minutes is None else arguments.minutes * 60
    clock = Clock(arguments.steps, seconds, begin, time.perf_counter())
    step, checked, logged, tokens = 0, clock.start, (0, clock.start), arguments.rows * arguments.context
    while (progress := clock.progress(step)) < 1.0:
        rate = arguments.lr * Clock.scale(progress, warmup=arguments.warmup, final=arguments.final_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(model, *batches.draw())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), arguments.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        # Reading the loss is the only wait for the device; it also keeps the wall clock honest.
        if step % arguments.log_every == 0 or step == arguments.steps:
            value, now = loss.item(), time.perf_counter()
            speed = (step - logged[0]) * tokens / (now - logged[1])
            print(
                f"{progress:6.1%} step {step} loss {value:.4f} lr {rate:.2e} {speed:,.0f} tok/s", flush=True
            )
            logged = (step, now)
            if now - checked > arguments.eval_every_minutes * 60:
                check()
                checked = time.perf_counter()
                clock.pause(checked - now)
                logged = (step, checked)
    return {"steps": step, "tokens": step * tokens, "seconds": round(time.perf_counter() - begin, 1)}


def write_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save bf16 weights, tokenizer, chat template, generation config; round the model's weights to bf16.

    A copy is cast, since a cast of the whole module would also round the rotary frequencies that are not
    saved.
    """
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.95, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(TURN_END)],
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    tokenizer.save_pretrained(out)


def build_model(tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Return the randomly initialised Llama on the device, fp32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=arguments.hidden, intermediate_size=arguments.mlp,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads,
        num_key_value_heads=arguments.kv_heads, head_dim=arguments.head_dim,
        max_position_embeddings=arguments.max_position, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": arguments.rope_theta},
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM(config).to(arguments.device)


def evaluate_split(
    model: LlamaForCausalLM,
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerFast,
    arguments: argparse.Namespace,
    *,
    name: str,
    samples: int,
) -> dict:
    """Return, and print, bits per byte and passkey accuracy, `samples` prompts per length and depth."""
    context, rows = arguments.context, arguments.rows
    cases = passkey_cases(
        PasskeyTask(tokenizer), corpus.tokens, context=context, samples=samples, seed=arguments.seed + 1
    )
    bits = bits_per_byte(model, corpus, context=context, end=tokenizer.eos_token_id, rows=rows)
    passkey = passkey_accuracy(model, cases, rows=rows)
    by_length = {length: round(entry["accuracy"], 3) for length, entry in passkey.items()}
    print(f"{name}: {bits:.4f} bits per byte, passkey {by_length}", flush=True)
    return {"bits_per_byte": bits, "passkey": passkey}


def main() -> None:
    """Tokenizer, corpus, training, evaluation, files."""
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO)
    if arguments.out.exists():
        raise SystemExit(f"{arguments.out} exists: name a directory that does not")
    torch.backends.cuda.matmul.allow_tf32 = True
    source = [arguments.text or "stdlib"]
    documents = {
        split: list(read_documents(source, split=split, suffixes=(".py",)))
        for split in ("train", "dev", "test")
    }
    if arguments.tokenizer:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.tokenizer)
    else:
        tokenizer = build_tokenizer(documents["train"], vocab=arguments.vocab)
    corpora = {
        split: tokenize(part, tokenizer, seed=arguments.seed, device=arguments.device)
        for split, part in documents.items()
    }
    for split, corpus in corpora.items():
        ratio = corpus.num_bytes / len(corpus.tokens)
        print(
            f"{split}: {len(corpus.starts)} documents, {len(corpus.tokens):,} tokens, {ratio:.2f} bytes/token"
        )

    model = build_model(tokenizer, arguments)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {arguments.device}", flush=True)
    rows = PasskeyRows(
        PasskeyTask(tokenizer).template(), answer_weight=arguments.answer_weight, device=arguments.device
    )
    batches = Batches(
        corpora["train"], rows, rows=arguments.rows, context=arguments.context,
        share=arguments.passkey_share, document_starts=arguments.document_starts, seed=arguments.seed,
    )  # fmt: skip

    def evaluate(split: str, samples: int) -> dict:
        return evaluate_split(model, corpora[split], tokenizer, arguments, name=split, samples=samples)

    budget = train(
        model, batches, arguments, check=lambda: evaluate("dev", max(1, arguments.passkey_samples // 4))
    )
    partial = arguments.out.with_name(arguments.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    write_model(model, tokenizer, partial)
    report = {
        "dev": evaluate("dev", arguments.passkey_samples),
        "test": evaluate("test", arguments.passkey_samples),
        "training": budget | {"seed": arguments.seed, "device": device_name(arguments.device)},
        "documents": {split: len(part) for split, part in documents.items()},
        "train_tokens": len(corpora["train"].tokens),
        "parameters": sum(p.numel() for p in model.parameters()),
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__, "tokenizers": tokenizers.__version__},
        "command": " ".join(["python", *sys.argv]),
    }  # fmt: skip
    (partial / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    partial.rename(arguments.out)


def device_name(device: str) -> str:
    """Return the accelerator's name, or the device type."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


if __name__ == "__main__":
    main()
