"""``hrwkv eval``: what a model kept of its teacher, as a table and a report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from hrwkv.cli.display import Display
from hrwkv.cli.loading import choose_device, open_model, open_tokenizer
from hrwkv.settings import EvalSettings

if TYPE_CHECKING:
    from torch import Tensor

    from hrwkv.eval.memory import Memory
    from hrwkv.eval.needle import Grid
    from hrwkv.eval.perplexity import Comparison
    from hrwkv.eval.report import Result
    from hrwkv.layers.batch import TokenBatch
    from hrwkv.model.modeling import HybridModel

EXAMPLES = """
hrwkv eval run/stage2 --teacher teacher/
hrwkv eval run/stage2 --teacher teacher/ --text book.txt --text notes/ --split all --out report/
hrwkv eval teacher/ --passkey-lengths 512,1024,2048 --passkey-samples 20
"""


def evaluate(
    model: Annotated[Path, Parameter(help="Directory of a student, or of any model that convert takes.")],
    /,
    *,
    teacher: Annotated[
        Path | None, Parameter(help="Directory of the teacher; without it, perplexity only.")
    ] = None,
    out: Annotated[
        Path, Parameter(help="Folder of the report; files of an earlier one are replaced.")
    ] = Path("eval"),
    settings: Annotated[EvalSettings, Parameter(name="*", group="Recipe keys")] = EvalSettings(),  # noqa: B008 (frozen)
    recipe: Annotated[
        str | None, Parameter(help="TOML file, or name of a shipped recipe; its [eval] is read.")
    ] = None,
) -> None:
    """Measure perplexity, KL and agreement with the teacher, passkey retrieval and memory."""
    run_eval(Display(), model, teacher, out, settings)


def run_eval(display: Display, model: Path, teacher: Path | None, out: Path, settings: EvalSettings) -> None:
    """Evaluate one model, show the tables and write the report."""
    from hrwkv.eval.report import write_report

    student = open_model(model, device=settings.device, dtype=settings.dtype)
    original = open_model(teacher, device=settings.device, dtype=settings.dtype) if teacher else None
    examiner = Examiner.prepare(open_tokenizer(model), settings, display)
    result = examiner.examine(model.name, student, original)
    results = [result]
    if original:
        results.insert(0, examiner.examine_teacher("teacher", original, result))
    show(display, results)
    facts = {"model": str(model), "teacher": str(teacher), **examiner.facts()}
    written = write_report(out, results, title=f"Evaluation of {model.name}", facts=facts)
    display.line(f"Written: {', '.join(str(path) for path in written)}")


def show(display: Display, results: list[Result]) -> None:
    """The tables that fit a screen."""
    from hrwkv.eval.report import passkey_table, summary_table

    display.table("What was kept, at which memory", *summary_table(results))
    header, rows = passkey_table(results)
    if rows:
        display.table("Passkey accuracy by prompt length", header, rows)


@dataclass(frozen=True)
class Examiner:
    """The same text, batches and passkeys for every model of a comparison."""

    settings: EvalSettings
    display: Display
    tokenizer: Any
    batches: list[tuple[Tensor, TokenBatch]]
    filler: Any
    num_bytes: int
    num_tokens: int

    @classmethod
    def prepare(cls, tokenizer: Any, settings: EvalSettings, display: Display) -> Examiner:
        """Read and pack the text. Raises ValueError if there is none."""
        from hrwkv.data.documents import read_documents
        from hrwkv.data.packing import PackedStream
        from hrwkv.data.tokens import chat_renderer, tokenize_documents

        render = chat_renderer(tokenizer)
        documents = read_documents(settings.text, split=settings.split, render=render)
        store = tokenize_documents(documents, tokenizer)
        context = min(settings.context_length, len(store.tokens))
        rows = min(settings.tokens, len(store.tokens)) // context
        batch_tokens = min(settings.batch_tokens // context, max(rows, 1)) * context
        stream = PackedStream(store, context_length=context, batch_tokens=batch_tokens, seed=settings.seed)
        count = max(rows * context // batch_tokens, 1)
        device = choose_device(settings.device)
        batches = [_to_device(stream.batch(index), device) for index in range(count)]
        predicted = sum(len(ids) - sum(n > 0 for n in batch.lengths) for ids, batch in batches)
        # In proportion: the scored tokens are a part of the text, and its bytes are known for the whole only.
        num_bytes = round(store.num_bytes * predicted / len(store.tokens))
        return cls(settings, display, tokenizer, batches, store.tokens, num_bytes, predicted)

    def examine(self, name: str, student: HybridModel, teacher: HybridModel | None) -> Result:
        """Everything about one model."""
        from hrwkv.eval.report import Result

        comparison = self._compare(name, student, teacher)
        return Result(name, comparison, self._grid(name, student), self._memory(student))

    def examine_teacher(self, name: str, teacher: HybridModel, student: Result) -> Result:
        """The teacher's line; its perplexity was measured with the student's."""
        from hrwkv.eval.report import Result

        assert student.comparison is not None
        return Result(name, student.comparison.of_teacher(), self._grid(name, teacher), self._memory(teacher))

    def facts(self) -> dict[str, Any]:
        """How it was measured, for the report."""
        import torch

        from hrwkv.cli.version import version

        values = {key: value if value is None else str(value) for key, value in asdict(self.settings).items()}
        return {**values, "predicted tokens": self.num_tokens, "hrwkv": version(), "torch": torch.__version__}

    def _compare(self, name: str, student: HybridModel, teacher: HybridModel | None) -> Comparison:
        from hrwkv.eval.perplexity import compare

        with self.display.task(f"Scoring {name}", len(self.batches)) as task:

            def counted() -> Any:
                for number, batch in enumerate(self.batches):
                    task.advance(number)
                    yield batch

            return compare(student, teacher, counted(), num_bytes=self.num_bytes)

    def _grid(self, name: str, model: HybridModel) -> Grid | None:
        from hrwkv.data.passkey import PasskeyTask
        from hrwkv.eval.needle import passkey_grid
        from hrwkv.model.generate import greedy_tokens
        from hrwkv.model.hf import HybridForCausalLM

        settings = self.settings
        lengths = [n for n in settings.passkey_lengths if n <= model.config.max_position_embeddings]
        if not settings.passkey_samples or not lengths:
            return None
        total = len(lengths) * len(settings.passkey_depths) * settings.passkey_samples
        writer = HybridForCausalLM.from_core(model)
        with self.display.task(f"Asking {name} for passkeys", total) as task:

            def counted(prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
                replies = greedy_tokens(writer, prompts, max_tokens)
                task.advance(task.value + len(prompts))
                return replies

            return passkey_grid(
                counted,
                PasskeyTask(self.tokenizer),
                filler_ids=self.filler,
                lengths=lengths,
                depths=settings.passkey_depths,
                samples=settings.passkey_samples,
                seed=settings.seed,
            )

    def _memory(self, model: HybridModel) -> Memory:
        from hrwkv.eval.memory import memory_of

        return memory_of(model.config)


def _to_device(packed: tuple[Tensor, TokenBatch], device: str) -> tuple[Tensor, TokenBatch]:
    from hrwkv.layers.batch import TokenBatch

    token_ids, batch = packed
    return token_ids.to(device), TokenBatch.from_lengths(batch.lengths, device=device)
