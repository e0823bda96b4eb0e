"""Where text comes from: files, folders, globs and hub data sets -> documents, in one fixed order.

    source (as typed)  ->  groups of files of one kind           resolve()       sources.py
    Corpus of groups   ->  Raw: a handful of rows, unparsed      read_raw()      one process
    Raw                ->  (text, source) pairs                  documents()     the worker processes, parse.py
                           or (conversation, source)             for fine-tuning

Memory stays constant. One process reads, and does so little else that it keeps many workers busy: they decode and
parse. `datasets` reads hub data sets in streaming mode, so it writes no Arrow files and runs none of their code. Files
are read here: `datasets` takes 10 times as long for plain lines, and reports neither the line nor the progress.
"""

import bisect
import gc
import hashlib
import os
from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from multiprocessing import parent_process
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq
from huggingface_hub import dataset_info
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from salt_lightning.errors import ConfigError, first_line
from salt_lightning.text.examples import Examples
from salt_lightning.text.packed import misnamed, unpacked
from salt_lightning.text.sources import Group, hub_error

_RAW_CHARS = 1 << 19  # text per worker task: long enough to hide the pickling, short enough for even progress
_MAX_BYTES = 1 << 30  # largest document in a file
_FIRST_BYTES = 1 << 20  # a longer line is not looked at beforehand
_BEGINNING_BYTES = 1 << 16  # of a text file
MAX_SOURCES = 1000  # each has its own losses
_OF_TOKENS = {"input_ids", "attention_mask", "token_type_ids", "labels", "length", "tokens"}  # columns' names
_OF_INDEX = {"chunks", "shards"}  # of litdata's and MosaicML's index.json
_OF_EXAMPLES = {"messages", "conversations", "completion", "response", "instruction"}
_TABLE_ROWS = 100  # read at once from parquet and the hub, where a row may be a whole book


@dataclass(frozen=True)
class Corpus:
    """The documents of one source setting, in a fixed order.

    Raises:
        ConfigError: it has too many sources; those of a `source_column` are known only when they are read.
    """

    setting: str  # as typed, for messages: "--data.source"
    groups: tuple[Group, ...]
    text_column: str | list[str] = "text"  # a list: of each row the first that is there and not null
    source_column: str | None = None
    skip_bad_lines: bool = False
    examples: Examples = Examples()  # noqa: RUF009 (frozen)

    def __post_init__(self) -> None:
        names = {group.name for group in self.groups}
        if self.source_column is None and len(names) > MAX_SOURCES:
            raise ConfigError(
                f"{self.setting}: {len(names)} sources, more than {MAX_SOURCES} (each entry is one; with "
                "--data.source_per_file, each file); give a folder or a glob, without --data.source_per_file"
            )

    def inputs(self) -> list[Any]:
        """Everything that determines the documents, as plain data (part of the cache's fingerprint)."""
        groups = [group.inputs() for group in self.groups]
        return [self.text_column, self.source_column, groups, self.skip_bad_lines, self.examples.inputs()]

    def read(self) -> dict[Any, str]:
        """What it reads, as `Group.read`, in its order."""
        return {key: name for group in self.groups for key, name in group.read().items()}

    def shared_with(self, other: "Corpus") -> list[str]:
        """Files and hub splits that both corpora read."""
        here, there = self.read(), other.read()
        return sorted(here[key] for key in here.keys() & there.keys())

    def num_bytes(self) -> int:
        """Size on disk; hub data sets count as 0."""
        return sum(stamp[0] for stamp in self.stamps().values() if stamp)

    def reads_hub(self) -> bool:
        """Whether some text is on the hub, where it may change or be unreachable without a trace in `inputs`."""
        return any(group.kind == "hub" for group in self.groups)

    def stamps(self) -> dict[str, tuple[int, int] | None]:
        """File -> its size and modification time, None if it is gone; another stamp means other content."""
        found = {}
        for file in (file for group in self.groups for file in group.files):
            stat = os.stat(file) if os.path.exists(file) else None
            found[file] = (stat.st_size, stat.st_mtime_ns) if stat else None
        return found

    @property
    def text_columns(self) -> list[str]:
        return [self.text_column] if isinstance(self.text_column, str) else self.text_column

    def columns(self, found: Container[str]) -> dict[str, str]:
        """Column to read, of those `found` -> the setting that names it."""
        there = [name for name in self.text_columns if name in found] or [" or ".join(self.text_columns)]
        own = self.examples.columns() if self.examples.given else dict.fromkeys(there, "text_column")
        return {**({self.source_column: "source_column"} if self.source_column else {}), **own}

    def content(self, fields: dict[str, Any]) -> Any:
        """A row's content: a text, or the fields of an example."""
        if self.examples.given:
            return {column: fields[column] for column in self.examples.columns()}
        texts = (fields.get(column) for column in self.text_columns)
        return next((text for text in texts if text is not None), None)


