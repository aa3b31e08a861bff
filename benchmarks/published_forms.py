"""Do export, import and convert stream? Peak memory and time on a large model, beside cp of the same bytes.

    python benchmarks/published_forms.py                       # 4 GiB in the system's temporary folder
    python benchmarks/published_forms.py --gib 8 --folder DIR  # on another disk; it needs four times that
    python benchmarks/published_forms.py --reka-layers 20      # Reka-Flash-3's width, its way out and back
                                                               # with logits before and after, on a GPU if any

Every step is a process of its own, and what it holds beyond importing its modules counts, mapped files
included. The floors: at most 1.5 GB, and at most twice the time of cp. cp runs before each step, on the files
that the step reads; both start with nothing left to write and end when the disk has everything, because a
system that takes a file into its memory is fast until that is full. The last line is JSON.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from hrwkv.model.checkpoint import expected_shapes, write_config
from hrwkv.model.config import FULL, LINEAR, HybridConfig
from hrwkv.model.shards import ShardWriter

MEMORY_FLOOR, TIME_FLOOR = 1.5e9, 2.0
ROPE = {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 8e6}}
SMALL: dict[str, Any] = {
    "vocab_size": 32768,
    "hidden_size": 3072,
    "intermediate_size": 9824,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 96,
    **ROPE,
}
SMALL_LAYER_BYTES = 2 * (3 * 3072 * 9824 + 2.5 * 3072**2 + 4e6)
SMALL_RANKS = {"decay_rank": 256, "iclr_rank": 96, "value_rank": 64, "key_rank": 64, "gate_rank": 256}
REKA: dict[str, Any] = {
    **SMALL,
    "vocab_size": 100352,
    "hidden_size": 6144,
    "intermediate_size": 19648,
    "num_attention_heads": 64,
}
REKA_RANKS = {"decay_rank": 320, "iclr_rank": 128, "value_rank": 96, "key_rank": 96, "gate_rank": 384}
# Run as ``python -c`` with a step, its source and its output; prints a result, seconds and peak KiB.
CHILD = """
import hashlib, os, re, sys, time
from pathlib import Path
import torch
from hrwkv.convert.exporting import export_model
from hrwkv.convert.importing import import_model
from hrwkv.convert.transfer import convert
from hrwkv.layers.batch import TokenBatch
from hrwkv.model.checkpoint import load_model
from hrwkv.settings import ConvertSettings, ImportSettings
step, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
os.sync()
result, start = "-", time.perf_counter()
if step == "export .pth":
    export_model(source, out, form="rwkv-infer-pth")
elif step == "export safetensors":
    export_model(source, out, form="rwkv-infer-safetensors")
elif step == "import .pth":
    import_model(source, out, ImportSettings(rope_theta=8e6, rms_norm_eps=1e-5))
elif step == "convert":
    convert(source, out, ConvertSettings(keep_attention=2))
