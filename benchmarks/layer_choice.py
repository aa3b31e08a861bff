"""What is a measured choice of attention layers worth? The small teacher with three lists of them.

    python benchmarks/layer_choice.py                          # about 20 minutes on two free CPU cores
    python benchmarks/layer_choice.py --stage1 60000 --stage2 90000 --passkey-samples 2   # about 8

One stage 1 with every layer as RWKV serves all three. Then ``hrwkv select`` measures every layer; its choice
(selected), the layers that it scores lowest (worst) and evenly spread ones (even) are distilled with the same
budget, rates and text (recipes/tiny-demo.toml), and evaluated on the held-out test split. The last line is
JSON. ``--out`` keeps the models; called again, it goes on behind what is complete.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
TEACHER = ROOT / "examples" / "tiny_teacher" / "model"
RECIPE = ["--recipe", "tiny-demo"]


def hrwkv(done: Path, *words: object) -> None:
    """One command, unless what it writes is there."""
    if done.exists():
        return
    began = time.perf_counter()
    command = [sys.executable, "-m", "hrwkv.cli", *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"hrwkv {words[0]} ended with {result.returncode}: {result.stderr[-2000:]}")
    print(f"hrwkv {words[0]} -> {done}: {time.perf_counter() - began:.0f} s", flush=True)


def lists_of(out: Path, keep: int) -> dict[str, list[int]]:
    """Names of the lists and their layers, from the selection's scores and the even one."""
    found = json.loads((out / "selected" / "selection.json").read_text())
    even = json.loads((out / "even" / "selection.json").read_text())
    rows = sorted(found["rows"], key=lambda row: row["score"])
    worst = sorted(row["layer"] for row in rows[:keep])
    return {"selected": found["layers"], "even": even["layers"], "worst": worst}


def evaluate(out: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Stage 2 from one list's student, and its row of the table."""
    run, report = out / f"{name}-run", out / f"{name}-eval"
    budget = ["--stage2.tokens", arguments.stage2, "--seed", arguments.seed]
    begun = ["--resume"] if run.exists() else []
    words = ["--teacher", TEACHER, "--out", run, "--stage", 2, *RECIPE, *budget]
    hrwkv(run / "stage2", "distill", out / name, *words, "--checkpoint-every", 50, *begun)
    samples = ["--passkey-samples", arguments.passkey_samples]
    words = ["--teacher", TEACHER, "--out", report, *RECIPE, *samples]
    hrwkv(report / "report.md", "eval", run / "stage2", *words)
    model = json.loads((report / "report.json").read_text())["models"][1]
    overall = model["comparison"]["overall"]
    return {
        "ratio": model["comparison"]["ratio"],
        "kl": overall["kl"],
        "agreement": overall["agreement"],
        "passkey": model["grid"]["accuracy"],
    }


def prepare(out: Path, arguments: argparse.Namespace) -> dict[str, list[int]]:
    """Convert, align and select; a student in ``out`` for each list."""
    converted, aligned = out / "converted", out / "stage1-run"
    hrwkv(converted, "convert", TEACHER, converted, *RECIPE, "--keep-attention", 0)
    budget = ["--stage1.tokens", arguments.stage1, "--checkpoint-every", 50]
    begun = ["--resume"] if aligned.exists() else []
    words = ["--teacher", TEACHER, "--out", aligned, "--stage", 1, *RECIPE, *budget, *begun]
    hrwkv(aligned / "stage1", "distill", converted, *words)
    start = ["select", aligned / "stage1", "--teacher", TEACHER]
    keep = ["--keep", arguments.keep]
    size = ["--tokens", 16_384, "--context-length", 512, "--recall-lengths", "128,256,512"]
    hrwkv(out / "selected", *start, "--out", out / "selected", *keep, *size)
    hrwkv(out / "even", *start, "--out", out / "even", *keep, "--method", "even")
    lists = lists_of(out, arguments.keep)
    layers = ",".join(map(str, lists["worst"]))
    hrwkv(out / "worst", *start, "--out", out / "worst", "--layers", layers)
    return lists


def main() -> None:
    """Print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage1", type=int, default=300_000, help="tokens")
    parser.add_argument("--stage2", type=int, default=880_000, help="tokens of each list")
    parser.add_argument("--keep", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--passkey-samples", type=int, default=4)
    parser.add_argument("--out", type=Path, help="folder, kept afterwards")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary)
        lists = prepare(out, arguments)
        found: dict[str, dict[str, Any]] = {}
        for name, layers in lists.items():
            same = next((known for known in found if lists[known] == layers), None)
            found[name] = found[same] if same else evaluate(out, name, arguments)
    print("list     | attention | perplexity ratio | KL     | top-1 | passkey | KL over selected's | floor")
    for name, row in found.items():
        layers = ",".join(map(str, lists[name]))
        over = row["kl"] / found["selected"]["kl"]
        floor = "1" if name == "selected" else ">= 1"
        print(
            f"{name:8} | {layers:9} | {row['ratio']:16.3f} | {row['kl']:.4f} | {row['agreement']:5.1%} | "
            f"{row['passkey']:7.1%} | {over:18.3f} | {floor}"
        )
    facts = {"stage1": arguments.stage1, "stage2": arguments.stage2, "seed": arguments.seed}
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"lists": lists, "results": found, **facts, **versions}))


if __name__ == "__main__":
    main()
