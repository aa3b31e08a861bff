"""Every Triton kernel compiles for MI300X, which needs AMD's compiler but none of its chips.

What NVIDIA's compiler refuses is seen wherever a test or benchmark runs on a GPU; AMD's had refused the
gradients of the recurrence, and every product of fp32 in it, before anybody ran it.
"""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "hrwkv" / "kernels"


def launched_kernels() -> set[str]:
    """Names of what ``hrwkv.kernels`` launches, ``kernel[grid](...)``, with the module of each kernel."""
    found = set()
    for path in KERNELS.rglob("*.py"):
        nodes = [*ast.walk(ast.parse(path.read_text()))]
        module = ".".join(path.relative_to(KERNELS).with_suffix("").parts)
        imported = {
            alias.name: (node.module or "").removeprefix("hrwkv.kernels.")
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        for node in nodes:
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                assert isinstance(node.func.value, ast.Name), f"{path}:{node.lineno}"
                name = node.func.value.id
                found.add(f"{imported.get(name, module)}.{name}")
    return found


def test_every_kernel_compiles_for_mi300x(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first candidate of each, in bf16 and for products in fp32; a new kernel needs a case there."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    command = [sys.executable, "benchmarks/compile_kernels.py", "--chips", "gfx942", "--key-sizes", "32"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [(row["kernel"], row["case"], row["failed"]) for row in rows if "failed" in row] == []
    assert {row["kernel"] for row in rows} == launched_kernels()
    assert done.returncode == 0