elif step == "load, logits":
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(source, dtype=torch.bfloat16, device=device)
    ids = torch.randint(model.config.vocab_size, (512,), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        batch = TokenBatch.from_lengths([512], device=device)
        logits = model.compute_logits(model(ids.to(device), batch)).float().cpu()
    assert logits.isfinite().all() and logits.std() > 0
    result = hashlib.sha256(logits.numpy().tobytes()).hexdigest()
os.sync()
seconds = time.perf_counter() - start
print(result, seconds, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def write_model(path: Path, sizes: dict[str, Any], layers: int, ranks: dict[str, int]) -> None:
    """A random model in bf16: a hybrid that keeps every seventh layer, or without ranks a Llama."""
    kinds = [LINEAR if ranks and layer % 7 != 6 else FULL for layer in range(layers)]
    config = HybridConfig(
        num_hidden_layers=layers, layer_types=kinds, attention_rope=not ranks, **sizes, **ranks
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ShardWriter(path, max_shard_bytes=2**30) as writer:
        for name, shape in expected_shapes(config).items():
            # A residual stream and logits of a trained model's size.
            writer.add(name, torch.randn(shape, dtype=torch.bfloat16, device=device) / shape[-1] ** 0.5)
        if ranks:
            write_config(writer, config, torch.bfloat16)
        else:
            writer.write_json("config.json", {"model_type": "llama", "num_hidden_layers": layers, **sizes})


def run(step: str, source: Path, out: Path) -> tuple[str, float, float]:
    """Result, seconds and peak bytes of one step in a process of its own."""
    child = [sys.executable, "-c", CHILD, step, str(source), str(out)]
    done = subprocess.run(child, stdout=subprocess.PIPE, text=True, check=True)
    result, seconds, kib = done.stdout.split()
    return result, float(seconds), int(kib) * 1024


def copy_seconds(source: Path, out: Path) -> float:
    """Seconds of ``cp -r``; the copy is removed."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    os.sync()
    seconds = time.perf_counter() - start
    remove(out)
    return seconds


def remove(path: Path) -> None:
    """Delete a file or a folder."""
    shutil.rmtree(path) if path.is_dir() else path.unlink()


class Table:
    """Measured steps, printed as they come."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.rows = folder, list[dict[str, Any]]()
        _, _, self.base = run("nothing", folder, folder)
        print(f"imports {self.base / 1e6:.0f} MB; floors: {MEMORY_FLOOR / 1e9} GB, {TIME_FLOOR} x cp")
        print("step | GB | peak over imports, GB | seconds | cp, seconds | ratio")

    def measure(self, step: str, source: str, out: str = "") -> str:
        """Run a step between two names in the folder; without an output there is no cp to compare with."""
        copied = copy_seconds(self.folder / source, self.folder / "copy") if out else None
        result, seconds, peak = run(step, self.folder / source, self.folder / (out or source))
        made = self.folder / (out or source)
        size = sum(file.stat().st_size for file in (made.rglob("*") if made.is_dir() else [made]))
        ratio = seconds / copied if copied else None
        row = {"step": step, "bytes": size, "peak_bytes": peak - self.base, "seconds": seconds}
        self.rows.append({**row, "cp_seconds": copied, "ratio": ratio})
        beside = f"{copied:.1f} | {ratio:.2f}" if copied and ratio else "- | -"
        print(
            f"{step} | {size / 1e9:.2f} | {row['peak_bytes'] / 1e9:.2f} | {seconds:.1f} | {beside}",
            flush=True,
        )
        return result


def measure_small(table: Table, gib: float) -> None:
    """Every streaming step on a model of a chosen size."""
    layers = round(gib * 2**30 / SMALL_LAYER_BYTES)
    write_model(table.folder / "hybrid", SMALL, layers, SMALL_RANKS)
    table.measure("export .pth", "hybrid", "model.pth")
    table.measure("export safetensors", "hybrid", "exported")
    remove(table.folder / "exported")
    table.measure("import .pth", "model.pth", "imported")
    remove(table.folder / "imported")
    write_model(table.folder / "teacher", SMALL, layers, {})
    table.measure("convert", "teacher", "student")


def measure_reka(table: Table, layers: int) -> None:
    """Out to a .pth and back: the same logits. Removes what is not needed any more: the disk is small."""
    write_model(table.folder / "hybrid", REKA, layers, REKA_RANKS)
    before = table.measure("load, logits", "hybrid")
    table.measure("export .pth", "hybrid", "model.pth")
    remove(table.folder / "hybrid")
    table.measure("import .pth", "model.pth", "imported")
    remove(table.folder / "model.pth")
    after = table.measure("load, logits", "imported")
    verdict = "same" if before == after else "DIFFER"
    print(f"sha256 of the logits {before[:16]} before, {after[:16]} after: {verdict}")


def main() -> None:
    """Print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.2)
    parser.add_argument("--reka-layers", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        table = Table(Path(name))
        if arguments.reka_layers:
            measure_reka(table, arguments.reka_layers)
        else:
            measure_small(table, arguments.gib)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    facts = {"torch": torch.__version__, "python": platform.python_version(), "gpu": gpu}
    print(json.dumps({**facts, "import_bytes": table.base, "rows": table.rows}))


if __name__ == "__main__":
    main()
