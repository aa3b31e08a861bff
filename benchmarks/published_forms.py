"""Do export, import and convert stream? Peak memory and time on a large model, beside cp of the same bytes.

    python benchmarks/published_forms.py                       # 4 GiB in the system's temporary folder
    python benchmarks/published_forms.py --gib 8 --folder DIR  # on another disk; it needs four times that

Every step is a process of its own, and what it holds beyond importing its modules counts, mapped files
included. The floors: at most 1.5 GB, and at most twice the time of cp. cp runs before each step, on the files
that the step reads. The last line is JSON.
"""

import argparse
import json
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
# Run as ``python -c`` with a step, its source and its output; ``nothing`` only imports.
CHILD = """
import re, sys, time
from pathlib import Path
import torch
from hrwkv.convert.exporting import export_model
from hrwkv.convert.importing import import_model
from hrwkv.convert.transfer import convert
from hrwkv.settings import ConvertSettings, ImportSettings
step, source, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
start = time.perf_counter()
if step == "export .pth":
    export_model(source, out, form="rwkv-infer-pth")
elif step == "export safetensors":
    export_model(source, out, form="rwkv-infer-safetensors")
elif step == "import .pth":
    import_model(source, out, ImportSettings(rope_theta=8e6, rms_norm_eps=1e-5))
elif step == "convert":
    convert(source, out, ConvertSettings(keep_attention=2))
print(time.perf_counter() - start, re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def write_model(path: Path, gib: float, *, teacher: bool) -> None:
    """A random bf16 model of 3072 channels, about 0.2 GiB a layer; a hybrid, or a Llama of the same sizes."""
    size = {"hidden_size": 3072, "intermediate_size": 9824, "num_attention_heads": 32, "head_dim": 96}
    sizes: dict[str, Any] = {"vocab_size": 32768, "num_key_value_heads": 8, **size}
    sizes |= {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 8e6}}
    ranks = {"decay_rank": 256, "iclr_rank": 96, "value_rank": 64, "key_rank": 64, "gate_rank": 256}
    layers = round(gib * 2**30 / 2 / (3 * 3072 * 9824 + 2.5 * 3072**2 + 4e6))
    kinds = [FULL if teacher or layer % 7 == 6 else LINEAR for layer in range(layers)]
    own = {} if teacher else ranks
    config = HybridConfig(num_hidden_layers=layers, layer_types=kinds, attention_rope=teacher, **sizes, **own)
    with ShardWriter(path, max_shard_bytes=2**30) as writer:
        for name, shape in expected_shapes(config).items():
            writer.add(name, torch.randn(shape, dtype=torch.bfloat16))
        if teacher:
            writer.write_json("config.json", {"model_type": "llama", "num_hidden_layers": layers, **sizes})
        else:
            write_config(writer, config, torch.bfloat16)


def run(step: str, source: Path, out: Path) -> tuple[float, float]:
    """Seconds and peak bytes of one step in a process of its own."""
    child = [sys.executable, "-c", CHILD, step, str(source), str(out)]
    words = subprocess.run(child, capture_output=True, text=True, check=True).stdout.split()
    return float(words[0]), int(words[1]) * 1024


def copy_seconds(source: Path, out: Path) -> float:
    """Seconds of ``cp -r``; the copy is removed."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(out)], check=True)
    seconds = time.perf_counter() - start
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return seconds


def main() -> None:
    """Print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gib", type=float, default=4.2)
    parser.add_argument("--folder", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        _, base = run("nothing", folder, folder)
        print(f"imports {base / 1e6:.0f} MB; floors: {MEMORY_FLOOR / 1e9} GB, {TIME_FLOOR} x cp")
        print("step | GB | peak over imports, GB | seconds | cp, seconds | ratio")
        write_model(folder / "hybrid", arguments.gib, teacher=False)
        for step, source, out in (
            ("export .pth", "hybrid", "model.pth"),
            ("export safetensors", "hybrid", "exported"),
            ("import .pth", "model.pth", "imported"),
            ("convert", "teacher", "student"),
        ):
            if step == "convert":
                write_model(folder / "teacher", arguments.gib, teacher=True)
            copied = copy_seconds(folder / source, folder / "copy")
            seconds, peak = run(step, folder / source, folder / out)
            made = folder / out
            size = sum(file.stat().st_size for file in (made.rglob("*") if made.is_dir() else [made]))
            row = {"step": step, "bytes": size, "peak_bytes": peak - base, "seconds": seconds}
            rows.append({**row, "cp_seconds": copied, "ratio": seconds / copied})
            print(
                f"{step} | {size / 1e9:.2f} | {(peak - base) / 1e9:.2f} | {seconds:.1f} | {copied:.1f} | "
                f"{seconds / copied:.2f}",
                flush=True,
            )
            if step in ("export safetensors", "import .pth"):
                shutil.rmtree(made)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({**versions, "threads": torch.get_num_threads(), "import_bytes": base, "rows": rows}))


if __name__ == "__main__":
    main()