@dataclass
class Raw:
    """Rows as read: bytes still to be decoded and parsed (files), or texts (tables)."""

    name: str  # of the source
    kind: str  # see Group
    rows: list[Any] = field(default_factory=list)  # files: bytes; tables: texts, or the fields of examples
    sources: list[Any] = field(default_factory=list)  # only for tables with a source column
    places: list[tuple[int, str, int]] = field(default_factory=list)  # from row i on: file, line or row number there
    size: int = 0  # of the rows, in bytes or characters
    read_bytes: int = 0  # of the corpus's files, up to here

    def extend(self, more: "Raw") -> None:
        self.places += [(len(self.rows), file, line) for _, file, line in more.places]
        self.rows += more.rows
        self.sources += more.sources
        self.size += more.size
        self.read_bytes = more.read_bytes

    def place(self, row: int) -> tuple[str, int]:
        """File and line (or row) that a row was read from."""
        first, file, line = self.places[bisect.bisect(self.places, row, key=lambda place: place[0]) - 1]
        return file, line + row - first

    def digest(self) -> bytes:
        """Hash of the rows."""
        values = [value if isinstance(value, bytes) else utf8(str(value)) for value in [*self.rows, *self.sources]]
        return hashlib.blake2b(b"\0".join(values), digest_size=16).digest()


def read_raw(corpus: Corpus) -> Iterator[Raw]:
    """Read a corpus in order, about half a million characters at a time.

    Raises:
        ConfigError: a file cannot be read, a column is missing, or the hub cannot be reached.
    """
    bytes_before = read_bytes = 0
    for group in corpus.groups:
        raw = Raw(group.name, group.kind)
        for piece in _read_hub(group, corpus) if group.kind == "hub" else _read_files(group, corpus):
            piece.read_bytes = read_bytes = bytes_before + piece.read_bytes
            raw.extend(piece)
            if raw.size >= _RAW_CHARS:
                yield raw
                raw = Raw(group.name, group.kind)
        if raw.rows:
            yield raw
        bytes_before = read_bytes


def _read_files(group: Group, corpus: Corpus) -> Iterator[Raw]:
    bytes_before = 0
    for file in group.files:
        read = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_parquet}[group.kind]
        with _file_errors(file, corpus):
            for piece in read(file, group, corpus):
                piece.read_bytes += bytes_before
                yield piece
            bytes_before += os.path.getsize(file)


@contextmanager
def _file_errors(file: str, corpus: Corpus) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        hint = "grant access" if isinstance(error, PermissionError) else "get a whole copy of it"
        hint = "pip install backports.zstd" if isinstance(error, ImportError) else hint
        if suffix := misnamed(file):
            hint = f"its first bytes are not those of a {suffix} file; rename it to what it is"
        raise ConfigError(
            f"{corpus.setting}: {file}: cannot be read ({first_line(error)}); {hint}, or leave it out of "
            f"{corpus.setting}"
        ) from error


