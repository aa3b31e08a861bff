"""Documents and their split into train, dev and test.

A source is a text file, a folder of text files, the word ``stdlib`` (the sources of the running Python), or
whatever ``records`` reads: jsonl, parquet, patterns, URLs, Hugging Face data sets. The split hashes a
document's relative name (a record has no name: its text), never its place in a list, so it is the same on
every machine and stays the same when a corpus grows.

A corpus of a few documents cannot be split that way: as soon as one of the three splits would get no document
at all, every document is cut by position instead (first 95 % train, next 2.5 % dev, rest test, at line ends
where there are any). The choice depends on the sources only, not on the split that is asked for, so the
splits are disjoint either way.

Left out: removal of duplicates.
"""

import hashlib
import logging
import os
import sysconfig
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hrwkv.data.records import Ledger, Render, Shards, is_sharded, open_shards

logger = logging.getLogger(__name__)

Split = Literal["train", "dev", "test", "all"]
MAX_CORRUPT_SHARE = 0.001
SPLITS: tuple[str, ...] = ("train", "dev", "test", "all")
TRAIN_SHARE = 0.95
DEV_SHARE = 0.025
TEXT_SUFFIXES = (
    ".txt",
    ".md",
    ".rst",
    ".py",
    ".pyi",
    ".c",
    ".h",
    ".cpp",
    ".js",
    ".ts",
    ".rs",
    ".go",
    ".toml",
)
# Installed packages and caches are not part of a corpus, nor is what a build writes about its own machine.
SKIPPED_FOLDERS = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
SKIPPED_PATHS = ("lib2to3/tests/data/",)
SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")


@dataclass(frozen=True)
class Document:
    """One text and the name under which its source knows it."""

    name: str
    text: str


@dataclass(frozen=True)
class _Entry:
    """A document and the string whose hash decides its split."""

    document: Document
    key: str


@dataclass(frozen=True)
class _Reader:
    """Where the documents are, and what decides which of them are read."""

    places: list[Path | Shards]
    suffixes: tuple[str, ...]
    max_corrupt_share: float


def split_of(key: str) -> str:
    """Return ``train`` (95 %), ``dev`` or ``test`` (2.5 % each), from the sha256 of `key`."""
    place = int.from_bytes(_digest(key)[:8], "big") / 2**64
    if place < TRAIN_SHARE:
        return "train"
    return "dev" if place < TRAIN_SHARE + DEV_SHARE else "test"


def _digest(key: str) -> bytes:
    # A file name that is not UTF-8 reaches Python with escaped bytes; those are what is hashed.
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def read_documents(
    sources: Sequence[str | Path],
    *,
    split: Split,
    suffixes: Collection[str] = TEXT_SUFFIXES,
    render: Render | None = None,
    max_corrupt_share: float = MAX_CORRUPT_SHARE,
) -> Iterator[Document]:
    """Yield the non-empty documents of `sources` that belong to `split`, in a fixed order.

    `suffixes` says which files of a folder are text; a file given by name is read whatever its suffix. Files
    of a folder (or of ``stdlib``) that are not UTF-8 are skipped and counted in the log. `render` makes text
    of chat messages. Records that cannot be read are logged and skipped.

    Raises ValueError (at once for the sources, while reading for their contents): a source is missing, a
    named file is empty or not UTF-8, more than `max_corrupt_share` of a source's records or files cannot be
    read, or the split ends up without a document.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    if not sources:
        raise ValueError(
            "no text source was given: name a text file, a folder, a .jsonl file or the word stdlib"
        )
    places = [_locate(source, render) for source in sources]
    return _select(_Reader(places, tuple(suffixes), max_corrupt_share), split)


def source_fingerprint(source: str) -> list[Any]:
    """What changes when a source does, for JSON: names, sizes and times of its files, or the hub's hash."""
    place = _locate(source, None)
    if not isinstance(place, Path):
        return place.fingerprint()
    if place.is_dir():
        files = [(name, place / name) for name in _file_names(place, _suffixes(place, TEXT_SUFFIXES))]
    else:
        files = [(place.name, place)]
    return [[name, (status := path.stat()).st_size, status.st_mtime] for name, path in files]


def sample_documents(documents: Iterable[Document], *, max_bytes: int) -> list[Document]:
    """Return documents with at most `max_bytes` of UTF-8 text in all, in an order that hashes names.

    A short run needs a part of a corpus only; this part is spread over all folders, the same everywhere.
    A document that would pass the limit is left out and the next one tried. Raises ValueError if none fits.
    """
    chosen, left = [], max_bytes
    for document in sorted(documents, key=lambda one: (_digest(one.name), one.text)):
        size = len(document.text.encode())
        if size <= left:
            chosen.append(document)
            left -= size
    if not chosen:
        raise ValueError(
            f"no document has at most {max_bytes} bytes: raise the limit or give smaller documents"
        )
    return chosen


