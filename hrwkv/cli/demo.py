"""``hrwkv demo``: the whole way with the repository's small teacher; no download, no GPU.

Stage 1 trains each layer on the teacher's own inputs, so its gradients are independent between layers: one
run with every layer as RWKV-7 serves the hybrid and the student without any attention layer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from hrwkv.cli.convert import run_convert
from hrwkv.cli.display import Display, duration
from hrwkv.cli.distill import run_distill
from hrwkv.cli.evaluate import Examiner, show
from hrwkv.cli.loading import open_model, open_tokenizer, open_writer
from hrwkv.cli.recipes import ROOT
from hrwkv.settings import ConvertSettings, DemoSettings, DistillSettings, EvalSettings

if TYPE_CHECKING:
    from hrwkv.eval.report import Result

TEACHER = ROOT / "examples" / "tiny_teacher" / "model"
STUDENT = "hybrid, stage 3"
EXAMPLES = """
hrwkv demo
hrwkv demo --recipe tiny-gpu --out demo-gpu
hrwkv demo --distill.stage2.tokens 100_000 --convert.attention-layers 5
"""


def demo(
    *,
    out: Annotated[Path, Parameter(help="Folder to write; it must not exist.")] = Path("demo"),
    teacher: Annotated[Path | None, Parameter(help="Another teacher than the repository's own.")] = None,
    recipe: Annotated[
        str | None,
        Parameter(
            help="TOML file, or name of a shipped recipe; all its tables are read [default: tiny-demo]."
        ),
    ] = None,
    convert: ConvertSettings | None = None,
    distill: DistillSettings = DistillSettings(),  # noqa: B008 (frozen)
    eval: EvalSettings = EvalSettings(),  # noqa: A002, B008 (the command's name; frozen)
    demo: DemoSettings = DemoSettings(),  # noqa: B008 (frozen)
) -> None:
    """Convert, distil and evaluate the repository's small teacher, from text that every machine has."""
    import time

    start, display = time.monotonic(), Display()
    teacher = _find_teacher(teacher)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already: remove it first or choose another place with --out")
    convert = convert or ConvertSettings(keep_attention=1)
    models = make_students(display, teacher, out, convert, distill, pure_tokens=demo.pure_tokens)
    with display.step("Evaluating on the held-out test split"):
        results = examine(display, teacher, models, eval)
    settings = {"convert": convert, "distill": distill, "eval": eval, "demo": demo}
    _report(display, out, results, facts={"teacher": teacher.name, **settings})
    student = models[STUDENT]
    complete(display, {"teacher": teacher, "student": student}, demo)
    display.line(
        f"Everything is in {out}/ after {duration(time.monotonic() - start)}: report.md, passkey.png, models."
    )
    display.line(f'Try next: hrwkv generate {student} --prompt "import "  |  hrwkv chat {student}')
    display.line(f"          hrwkv eval {student} --teacher {teacher} --passkey-samples 20")


def _find_teacher(given: Path | None) -> Path:
    """The teacher's directory. Raises ValueError if it is not there."""
    teacher = given or TEACHER
    if (teacher / "config.json").exists():
        return teacher
    if given is not None:
        raise ValueError(f"{teacher} has no config.json: expected a model directory of a teacher")
    raise ValueError(
        f"the small teacher is not in {teacher}: run the demo from a clone "
        "of the repository, or give --teacher DIR"
    )


def make_students(
    display: Display,
    teacher: Path,
    out: Path,
    convert: ConvertSettings,
    distill: DistillSettings,
    *,
    pure_tokens: int,
) -> dict[str, Path]:
    """Convert and distil; the model directories in the order of the table, by their name there."""
    from hrwkv.distill.corpus import read_corpus

    without = replace(convert, attention_layers=None, keep_attention=0)
    with display.step("Converting the teacher, with and without attention layers"):
        pure = run_convert(display, teacher, out / "pure-converted", without)
        untrained = run_convert(display, teacher, out / "hybrid-converted", convert)
    with display.step("Reading the text"):
        corpus = read_corpus(teacher, distill.data)
    shorter = replace(distill, stage2=replace(distill.stage2, tokens=pure_tokens or 1))
    stages = (1, 2) if pure_tokens else (1,)
    with display.step("Stage 1 for both students, stage 2 for the one without attention"):
        without_attention = run_distill(
            display, pure, teacher, out / "pure", shorter, stages=stages, corpus=corpus
        )
    with display.step("Stages 2 and 3 for the hybrid, from the layers that stage 1 aligned"):
        aligned = run_convert(
            display, teacher, out / "hybrid-aligned", convert, mixers_from=without_attention[1]
        )
        hybrid = run_distill(display, aligned, teacher, out / "hybrid", distill, stages=(2, 3), corpus=corpus)
    models = {
        "hybrid, converted": untrained,
        "hybrid, stage 1": aligned,
        "hybrid, stage 2": hybrid[2],
        STUDENT: hybrid[3],
    }
    return models | ({"no attention, stage 2": without_attention[2]} if pure_tokens else {})


def examine(display: Display, teacher: Path, models: dict[str, Path], settings: EvalSettings) -> list[Result]:
    """Measure the teacher and every student on the same text and prompts; prints the table."""
    original = open_model(teacher, device=settings.device, dtype=settings.dtype)
    examiner = Examiner.prepare(open_tokenizer(teacher), settings, display)
    results = []
    for name, path in models.items():
        model = open_model(path, device=settings.device, dtype=settings.dtype)
        results.append(examiner.examine(name, model, original))
    results.insert(0, examiner.examine_teacher("teacher", original, results[0]))
    show(display, results)
    return results


def _report(display: Display, out: Path, results: list[Result], *, facts: dict[str, Any]) -> None:
    from hrwkv.eval.report import write_report

    written = write_report(out, results, title="hrwkv demo", facts={k: str(v) for k, v in facts.items()})
    display.line(f"Written: {', '.join(str(path) for path in written)}")


def complete(display: Display, models: dict[str, Path], settings: DemoSettings) -> None:
    """The same prompt, continued greedily by each model, one after the other."""
    from hrwkv.model.generate import greedy_tokens

    texts = []
    for path in models.values():
        model, tokenizer = open_writer(path, device="auto", dtype="float32")
        ids = tokenizer(settings.prompt)["input_ids"]
        texts.append(tokenizer.decode(greedy_tokens(model, [ids], settings.completion_tokens)[0]))
    display.columns(settings.prompt.rstrip(), list(models), texts)
