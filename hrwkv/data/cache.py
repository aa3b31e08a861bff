"""Tokenised text on disk: written once, mapped into memory by every later run.

A folder per text, named by a hash of its key (tokenizer, sources, settings): ``tokens.bin`` holds uint32 end
to end, ``offsets.npy`` where documents end, ``key.json`` what it is. Documents go to the disk as they are
tokenised, so memory holds a few batches and 8 bytes a document. The folder is written beside and renamed: one
that has its name is whole. A lock lets one of several processes write while the others wait.
Left out: removal of what is no longer used; a folder may be deleted at any time between runs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrwkv.data.tokens import TokenStore

logger = logging.getLogger(__name__)

FORMAT = 1
Batches = Iterable[tuple[list[npt.NDArray[np.int32]], int]]


def cached_store(folder: Path, key: dict[str, Any], build: Callable[[], Batches]) -> TokenStore:
    """Return the store of `key` below `folder`, mapped from the disk; tokenise with `build` if it is new.

    key: everything that decides the tokens, for JSON. build: batches as ``encode_documents`` yields them.
    Raises ValueError for a folder that is damaged, and whatever `build` raises: nothing is left then.
    """
    import filelock

    text = json.dumps({"format": FORMAT, **key}, sort_keys=True, indent=1)
    path = folder / hashlib.sha256(text.encode()).hexdigest()[:32]
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(folder / f".{path.name}.lock"):
            if not path.exists():
                _write(path, text, build())
    return _open(path)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a hash of everything of a Hugging Face tokenizer that decides the ids of a text or a chat."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    core = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    facts = [
        type(tokenizer).__name__,
        core,
        tokenizer.eos_token_id,
        getattr(tokenizer, "chat_template", None),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _write(path: Path, key: str, batches: Batches) -> None:
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    ends, total, num_bytes = [np.zeros(1, dtype=np.int64)], 0, 0
    try:
        with (partial / "tokens.bin").open("wb") as file:
            for arrays, size in batches:
                lengths = np.array([len(array) for array in arrays], dtype=np.int64)
                ends.append(total + np.cumsum(lengths))
                total, num_bytes = int(ends[-1][-1]), num_bytes + size
                file.writelines(array.astype("<u4").tobytes() for array in arrays)
        offsets = np.concatenate(ends)
        np.save(partial / "offsets.npy", offsets)
        (partial / "key.json").write_text(key + "\n", encoding="utf-8")
        (partial / "size.json").write_text(json.dumps({"num_bytes": num_bytes}) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info("%s: %d documents, %d bytes, %d tokens", path, len(offsets) - 1, num_bytes, total)


def _open(path: Path) -> TokenStore:
    try:
        offsets = np.load(path / "offsets.npy")
        # Copy on write: torch wants writable memory, and the file stays as it is. Ids are below 2^31.
        tokens = np.memmap(path / "tokens.bin", dtype="<u4", mode="c").view(np.int32)
        num_bytes = json.loads((path / "size.json").read_text(encoding="utf-8"))["num_bytes"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"tokenised text {path} cannot be read ({error}): remove the folder") from error
    if len(tokens) != offsets[-1]:
        raise ValueError(
            f"tokenised text {path} holds {len(tokens)} tokens, expected {offsets[-1]}: remove the folder"
        )
    return TokenStore(tokens, offsets, num_bytes)
