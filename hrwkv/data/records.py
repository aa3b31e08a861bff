"""Records of text in shards: jsonl (plain, .gz, .zst), parquet, whole text files, Hugging Face data sets.

A source is a list of shards, and a record has a number in its shard, so (shard, number) is an exact position
whatever the format. Files are opened by fsspec, local or remote, and read record by record; a shard is never
in memory as a whole. What cannot be read comes as a record with a fault, and ``Ledger`` counts those: a large
corpus always has some, and a run shall neither die of one nor lose many in silence.
Left out: retries of a broken connection (an error as any other), fields with other names than ``text`` and
``messages``.
"""

from __future__ import annotations

import importlib
import json
import logging
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import jinja2

logger = logging.getLogger(__name__)

HUB = "hf:"
RECORD_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
# Before this many records a share says nothing: one bad line among the first ten is no tenth of the corpus.
RECORDS_BEFORE_JUDGEMENT = 1000
FAULTS_NAMED = 5

Render = Callable[[list[dict[str, Any]]], str]


@dataclass(frozen=True)
class Record:
    """A record of a shard: its text, or the fault that it has instead.

    number: its place in the shard, from 0; reading goes on at number + 1. key: what decides its split.
    ends_shard: the fault is the file's, nothing after it can be read.
    """

    shard: str
    number: int
    text: str = ""
    key: str = ""
    fault: str = ""
    ends_shard: bool = False

    @property
    def name(self) -> str:
        """The shard's file name and the record's number, from 1 as editors count lines."""
        return f"{self.shard.rsplit('/', 1)[-1]}:{self.number + 1}"


class Ledger:
    """Counts what was read and what could not be, and refuses more faults than the stated share.

    A fault of a record counts against the records read, a broken file against the files: one of few files is
    a large share, whatever it held. state: a former ledger's ``state()``, to go on from.
    """

    def __init__(
        self, source: str, *, max_share: float, num_shards: int, state: dict[str, Any] | None = None
    ) -> None:
        self.source, self.max_share, self.num_shards = source, max_share, num_shards
        state = state or {"seen": 0, "records": 0, "shards": 0, "first": []}
        self.seen, self.records, self.shards = state["seen"], state["records"], state["shards"]
        self.first: list[str] = list(state["first"])

    def state(self) -> dict[str, Any]:
        """The counts so far, for JSON."""
        return {"seen": self.seen, "records": self.records, "shards": self.shards, "first": list(self.first)}

    def add(self, record: Record) -> None:
        """Count a record; raises ValueError as soon as the share is surely passed."""
        self.seen += not record.ends_shard
        if not record.fault:
            return
        logger.warning("skipped: %s", record.fault)
        self.shards += record.ends_shard
        self.records += not record.ends_shard
        if len(self.first) < FAULTS_NAMED:
            self.first.append(record.fault)
        self._judge(max(self.seen, RECORDS_BEFORE_JUDGEMENT))

    def finish(self) -> None:
        """Judge the whole source. Raises ValueError if more than the stated share is corrupt."""
        self._judge(self.seen)
        if self.first:
            logger.warning(
                "%s: skipped %d of %d records and %d of %d files as corrupt",
                *(self.source, self.records, self.seen, self.shards, self.num_shards),
            )

    def _judge(self, records: int) -> None:
        if self.records > self.max_share * records or self.shards > self.max_share * self.num_shards:
            raise ValueError(
                f"{self.source}: {self.records} of {self.seen} records and {self.shards} of "
                f"{self.num_shards} files are corrupt, data.max_corrupt_share allows {self.max_share}: "
                f"repair them or raise it; first {'; '.join(self.first)}"
            )


