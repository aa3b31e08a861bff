"""Launch parameters of a kernel for a shape: remembered, shipped, kept on disk or measured, in this order.

Block sizes and warps that are best on one chip are slow on another, and no rule finds them, so the candidates
that a kernel names are timed once for each shape. That costs seconds where every process pays it, therefore
results for known chips are shipped in ``tables/`` and all others are kept in the user's cache directory. A
stored choice counts only if it is still one of the candidates, so an old or damaged file cannot launch
anything that the kernel does not offer.

Two candidates may differ in the order of their sums, so in their last bits; a run repeats bit by bit as long
as its choices are shipped or kept. For MI300X none is shipped: nobody has measured there. Its candidates are
in the order of their compiled code (benchmarks/compile_kernels.py), and the first run measures them: a choice
from that order alone would be kept for good, and 20 seconds are paid once. Left out: searching beyond the
candidates, and sharing between machines.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

logger = logging.getLogger(__name__)

# For one key, compilation included. A candidate that has begun is not interrupted.
BUDGET_SECONDS = 20.0
KERNELS = Path(__file__).parent
# A shipped table and the device names (for AMD with their architecture) that it was measured for.
SHIPPED = {
    "nvidia_h100_h200": re.compile(r"\bNVIDIA G?H[12]00\b"),
    "amd_mi300x": re.compile(r"\bMI300X\b|\bgfx942\b"),
}


class Config(Mapping[str, int]):
    """Launch parameters, immutable and hashable: ``kernel[grid](x, y, **Config(BV=32, num_warps=4))``."""

    def __init__(self, **values: int) -> None:
        self._values = values

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(frozenset(self._values.items()))

    def __repr__(self) -> str:
        return f"Config({', '.join(f'{name}={value}' for name, value in self._values.items())})"


# Launch options that one vendor's compiler knows and the other's refuses.
_OF_ONE_VENDOR = {"nvidia": {"maxnreg"}, "amd": {"waves_per_eu", "matrix_instr_nonkdim", "kpack"}}


def candidates_of(
    *, nvidia: Sequence[Config], amd: Sequence[Config], hip: str | None = torch.version.hip
) -> tuple[Config, ...]:
    """The candidates for the vendor that this torch is built for; NVIDIA's without a GPU.

    Threads of a warp (32, AMD: 64), shared memory (227 KB, AMD: 64 KB) and registers differ too much for one
    list. A launch option of one vendor alone is refused in the other's list.
    """
    for vendor, candidates in (("nvidia", nvidia), ("amd", amd)):
        foreign = set().union(*(names for other, names in _OF_ONE_VENDOR.items() if other != vendor))
        assert not foreign & {name for config in candidates for name in config}, (vendor, candidates)
    return tuple(nvidia if hip is None else amd)


class Entry(NamedTuple):
    """What a choice was made for: the kernel's name, and the shape and dtypes that decide its speed."""

    name: str
    key: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} [{', '.join(map(str, self.key))}]"


Table = dict[Entry, Config]


def choose(
    name: str,
    key: Sequence[int | str],
    candidates: Sequence[Config],
    run: Callable[[Config], None],
    *,
    device: torch.device,
) -> Config:
    """Give the launch parameters for one shape of one kernel, measured if nobody knows them.

    Args:
        name: the kernel, one name for each set of candidates.
        key: what decides the best choice: sizes and dtypes. Few values: each new key may cost 20 seconds, so
            round what varies from call to call, such as a number of tokens.
        candidates: parameters to choose from; the first is the default and must work on every device.
        run: launches the kernel with a candidate. It runs many times, so it must not change its inputs.
        device: where the kernel runs. On a CPU (Triton's interpreter) the first candidate is the answer.

    Raises:
        RuntimeError: no candidate can be launched; the message has every reason.
    """
    if device.type == "cpu":
        return candidates[0]
    return default_tuner().choose(Entry(name, tuple(key)), candidates, run, device=device)


@functools.cache
def default_tuner() -> Tuner:
    """The process's tuner, with the shipped tables and the user's cache directory."""
    return Tuner(cache_directory=_cache_directory(), chip_of=_chip, milliseconds=_milliseconds)


