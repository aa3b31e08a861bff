"""How much memory does a conversion hold? Peak of a fresh process, against one layer and the whole model.

    python benchmarks/convert_memory.py                 # a teacher of 1 GiB, made on the fly
    python benchmarks/convert_memory.py --layers 32     # a larger one must not need more

Each run is a process of its own, because memory that was once used counts in its peak for ever. The first
only imports; it is subtracted. Pages of the mapped teacher file, which the system could take back at any
time, count too. The last line is JSON.
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

from hrwkv.model.checkpoint import expected_shapes
from hrwkv.model.families import config_from_teacher
from hrwkv.model.shards import ShardWriter

MIB = 2**20
# Run as ``python -c``: arguments are teacher, output, GiB per shard; without any it imports and ends.
CHILD = """
import resource, sys
from pathlib import Path
import torch
from hrwkv.convert.transfer import convert
from hrwkv.settings import ConvertSettings
torch.set_num_threads(1)
if len(sys.argv) > 1:
    settings = ConvertSettings(keep_attention=2, max_shard_gib=float(sys.argv[3]) or None)
    convert(Path(sys.argv[1]), Path(sys.argv[2]), settings)
status = Path("/proc/self/status")
if status.exists():  # on Linux ru_maxrss starts from the parent's
    peak = next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM"))
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(peak)
"""


def write_teacher(path: Path, layers: int) -> int:
    """A Llama of 2048 channels in bf16, 116 MiB a layer, all weights 0.01; returns its bytes."""
    values: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": 16384,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
    total = 0
    with ShardWriter(path, max_shard_bytes=512 * MIB) as writer:
        for name, shape in expected_shapes(config_from_teacher(values)).items():
            tensor = torch.full(shape, 0.01, dtype=torch.bfloat16)
            total += tensor.nbytes
            writer.add(name, tensor)
        writer.write_json("config.json", values)
    return total


def peak_bytes(*arguments: str) -> tuple[int, float]:
    """Peak resident bytes and seconds of one child process."""
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, check=True
    )
    unit = 1 if platform.system() == "Darwin" else 1024
    return int(run.stdout) * unit, time.perf_counter() - start


def main() -> None:
    """Print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--shards", type=float, nargs="+", default=[0, 0.5], help="GiB; 0 is about a layer")
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / "teacher"
        total = write_teacher(teacher, arguments.layers)
        embedding = 2 * 16384 * 2048
        layer = (total - embedding) // arguments.layers
        base, _ = peak_bytes()
        print(f"model {total / MIB:.0f} MiB, one layer {layer / MIB:.0f} MiB, imports {base / MIB:.0f} MiB")
        print("shard GiB | peak over imports MiB | of the model | layers | seconds")
        for gib in arguments.shards:
            out = Path(folder) / f"student-{gib}"
            peak, seconds = peak_bytes(str(teacher), str(out), str(gib))
            over = peak - base
            rows.append({"shard_gib": gib, "peak_bytes": over, "seconds": round(seconds, 1)})
            share, layers = over / total, over / layer
            print(
                f"{gib or 'a layer':>9} | {over / MIB:21.0f} | {share:12.1%} | {layers:6.2f} | {seconds:.1f}"
            )
    facts = {"model_bytes": total, "layer_bytes": layer, "import_bytes": base, "runs": rows}
    print(json.dumps({"torch": torch.__version__, "python": platform.python_version(), **facts}))


if __name__ == "__main__":
    main()
