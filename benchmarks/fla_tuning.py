"""fla's chunk_rwkv7 as a peer, with its autotuning made affordable.

Cold, each of its fourteen kernels compiles up to 135 configurations one after the other: minutes for one head
size. Here every autotuner keeps ``configs`` of them, spread evenly over its list, and processes compile them
side by side into Triton's cache first; run as a script, this file is one of those processes. What is left out
could have been faster: a figure says how many were tried.
"""

import argparse
import functools
import itertools
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

# The default, and what its documentation offers for decays that are bounded as ours are.
VARIANTS: dict[str, dict[str, Any]] = {
    "fla": {},
    "fla safe 64": {"safe_gate": True, "chunk_size": 64},
    "fla safe 32": {"safe_gate": True, "chunk_size": 32},
    "fla safe 16": {"safe_gate": True, "chunk_size": 16},
    "fla safe 64, kept": {"safe_gate": True, "chunk_size": 64, "disable_recompute": True},
}


def load(variant: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """Give chunk_rwkv7 ``(r, w, k, v, a, b, initial_state=) -> o, final state`` on [B, T, H, K]."""
    from fla.ops.rwkv7 import chunk_rwkv7

    return functools.partial(chunk_rwkv7, scale=1.0, output_final_state=True, **VARIANTS[variant])


def autotuners() -> Iterator[Any]:
    """Find every autotuner in the modules of fla that are imported."""
    from triton.runtime.autotuner import Autotuner

    seen = set()
    for name, module in list(sys.modules.items()):
        for value in list(vars(module).values()) if name.startswith("fla.") else ():
            # Heuristics may lie around an autotuner; plain functions that are wrapped have no fn.
            while hasattr(value, "fn") and id(value) not in seen:
                seen.add(id(value))
                if isinstance(value, Autotuner):
                    yield value
                value = value.fn


def spread(configs: Sequence[Any], number: int) -> list[Any]:
    """Take ``number`` of the configurations, spread evenly over the list."""
    number = min(number, len(configs))
    return [configs[i * len(configs) // number] for i in range(number)]


def limit(configs: int) -> None:
    """Let every autotuner try ``configs`` configurations, each for some 15 ms."""
    import triton.testing

    for tuner in autotuners():
        tuner.configs = spread(tuner.configs, configs)
        tuner.do_bench = functools.partial(triton.testing.do_bench, warmup=3, rep=12)


def compile_ahead(
    variants: Sequence[str],
    key_sizes: Sequence[int],
    *,
    heads: int,
    configs: int,
    workers: int,
    peers: list[str],
) -> dict[str, Any]:
    """Compile in ``workers`` processes; a failure costs time later, so it is counted and told."""
    start = time.perf_counter()
    jobs = [
        [sys.executable, __file__, variant, str(key_size), str(heads), str(part), str(configs), *peers]
        for variant, key_size, part in itertools.product(variants, key_sizes, range(configs))
    ]
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=240, check=False)
    failures = []
    with ThreadPoolExecutor(workers) as pool:
        for job, future in [(job, pool.submit(run, job)) for job in jobs]:
            try:
                done = future.result()
                reason = "" if done.returncode == 0 else done.stderr.strip()[-300:]
            except subprocess.TimeoutExpired:
                reason = "took more than 240 s"
            if reason:
                failures.append(f"{' '.join(job[2:5])}: {reason}")
    return {
        "processes": len(jobs),
        "seconds": round(time.perf_counter() - start, 1),
        "failures": failures[:4],
        "failed": len(failures),
    }


def compile_part(variant: str, *, key_size: int, heads: int, part: int, configs: int) -> None:
    """Launch forward and backward once with the configuration ``part`` of each kernel: nothing is timed."""
    form = load(variant)
    for tuner in autotuners():
        kept = spread(tuner.configs, configs)
        tuner.configs = [kept[part % len(kept)]]
    shape = (1, 1024, heads, key_size)
    inputs = [
        torch.rand(shape, device="cuda", dtype=torch.bfloat16).mul_(-0.01).requires_grad_() for _ in range(6)
    ]
    state = torch.zeros(1, heads, key_size, key_size, device="cuda", requires_grad=True)
    for initial_state in (None, state):
        o, final_state = form(*inputs, initial_state=initial_state)
        (o.sum() + (0 if initial_state is None else final_state.sum())).backward()
    with torch.no_grad():
        form(*inputs, initial_state=None)


def main() -> None:
    """Be one compiling process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("variant", choices=VARIANTS)
    for name in ("key_size", "heads", "part", "configs"):
        parser.add_argument(name, type=int)
    parser.add_argument("peers", nargs="*")
    options = parser.parse_args()
    sys.path[:0] = options.peers
    compile_part(
        options.variant,
        key_size=options.key_size,
        heads=options.heads,
        part=options.part,
        configs=options.configs,
    )


if __name__ == "__main__":
    main()
