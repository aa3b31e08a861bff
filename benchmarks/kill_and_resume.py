"""Is a run that is killed ten times the run that was never disturbed? All steps, the small teacher, SIGKILL.

    python benchmarks/kill_and_resume.py               # about four minutes on two free CPU cores
    python benchmarks/kill_and_resume.py --kills 3 --seed 1

One whole run of ``hrwkv distill TEACHER`` gives the expected numbers. The second one is killed again and
again and goes on with the same command and ``--resume``, then it is left alone. Each kill comes a random part
of a second after something: two of three after a random number of training steps, the third after the next
step of the way is complete. The log (all but the clock) and every weight of the last model must be the same
bits. The last line is JSON.
"""

import argparse
import contextlib
import json
import platform
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hrwkv.model.checkpoint import load_model

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "examples" / "tiny_teacher" / "model"
CLOCK = ("tokens_per_second", "seconds_left")
SETTINGS = {
    "data.sources": ROOT / "hrwkv",
    "data.context-length": 128,
    "data.batch-tokens": 512,
    "stage1.tokens": 20_480,
    "stage2.tokens": 40_960,
    "stage2.micro-batch-tokens": 256,
    "stage3.tokens": 10_240,
    "spike-factor": 3.0,
    "checkpoint-every": 4,
    "validate-every": 20,
    "validation-tokens": 512,
    "device": "cpu",
    "convert.keep-attention": 0,
    **{f"convert.{name}-rank": 16 for name in ("decay", "iclr", "value", "key", "gate")},
    "select.keep": 1,
    "select.sources": ROOT / "hrwkv",
    "select.tokens": 2048,
    "select.context-length": 256,
    "select.batch-tokens": 2048,
    "select.recall-lengths": 256,
    "select.recall-samples": 2,
    "eval.text": ROOT / "hrwkv",
    "eval.tokens": 2048,
    "eval.context-length": 256,
    "eval.batch-tokens": 1024,
    "eval.passkey-lengths": 256,
    "eval.passkey-samples": 1,
}


def command(out: Path, *, resume: bool) -> list[str]:
    """The command line of a run of all steps."""
    flags = [word for name, value in SETTINGS.items() for word in (f"--{name}", str(value))]
    start = [sys.executable, "-m", "hrwkv.cli", "distill", str(TEACHER), "--out", str(out)]
    return [*start, *flags, *(["--resume"] if resume else [])]


@dataclass(frozen=True)
class Moment:
    """When to kill: ``seconds`` after so many training steps here, or after a directory is there."""

    seconds: float
    steps: int = 0
    next_directory: bool = False


def run(out: Path, *, resume: bool, moment: Moment | None = None) -> bool:
    """Start a run in a process of its own; True if it ended, False if it was killed at its moment."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command(out, resume=resume), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors
        )
        if moment is None:
            process.wait()
        else:
            _wait(process, out, moment)
        if process.poll() is None:
            process.kill()
            process.wait()
            return False
        if process.returncode:
            errors.seek(0)
            said = errors.read().decode()[-2000:]
            raise RuntimeError(f"the run failed with {process.returncode}: {said}")
    return True


def _wait(process: "subprocess.Popen[bytes]", out: Path, moment: Moment) -> None:
    """Until the moment has come or the process has ended."""
    log, seen, size = out / "log.jsonl", 0, -1
    begun = complete(out)
    while moment.next_directory and complete(out) == begun and process.poll() is None:
        time.sleep(0.01)
    while seen < moment.steps and process.poll() is None:
        now = log.stat().st_size if log.exists() else -1
        if now != size:
            # A resume that drops rows changes the size as well; one step more or less is no matter.
            seen, size = seen + 1, now
        time.sleep(0.01)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(moment.seconds)


def rows(out: Path) -> list[dict[str, Any]]:
    """The whole lines of log.jsonl without the clock; a killed process may leave half of one."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in found]


def complete(out: Path) -> list[str]:
    """The steps of the way that are complete."""
    names = ("converted", "stage1", "selected", "stage2", "stage3", "eval/report.md")
    return [name for name in names if (out / name).exists()]


def reached(out: Path) -> str:
    """Where a killed run was, for a reader."""
    last = rows(out)
    where = f"stage {last[-1]['stage']} step {last[-1]['step']}" if last else "no step yet"
    return f"{where}; complete: {', '.join(complete(out)) or 'nothing'}"


def differences(whole: Path, cut: Path) -> dict[str, int]:
    """Rows and tensors that are not the same bits."""
    expected, got = rows(whole), rows(cut)
    different = abs(len(expected) - len(got)) + sum(a != b for a, b in zip(expected, got, strict=False))
    ours, theirs = (load_model(out / "stage3").state_dict() for out in (whole, cut))
    return {
        "rows": len(expected),
        "rows_different": different,
        "tensors": len(ours),
        "tensors_different": sum(not torch.equal(tensor, theirs[name]) for name, tensor in ours.items()),
    }


def main() -> None:
    """Print a line a kill, a table, and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder for the two runs, kept afterwards")
    arguments = parser.parse_args()
    generator = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.keep or Path(temporary)
        whole, cut = folder / "whole", folder / "cut"
        began = time.perf_counter()
        run(whole, resume=False)
        seconds = time.perf_counter() - began
        print(f"undisturbed: {seconds:.0f} s, {len(rows(whole))} steps", flush=True)
        kills = []
        began = time.perf_counter()
        while len(kills) < arguments.kills:
            moment = Moment(generator.random(), next_directory=True)
            if len(kills) % 3:
                moment = Moment(generator.random(), steps=generator.randint(1, 8))
            if run(cut, resume=bool(kills), moment=moment):
                print("the run ended before its moment came", flush=True)
                break
            kills.append({**asdict(moment), "reached": reached(cut)})
            said = f"{moment.steps or 'a directory'} and {moment.seconds:.1f} s"
            print(f"kill {len(kills):2}: after {said}: {kills[-1]['reached']}", flush=True)
        run(cut, resume=True)
        disturbed = time.perf_counter() - began
        facts = differences(whole, cut)
        losses = [rows(out)[-1]["loss"] for out in (whole, cut)]
    print("run         | kills | seconds | final loss         | ratio | floor")
    print(f"undisturbed | {0:5} | {seconds:7.0f} | {losses[0]:.16f} | 1     | 1")
    ratio = losses[1] / losses[0]
    print(f"killed      | {len(kills):5} | {disturbed:7.0f} | {losses[1]:.16f} | {ratio:<5g} | 1")
    equal = not (facts["rows_different"] or facts["tensors_different"])
    print("the same bits" if equal else f"NOT the same: {facts}")
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    result = {"kills": kills, "final_loss": losses, "equal": equal, "seconds": [seconds, disturbed]}
    print(json.dumps(result | facts | versions))


if __name__ == "__main__":
    main()