class Tuner:
    """Choices of this process and where they come from.

    Args:
        cache_directory: where choices are kept between processes, None for nowhere.
        chip_of: name of a device's chip.
        milliseconds: time of one launch; raises whatever the compiler and the launch raise.
        clock: seconds, to hold the budget.
        shipped_directory: holds the shipped tables.
    """

    def __init__(
        self,
        *,
        cache_directory: Path | None,
        chip_of: Callable[[torch.device], str],
        milliseconds: Callable[[Callable[[], None], torch.device], float],
        clock: Callable[[], float] = time.monotonic,
        shipped_directory: Path = KERNELS / "tables",
    ) -> None:
        self._cache_directory, self._shipped_directory = cache_directory, shipped_directory
        self._chip_of, self._milliseconds, self._clock = chip_of, milliseconds, clock
        self._memo: dict[tuple[Entry, torch.device], Config] = {}
        # Autograd runs a backward in a thread of its own. Reentrant, as a kernel may launch others.
        self._lock = threading.RLock()

    def choose(
        self,
        entry: Entry,
        candidates: Sequence[Config],
        run: Callable[[Config], None],
        *,
        device: torch.device,
    ) -> Config:
        """Give the parameters for ``entry``; arguments and errors as in the function ``choose``."""
        known = self._memo.get((entry, device))
        if known is not None:
            return known
        with self._lock:
            chip = self._chip_of(device)
            choice = candidates[0] if len(candidates) == 1 else self._stored(entry, candidates, chip=chip)
            if choice is None:
                choice = self._measure(entry, candidates, run, device=device)
                self._keep(entry, choice, chip=chip)
            self._memo[entry, device] = choice
        return choice

    def _stored(self, entry: Entry, candidates: Sequence[Config], *, chip: str) -> Config | None:
        """Look into the shipped table, then into the user's file: read anew, others write to it as well."""
        paths = [
            self._shipped_directory / f"{table}.json"
            for table, chips in SHIPPED.items()
            if chips.search(chip)
        ]
        if self._cache_directory is not None:
            paths.append(self._cache_path(self._cache_directory, chip))
        for path in paths:
            choice = _read(path).get(entry)
            if choice in candidates:
                return choice
        return None

    def _measure(
        self,
        entry: Entry,
        candidates: Sequence[Config],
        run: Callable[[Config], None],
        *,
        device: torch.device,
    ) -> Config:
        """Time the candidates in turn until the budget is spent; the fastest wins, the earlier of equals."""
        start = self._clock()
        times: dict[Config, float] = {}
        failures: list[str] = []
        for candidate in candidates:
            if times and self._clock() - start >= BUDGET_SECONDS:
                break
            try:
                times[candidate] = self._milliseconds(functools.partial(run, candidate), device)
            # A fault inside a kernel leaves the device unusable: no other candidate can run after it.
            except torch.AcceleratorError:
                raise
            # What compilers raise has no common base: Triton's own, PTXAS's, LLVM's, the driver's.
            except Exception as error:
                failures.append(f"{candidate}: {type(error).__name__}: {error}")
                logger.debug("%s: skipped %s", entry, failures[-1])
        if not times:
            raise RuntimeError(f"{entry}: none of the candidates can be launched: {'; '.join(failures)}")
        best = min(times, key=times.__getitem__)
        logger.info(
            "%s: %s takes %.3f ms, the best of %d of %d candidates, in %.1f s",
            *(entry, best, times[best], len(times), len(candidates), self._clock() - start),
        )
        return best

    def _keep(self, entry: Entry, choice: Config, *, chip: str) -> None:
        """Add a choice to the user's file, beside what other processes have written meanwhile.

        Two that write in the same instant lose one choice, which costs its next reader a measurement.
        """
        if self._cache_directory is None:
            return
        path = self._cache_path(self._cache_directory, chip)
        try:
            # A damaged file is replaced; whoever looked for the choice has been warned of it.
            _write(path, _read(path, level=logging.DEBUG) | {entry: choice})
        except OSError as error:
            logger.warning("%s cannot be written (%s): the next process measures again", path, error)

    @staticmethod
    def _cache_path(directory: Path, chip: str) -> Path:
        """One file for each chip and version of the kernels, so that no choice outlives its kernel."""
        slug = re.sub(r"\W+", "_", chip.lower()).strip("_")
        return directory / f"{slug}-{source_version()}.json"


@functools.cache
def source_version() -> str:
    """Digest of the kernels' sources and of Triton's version, which together make the compiled code."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    for path in sorted(KERNELS.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def dump(table: Table) -> str:
    """Write a table as JSON, one choice a line, so that a cache file can be shipped as it is."""
    lines = [
        json.dumps({"kernel": entry.name, "key": entry.key, "config": dict(config)})
        for entry, config in table.items()
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n" if lines else "[]\n"


def parse(text: str) -> Table:
    """Read what ``dump`` wrote; ``ValueError``, ``KeyError`` or ``TypeError`` for anything else."""
    return {Entry(row["kernel"], tuple(row["key"])): Config(**row["config"]) for row in json.loads(text)}


def _read(path: Path, *, level: int = logging.WARNING) -> Table:
    """Read a file of choices; a missing one is empty, and so, with a warning, is a damaged one."""
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.log(level, "%s cannot be read (%s): its choices are measured again", path, error)
        return {}


def _write(path: Path, table: Table) -> None:
    """Write beside ``path`` and rename: a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", dir=path.parent, prefix=path.stem, delete=False
    ) as file:
        try:
            file.write(dump(table))
            file.flush()
            os.replace(file.name, path)
        except OSError:
            os.unlink(file.name)
            raise


def _cache_directory() -> Path | None:
    try:
        return Path.home() / ".cache" / "hrwkv" / "kernels"
    except RuntimeError as error:  # a container's user may have no home
        logger.warning("%s: tuned launch parameters are not kept between processes", error)
        return None


@functools.cache
def _chip(device: torch.device) -> str:
    """Name the device as its driver does; AMD's names vary with the driver, so with the architecture."""
    properties = torch.cuda.get_device_properties(device)
    return properties.name if torch.version.hip is None else f"{properties.name} {properties.gcnArchName}"


def _milliseconds(launch: Callable[[], None], device: torch.device) -> float:
    """Median time of a launch with cold caches, about 50 ms in all after compiling."""
    import triton.testing

    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("a CUDA graph is being captured: run this shape once before capturing it")
    with torch.cuda.device(device):
        median: float = triton.testing.do_bench(launch, warmup=10, rep=40, return_mode="median")
        return median
