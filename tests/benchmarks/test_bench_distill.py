"""The benchmark of distillation steps on a tiny shape; a case that fails leaves the others their numbers."""

import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_distill.py"


@pytest.mark.parametrize("mode", ["frozen-mlp", "all"])
def test_every_case_is_measured(
    mode: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    bench = pytest.importorskip("bench_distill")
    cases = ["1:all:2", "2:nothing:2", "2:mlp:1", "7:all:1"]
    sizes = ["--shape", "tiny", "--layers", "4", "--context", "32", "--steps", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["bench_distill", *sizes, "--mode", mode, "--cases", *cases])
    bench.main()
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    *rows, failed = report["rows"].values()
    assert "KeyError: 7" in failed["failed"]
    for row in rows:
        assert row["x_floor"] == pytest.approx(1 / row["mfu"])
        assert 0 < row["loss"] < 100
    assert report["hours"] == pytest.approx(rows[0]["hours"] + min(row["hours"] for row in rows[1:]))