def _select(reader: _Reader, split: str) -> Iterator[Document]:
    by_hash = split == "all" or _every_split_has_one(reader)
    count = 0
    for entry in _entries(reader, report=True):
        if split == "all" or (by_hash and split_of(entry.key) == split):
            piece = entry.document
        elif by_hash:
            continue
        else:
            piece = Document(entry.document.name, _cut(entry.document.text, split))
        if piece.text:
            count += 1
            yield piece
    if not count:
        names = ", ".join(str(place) if isinstance(place, Path) else place.source for place in reader.places)
        raise ValueError(f"the {split} split of {names} is empty: give more text")


def _every_split_has_one(reader: _Reader) -> bool:
    """Stop at the first moment when all three were seen: a large corpus is hardly read twice."""
    missing = {"train", "dev", "test"}
    for entry in _entries(reader, report=False):
        missing.discard(split_of(entry.key))
        if not missing:
            return True
    return False


def _cut(text: str, split: str) -> str:
    """Return the part of `text` that belongs to `split` when documents are cut by position."""
    first, second = (_line_end(text, share) for share in (TRAIN_SHARE, TRAIN_SHARE + DEV_SHARE))
    return {"train": text[:first], "dev": text[first:second], "test": text[second:]}[split]


def _line_end(text: str, share: float) -> int:
    """Return the end of the line around `share` of the text; the very place where that line is too long."""
    place = int(len(text) * share)
    end = text.rfind("\n", 0, place) + 1
    # A line that takes more than half of a small split is cut: better a half line than an empty split.
    return end if end and place - end <= len(text) * DEV_SHARE / 2 else place


def _locate(source: str | Path, render: Render | None) -> Path | Shards:
    if source == "stdlib":
        return Path(sysconfig.get_path("stdlib"))
    path = Path(source)
    if is_sharded(str(source)) and not path.is_dir():
        return open_shards(str(source), render=render)
    if not path.exists():
        raise ValueError(
            f"text source {str(source)!r} does not exist: expected a text file, a folder, a .jsonl file "
            "or the word stdlib"
        )
    return path


def _entries(reader: _Reader, *, report: bool) -> Iterator[_Entry]:
    for place in reader.places:
        if not isinstance(place, Path):
            yield from _record_entries(place, reader.max_corrupt_share, report=report)
        elif place.is_dir():
            yield from _folder_entries(place, _suffixes(place, reader.suffixes), report=report)
        else:
            yield _Entry(Document(place.name, _read_named(place)), place.name)


def _suffixes(folder: Path, suffixes: tuple[str, ...]) -> tuple[str, ...]:
    return (".py",) if folder == Path(sysconfig.get_path("stdlib")) else suffixes


def _record_entries(shards: Shards, max_corrupt_share: float, *, report: bool) -> Iterator[_Entry]:
    ledger = Ledger(shards.source, max_share=max_corrupt_share, num_shards=len(shards.names))
    read = 0
    for index in range(len(shards.names)):
        for record in shards.read(index, 0):
            if report:
                ledger.add(record)
            if record.text:
                read += 1
                yield _Entry(Document(record.name, record.text), record.key)
    if not report:
        return
    ledger.finish()
    if not read:
        raise ValueError(
            f"text source {shards.source} is empty: expected records with a text field (.jsonl: one JSON "
            "object per line)"
        )


def _folder_entries(folder: Path, suffixes: tuple[str, ...], *, report: bool) -> Iterator[_Entry]:
    read = skipped = 0
    for name in _file_names(folder, suffixes):
        try:
            text = (folder / name).read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            skipped += 1
            continue
        text = text.removeprefix("\ufeff")
        if text:
            read += 1
            yield _Entry(Document(name, text), name)
    if not read:
        raise ValueError(
            f"folder {folder} holds no UTF-8 text file with one of the suffixes {' '.join(suffixes)}"
        )
    if report:
        logger.info("%s: %d documents, %d files skipped because they are not UTF-8", folder, read, skipped)


def _file_names(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """Return the relative POSIX names of the text files below `folder`, sorted."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS and not name.startswith(".")]
        for file in files:
            if file.endswith(suffixes) and not file.startswith((".", *SKIPPED_PREFIXES)):
                names.append((Path(root) / file).relative_to(folder).as_posix())
    return sorted(name for name in names if not name.startswith(SKIPPED_PATHS))


def _read_named(path: Path) -> str:
    data = path.read_bytes()
    if not data:
        raise ValueError(f"text file {path} is empty (0 bytes): give a file with text")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text file {path} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}; "
            "convert it to UTF-8"
        ) from error