def _read_text(file: str, group: Group, corpus: Corpus) -> Iterator[Raw]:
    with _open(file) as (content, disk):
        data = content.read(_MAX_BYTES + 1)
        _check_size(data, file, 1, corpus.setting)
        yield Raw(group.name, group.kind, [data], [], [(0, file, 1)], len(data), disk.tell())


def _read_lines(file: str, group: Group, corpus: Corpus) -> Iterator[Raw]:
    line = 1
    with _open(file) as (content, disk):
        lines: list[bytes] = []
        size = 0
        while data := content.readline(_MAX_BYTES + 1):
            _check_size(data, file, line + len(lines), corpus.setting)
            lines.append(data)
            size += len(data)
            if size >= _RAW_CHARS:
                yield Raw(group.name, group.kind, lines, [], [(0, file, line)], size, disk.tell())
                line, lines, size = line + len(lines), [], 0
        yield Raw(group.name, group.kind, lines, [], [(0, file, line)], size, disk.tell())


def _check_size(data: bytes, file: str, line: int, setting: str) -> None:
    """Refuse a document that is too long: a few compressed megabytes can unpack to a line larger than memory."""
    if len(data) > _MAX_BYTES:
        raise ConfigError(
            f"{setting}: {file}: the document from line {line} is longer than {_MAX_BYTES >> 20} MiB; split it "
            "into documents (docs/own-data.md)"
        )