class FileShards:
    """The files that a path, a glob pattern or a URL of either names, in the order of their names.

    Raises ValueError where it names no file, or needs a package that is not installed.
    """

    def __init__(self, source: str, *, render: Render | None) -> None:
        import fsspec

        self.source, self.render = source, render
        try:
            self.files, path = fsspec.core.url_to_fs(source)
            found = [path] if _is_plain(source) else sorted(self.files.glob(path))
        except (ImportError, OSError, ValueError) as error:
            raise ValueError(f"text source {source!r} cannot be opened: {error}") from error
        # A name may hold a bracket or a question mark of its own; only a pattern is expanded.
        self.names: list[str] = [str(name) for name in found if self.files.isfile(name)]
        if not self.names:
            raise ValueError(f"text source {source!r} names no file: give an existing file, URL or pattern")
        if any(name.endswith(".parquet") for name in self.names):
            import_extra("pyarrow.parquet", extra="hrwkv[train]", needed_for="parquet files")
        if any(name.endswith(".zst") for name in self.names):
            import_extra("zstandard", extra="zstandard", needed_for=".zst files")

    def fingerprint(self) -> list[Any]:
        """What changes when a file does, for JSON: names, sizes, and times or the store's own tags."""
        local = "file" in (
            [self.files.protocol] if isinstance(self.files.protocol, str) else self.files.protocol
        )
        facts = [(name, self.files.info(name)) for name in self.names]
        return [
            [name.rsplit("/", 1)[-1], info.get("size"), info["mtime"] if local else self.files.ukey(name)]
            for name, info in facts
        ]

    def read(self, index: int, start: int) -> Iterator[Record]:
        """Yield the records of shard `index` from number `start` on, the faulty ones too."""
        name = self.names[index]
        read = _read_parquet if name.endswith(".parquet") else _read_jsonl
        if not name.endswith(RECORD_SUFFIXES):
            read = _read_text

        def records() -> Iterator[Record]:
            with self.files.open(name, "rb", compression=_compression(name)) as file:
                yield from read(cast(BinaryIO, file), name, start, self.render)

        return _until_damage(records(), name, start)


class HubShards:
    """A data set of the Hugging Face hub (or a folder that ``datasets`` can load): org/name[:config][@split].

    Raises ValueError where ``datasets`` is not installed or does not find it.
    """

    def __init__(self, source: str, *, render: Render | None) -> None:
        datasets = import_extra("datasets", extra="hrwkv[train]", needed_for="Hugging Face data sets")
        self.source, self.render = source, render
        rest, _, split = source.removeprefix(HUB).partition("@")
        self.path, _, config = rest.partition(":")
        try:
            self.builder = datasets.load_dataset_builder(self.path, config or None)
            self.data = self.builder.as_streaming_dataset(split=split or "train")
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"text source {source!r} cannot be opened by datasets: {reason}") from error
        self.names = [f"{source}#{index}" for index in range(self.data.num_shards)]

    def fingerprint(self) -> list[Any]:
        """The builder's hash: it covers the revision or the files."""
        return [self.source, self.builder.hash]

    def read(self, index: int, start: int) -> Iterator[Record]:
        """Yield the records of shard `index` from number `start` on, the faulty ones too."""
        name, shard = self.names[index], self.data.shard(num_shards=len(self.names), index=index)
        rows = enumerate(shard.skip(start), start=start)
        return _until_damage((_record(row, name, number, self.render) for number, row in rows), name, start)


Shards = FileShards | HubShards


def is_sharded(source: str) -> bool:
    """True for what ``open_shards`` reads: record files, patterns, URLs, data sets; not folders."""
    return (
        source.startswith(HUB) or not _is_plain(source) or "://" in source or source.endswith(RECORD_SUFFIXES)
    )


def open_shards(source: str, *, render: Render | None) -> Shards:
    """The shards of a source. render: chat ``messages`` to text, None where the teacher has no template."""
    return (HubShards if source.startswith(HUB) else FileShards)(source, render=render)


