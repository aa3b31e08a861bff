"""Named tensors in and out of a folder by torch's distributed checkpoints, with errors in one line."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from hrwkv.distill.parallel.ranks import Ranks


@contextlib.contextmanager
def _one_line_errors(what: str) -> Iterator[None]:
    """Turn a distributed checkpoint's error, no Exception and one line per process, into an OSError."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says what no_dist says
        try:
            yield
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise OSError(f"{what}: {reason}") from error


def save_state(state: dict[str, Any], folder: Path, ranks: Ranks) -> None:
    """Write named tensors into a new folder of a checkpoint: each process its shards, or its own names."""
    with _one_line_errors(f"cannot write the checkpoint {folder.parent}"):
        save(state, checkpoint_id=folder, no_dist=ranks.world == 1)


def load_state(state: dict[str, Any], folder: Path, ranks: Ranks, *, alone: bool = False) -> None:
    """Fill the tensors of ``state`` in place from a folder that ``save_state`` wrote.

    alone: other processes do not take part, and ``state`` holds no shards.
    """
    with _one_line_errors(f"cannot read the checkpoint {folder.parent}, remove it to use the one before"):
        load(state, checkpoint_id=folder, no_dist=alone or ranks.world == 1)