@contextmanager
def _open(file: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The unpacked content, and the file itself, whose position shows the progress."""
    with open(file, "rb") as disk, unpacked(disk, Path(file).suffix.lower()) as content:
        yield content, disk


def _read_parquet(file: str, group: Group, corpus: Corpus) -> Iterator[Raw]:
    table, num_read = pq.ParquetFile(file, buffer_size=1 << 20), 0  # buffered: never a whole column chunk in memory
    check_columns(corpus, table.schema_arrow.names, file)
    for batch in table.iter_batches(_TABLE_ROWS, columns=list(corpus.columns(table.schema_arrow.names))):
        columns = {name: _values(batch[name]) for name in batch.schema.names}
        place, num_read = (0, file, num_read + 1), num_read + len(batch)
        read_bytes = os.path.getsize(file) * num_read // table.metadata.num_rows
        yield _of_table(group, corpus, columns, read_bytes, [place])


def _values(column: Any) -> list[Any]:
    """The values of a column; one with text that is not UTF-8, at any depth, becomes the bytes of that text."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return list(map(_value, column))


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object


def look_into(corpus: Corpus) -> None:
    """Open the hub data sets, and every parquet file (a millisecond each), without reading rows.

    Raises:
        ConfigError: as `read_raw`, for what can be seen without reading.
    """
    for group in corpus.groups:
        if group.kind == "hub":
            open_hub(group, corpus)
        for file in group.files if group.kind == "parquet" else ():
            with _file_errors(file, corpus):
                check_columns(corpus, pq.read_schema(file).names, file)


def first_lines(corpus: Corpus) -> Iterator[Raw]:
    """The first line of every jsonl file, unless it is long; the first lines of every text file, or all of a short one.

    Raises:
        ConfigError: a file cannot be read.
    """
    for group in corpus.groups:
        for file in group.files if group.kind in ("text", "jsonl") else ():
            with _file_errors(file, corpus), _open(file) as (content, _):
                start = content.read(_BEGINNING_BYTES) if group.kind == "text" else b""
                line = content.readline(_FIRST_BYTES)  # to its end: a character may be cut in two
            if len(line) < _FIRST_BYTES:
                yield Raw(group.name, group.kind, [start + line], [], [(0, file, 1)])


def open_hub(group: Group, corpus: Corpus) -> Any:
    """The rows of a hub data set, of which none may have been downloaded yet.

    Raises:
        ConfigError: it does not exist, lacks a column, or the hub cannot be reached.
    """
    hub = group.hub
    with _hub_errors(group, corpus):
        import datasets  # here, because it takes half a second

        revision = commit(group.hub_name, hub.revision)
        builder = datasets.load_dataset_builder(group.hub_name, hub.subset, revision=revision)
        if hasattr(builder.config, "sample_by"):  # of .txt: a file is a document, as it is for files here
            builder.config.sample_by = "document"
        if hasattr(builder.config, "converters"):  # of .csv: 007 and NA stay what they are
            as_text = dict.fromkeys(corpus.columns(corpus.text_columns), str)
            builder.config.converters, builder.config.keep_default_na = as_text, False
        split, first, end = hub.rows()
        stream = builder.as_streaming_dataset(split=split)
        found = stream.column_names or list(next(iter(stream), {}))
        check_columns(corpus, found, group.hub_name)
        stream = stream.select_columns(list(corpus.columns(found))).skip(first)
        return stream if end is None else stream.take(max(end - first, 0))


@cache
def commit(name: str, revision: str | None) -> str | None:
    """The commit to read, so that a branch that moves does not mix texts; the revision if the hub does not tell."""
    try:
        commit = str(dataset_info(name, revision=revision).sha)
    except Exception:  # of many kinds; reading says what is wrong
        return revision
    if parent_process() is None:
        rank_zero_info(f"data set {name}: commit {commit}")
    return commit


def _read_hub(group: Group, corpus: Corpus) -> Iterator[Raw]:
    stream = open_hub(group, corpus)
    with _hub_errors(group, corpus):
        for batch in stream.iter(_TABLE_ROWS):
            yield _of_table(group, corpus, batch, 0, [])
        gc.collect()  # behind a slice, the stream still reads ahead in threads, which would abort a process that ends


@contextmanager
def _hub_errors(group: Group, corpus: Corpus) -> Iterator[None]:
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        unknown = isinstance(error, FileNotFoundError | ConnectionError)
        hint = "; it is not a local file, folder or glob match either" if unknown else ""
        raise ConfigError(f"{corpus.setting}: cannot read {group.hub_name}: {hub_error(error)}{hint}") from error


def _of_table(
    group: Group, corpus: Corpus, batch: dict[str, list[Any]], read_bytes: int, places: list[tuple[int, str, int]]
) -> Raw:
    rows = [corpus.content(dict(zip(batch, values, strict=True))) for values in zip(*batch.values(), strict=True)]
    sources = batch[corpus.source_column] if corpus.source_column else []
    return Raw(group.name, group.kind, rows, sources, places, sum(map(_size, rows)), read_bytes)


def _size(row: Any) -> int:
    return 1 if row is None else len(str(row))


def check_columns(corpus: Corpus, found: list[str], where: str) -> None:
    columns, examples = corpus.columns(found), corpus.examples
    if examples.chat_column and examples.tools != "" and "tools" in found and "tools" not in columns:
        raise ConfigError(
            f"--data.examples.tools: {where} has a column 'tools', which the chat template may write; set "
            "--data.examples.tools tools to read it, or --data.examples.tools '' to ignore it"
        )
    for column, setting in columns.items():
        if column not in found:
            raise ConfigError(
                f"--data.{setting}: no column {column!r} in {where}; there are: {', '.join(found)}"
                + (_of_what(found) if setting == "text_column" else "")
            )
        if found.count(column) > 1:
            raise ConfigError(f"--data.{setting}: {where} has several columns named {column!r}; rename one")


def _of_what(found: list[str]) -> str:
    """What a row without the text column seems to be."""
    if _OF_TOKENS.issuperset(found) or _OF_INDEX.intersection(found):
        return " (these are token ids, of which only the text can be read)"
    if _OF_EXAMPLES.intersection(found):
        return "; for fine-tuning, --data.examples names the columns instead (docs/fine-tuning.md)"
    return ""


# --- shared by all readers of text ---


def utf8(text: str) -> bytes:
    """The text as UTF-8. Half a surrogate pair, which is valid in JSON but not in UTF-8, becomes '?'."""
    return text.encode("utf-8", errors="replace")