def import_extra(module: str, *, extra: str, needed_for: str) -> Any:
    """Import an optional package. Raises ValueError that names what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ValueError(
            f"{needed_for} need {package}, which is not installed: pip install '{extra}'"
        ) from error


def _is_plain(source: str) -> bool:
    return not any(mark in source for mark in "*?[") or Path(source).exists()


def _compression(name: str) -> str | None:
    return {".gz": "gzip", ".zst": "zstd"}.get(Path(name).suffix)


def _zstd_errors(name: str) -> tuple[type[Exception], ...]:
    return (importlib.import_module("zstandard").ZstdError,) if name.endswith(".zst") else ()


def _until_damage(records: Iterator[Record], name: str, start: int) -> Iterator[Record]:
    """Yield records; where the file is broken, a last one with the fault."""
    number = start
    broken: tuple[type[Exception], ...] = (EOFError, OSError, ValueError, zlib.error, *_zstd_errors(name))
    try:
        for record in records:
            number = record.number + 1
            yield record
    except broken as error:
        if not _is_damage(error):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        fault = f"{name} cannot be read from record {number + 1} on: {reason}"
        yield Record(name, number, fault=fault, ends_shard=True)


def _is_damage(error: Exception) -> bool:
    """Tell a broken file from a broken disk, network or permission, which no share excuses."""
    if isinstance(error, ConnectionError | TimeoutError | FileNotFoundError | PermissionError):
        return False
    return not isinstance(error, OSError) or error.errno is None


def _read_text(file: BinaryIO, name: str, start: int, render: Render | None) -> Iterator[Record]:
    if start:
        return
    data, key = file.read(), name.rsplit("/", 1)[-1]
    try:
        yield Record(name, 0, text=data.decode("utf-8").removeprefix("\ufeff"), key=key)
    except UnicodeDecodeError as error:
        yield Record(name, 0, fault=_not_utf8(name, data, error, offset=0))


def _read_jsonl(file: BinaryIO, name: str, start: int, render: Render | None) -> Iterator[Record]:
    offset = 0
    for number, line in enumerate(file):
        if number >= start and line.strip():
            try:
                yield _record(json.loads(line.decode("utf-8")), name, number, render)
            except UnicodeDecodeError as error:
                yield Record(name, number, fault=_not_utf8(name, line, error, offset=offset))
            except json.JSONDecodeError as error:
                reason = f"line {number + 1} is not JSON ({error.msg}): expected an object with a text field"
                yield Record(name, number, fault=f"{name} {reason}")
        offset += len(line)


def _read_parquet(file: BinaryIO, name: str, start: int, render: Render | None) -> Iterator[Record]:
    from pyarrow import parquet

    table = parquet.ParquetFile(file)
    columns = [column for column in ("text", "messages") if column in table.schema_arrow.names]
    if not columns:
        raise ValueError(f"it has no column text or messages, only {', '.join(table.schema_arrow.names)}")
    number = 0
    for group in range(table.num_row_groups):
        rows = table.metadata.row_group(group).num_rows
        if number + rows <= start:
            number += rows
            continue
        for batch in table.iter_batches(row_groups=[group], columns=columns, batch_size=256):
            for row in batch.to_pylist():
                if number >= start:
                    yield _record(row, name, number, render)
                number += 1


def _record(row: Any, name: str, number: int, render: Render | None) -> Record:
    try:
        text = _text(row, render)
    except (ValueError, jinja2.TemplateError) as error:
        return Record(name, number, fault=f"{name} line {number + 1} {' '.join(str(error).split())}")
    return Record(name, number, text=text, key=text)


def _text(row: Any, render: Render | None) -> str:
    """A record's text, its chat rendered; the ValueError goes on after the record's name."""
    text = row.get("text") if isinstance(row, dict) else None
    messages = row.get("messages") if isinstance(row, dict) and text is None else None
    if messages is not None:
        good = isinstance(messages, list) and all(
            isinstance(one, dict) and {"role", "content"} <= one.keys() for one in messages
        )
        if not good:
            raise ValueError("has messages of another form: expected objects with role and content")
        if render is None:
            raise ValueError("holds chat messages, and the teacher has no chat template to render them")
        text = render(messages)
    if not isinstance(text, str):
        raise ValueError('has no text: expected an object like {"text": "..."} or {"messages": [...]}')
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("holds half a surrogate pair (\\ud800 to \\udfff): remove it")
    return text


def _not_utf8(name: str, data: bytes, error: UnicodeDecodeError, *, offset: int) -> str:
    place = f"byte {data[error.start]:#04x} at offset {offset + error.start}"
    return f"text file {name} is not UTF-8: {place}; convert it to UTF-8"
