"""Where text comes from: files, folders, globs and hub data sets -> documents, in one fixed order.

    source (as typed)  ->  Corpus: groups of files of one kind   resolve()
    Corpus             ->  Raw: a handful of rows, unparsed      read_raw()      one process
    Raw                ->  (text, source) pairs                  documents()     the worker processes

Everything is read through `datasets` in streaming mode: compression and hub access are its business, no
copy in Arrow files is made, memory stays constant, and no code from a data set is run.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import pyarrow.parquet as pq
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from salt_lightning.errors import ConfigError

_KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_COMPRESSIONS = {".gz", ".zst", ".xz", ".bz2"}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_RAW_CHARS = 1 << 19  # text per task of a worker: long enough to hide the pickling, short enough for even progress


@dataclass(frozen=True)
class Hub:
    """Which part of a hub data set (or of a local folder laid out like one) is read."""

    split: str = "train"
    subset: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Group:
    """Files of one kind, or one hub data set (no files): read by one reader, under one source name."""

    name: str
    kind: str  # "text" (a file is a document) | "jsonl" (a line is one) | "parquet" (a row is one) | "hub"
    files: tuple[str, ...] = ()
    hub_name: str = ""
    hub: Hub = Hub()

    def inputs(self) -> list[Any]:
        """All that decides what this group reads, as plain data: file stamps, or the hub's coordinates."""
        if self.kind == "hub":
            return [self.name, self.hub_name, self.hub.split, self.hub.subset, self.hub.revision]
        stats = [(file, os.stat(file)) for file in self.files]
        return [self.name, self.kind, [[file, stat.st_size, stat.st_mtime_ns] for file, stat in stats]]


@dataclass(frozen=True)
class Corpus:
    """The documents of one source setting, in a fixed order."""

    setting: str  # as typed, for messages: "--data.source"
    groups: tuple[Group, ...]
    text_column: str = "text"
    source_column: str | None = None

    def inputs(self) -> list[Any]:
        """All that decides the documents, as plain data (part of the cache's fingerprint)."""
        return [self.text_column, self.source_column, [group.inputs() for group in self.groups]]

    def num_bytes(self) -> int:
        """Size on disk; the hub counts 0."""
        return sum(os.path.getsize(file) for group in self.groups for file in group.files)


@dataclass(frozen=True)
class Raw:
    """Rows as read: lines of JSON still to be parsed, or texts with their sources."""

    name: str
    rows: list[Any]
    sources: list[Any] | None = None
    is_json: bool = False


# --- source -> groups ---


def resolve(setting: str, entries: list[str], hub: Hub) -> tuple[Group, ...]:
    """Find what each entry of a source setting names.

    Raises:
        ConfigError: an entry is neither file, folder, glob with a match, nor a possible hub name.
    """
    names = [_source_name(entry) for entry in entries]
    groups: list[Group] = []
    for entry, name in zip(entries, names, strict=True):
        groups += _resolve_one(setting, entry, name if names.count(name) == 1 else entry, hub)
    return tuple(groups)


def _resolve_one(setting: str, entry: str, name: str, hub: Hub) -> list[Group]:
    path = os.path.abspath(os.path.expanduser(entry))
    if os.path.isdir(path):
        files = _folder_files(setting, path, hub)
    elif os.path.isfile(path):
        files = [path]
    else:
        files = sorted(file for file in glob.glob(path, recursive=True) if os.path.isfile(file))
    if files:
        of_kind: dict[str, list[str]] = {"text": [], "jsonl": [], "parquet": []}
        for file in files:
            if os.path.getsize(file):  # the readers stumble over empty files
                of_kind[_kind(file)].append(file)
        return [Group(name, kind, tuple(found)) for kind, found in of_kind.items() if found]
    if _HUB_NAME.fullmatch(entry) and Path(entry).suffix not in {
        ".txt",
        ".md",
        ".py",
        *_KINDS,
        *_COMPRESSIONS,
    }:
        return [Group(name, "hub", hub_name=entry, hub=hub)]
    raise ConfigError(
        f"{setting}: {entry!r} matches no file; give a file, a folder, a glob such as 'books/**/*.txt', "
        "or a hub data set 'owner/name'"
    )


def _folder_files(setting: str, folder: str, hub: Hub) -> list[str]:
    """Every visible file; of a folder with jsonl or parquet in it only these, of one split as on the hub."""
    found = [
        os.path.join(root, file)
        for root, _, files in os.walk(folder)
        if not any(part.startswith((".", "__")) for part in Path(root).relative_to(folder).parts)
        for file in files
        if not file.startswith(".")
    ]
    if all(_kind(file) == "text" for file in found):
        return sorted(found)
    try:
        splits: dict = datasets.load_dataset_builder(folder, hub.subset).config.data_files or {}
    except Exception as error:
        raise ConfigError(f"{setting}: cannot read the folder {folder!r}: {first_line(error)}") from error
    if hub.split not in splits:
        raise ConfigError(f"--data.split: no {hub.split!r} in {folder!r}; there are: {', '.join(map(str, splits))}")
    read = sorted(splits[hub.split])
    if left := sorted(set(found) - set(map(os.path.abspath, read))):
        _say_once(
            f"{setting}: of {folder} split {hub.split}, {len(read)} of {len(found)} files are read; left out: "
            f"{', '.join(os.path.relpath(file, folder) for file in left[:3])}{' ...' if len(left) > 3 else ''}"
        )
    return read


@cache
def _say_once(message: str) -> None:
    rank_zero_info(message)


def _kind(file: str) -> str:
    path = Path(file)
    suffix = Path(path.stem).suffix if path.suffix.lower() in _COMPRESSIONS else path.suffix
    return _KINDS.get(suffix.lower(), "text")


def _source_name(entry: str) -> str:
    """Short name for logs: the last part of a path that is no pattern, a file's without its suffixes."""
    path = os.path.abspath(os.path.expanduser(entry))
    parts = [part for part in path.split(os.sep) if part and not glob.has_magic(part)]
    last = parts[-1] if parts else entry
    return last.split(".")[0] or last if os.path.isfile(path) else last


# --- groups -> rows ---


def read_raw(corpus: Corpus) -> Iterator[Raw]:
    """Read a corpus in order, about half a million characters at a time.

    Raises:
        ConfigError: unreadable or undecodable file (named), unknown column, hub out of reach.
    """
    for group in corpus.groups:
        try:
            yield from _read_group(group, corpus.text_column, corpus.source_column)
        except ConfigError:
            raise
        except Exception as error:
            raise reading_error(error, corpus) from error


def _read_group(group: Group, text_column: str, source_column: str | None) -> Iterator[Raw]:
    is_table = group.kind in ("parquet", "hub")
    rows: list[Any] = []
    sources: list[Any] | None = [] if is_table and source_column else None
    chars = 0
    for row in _open_group(group, text_column, source_column):
        rows.append(row[text_column if is_table else "text"])
        if sources is not None:
            sources.append(row[source_column])
        chars += len(rows[-1]) if isinstance(rows[-1], str) else 1
        if chars >= _RAW_CHARS:
            yield Raw(group.name, rows, sources, group.kind == "jsonl")
            rows, sources, chars = [], None if sources is None else [], 0
    if rows:
        yield Raw(group.name, rows, sources, group.kind == "jsonl")


def _open_group(group: Group, text_column: str, source_column: str | None) -> Any:
    """The streaming `datasets` object of a group.

    Lines of JSON come as text, and the workers parse them: fields may then differ from line to line.
    """
    columns = [text_column] + ([source_column] if source_column else [])
    if group.kind == "hub":
        hub = group.hub
        stream = datasets.load_dataset(
            group.hub_name, hub.subset, split=hub.split, revision=hub.revision, streaming=True
        )
        _check_columns(columns, stream.column_names or list(next(iter(stream), {})), group.hub_name)
        return stream.select_columns(columns)
    reader, options = "text", {"sample_by": "document" if group.kind == "text" else "line"}
    if group.kind == "parquet":
        _check_columns(columns, pq.read_schema(group.files[0]).names, group.files[0])
        reader, options = "parquet", {"columns": columns}  # type: ignore[dict-item]
    files = [glob.escape(file) for file in group.files]  # `datasets` takes brackets in a name for a pattern
    return datasets.load_dataset(reader, data_files={"train": files}, split="train", streaming=True, **options)


def _check_columns(columns: list[str], found: list[str], where: str) -> None:
    for setting, column in zip(("text_column", "source_column"), columns, strict=False):
        if column not in found:
            raise ConfigError(f"--data.{setting}: no column {column!r} in {where}; there are: {', '.join(found)}")


# --- rows -> documents ---


def documents(raw: Raw, text_column: str, source_column: str | None) -> list[tuple[str, str]]:
    """(text, source name) of every row with text in it; empty rows (null, blank) are left out.

    Raises:
        json.JSONDecodeError: a line is not JSON (`reading_error` finds the file).
        ConfigError: a line is no object or lacks a column, or a text is no string.
    """
    pairs = zip(raw.rows, raw.sources or [raw.name] * len(raw.rows), strict=True)
    if raw.is_json:
        columns = [text_column] + ([source_column] if source_column else [])
        pairs = (_parse(line, columns, raw.name) for line in raw.rows if line.strip())  # type: ignore[assignment]
    kept = []
    for text, source in pairs:
        if text is not None and not isinstance(text, str):
            raise ConfigError(
                f"--data.text_column: {text_column!r} of {raw.name} holds {type(text).__name__}, not text"
            )
        if text and not text.isspace():
            kept.append((text, str(source)))
    return kept


def _parse(line: str, columns: list[str], name: str) -> tuple[Any, Any]:
    fields = json.loads(line)
    if not isinstance(fields, dict):
        raise ConfigError(f"--data.source: {name}: {line[:40]!r} is no JSON object; write one object a line")
    _check_columns(columns, list(fields), name)
    return fields[columns[0]], fields[columns[1]] if columns[1:] else name


def utf8(text: str) -> bytes:
    """The text's bytes. Half a surrogate pair, which JSON may hold and UTF-8 may not, becomes '?'."""
    return text.encode("utf-8", errors="replace")


def lots(data: bytes) -> tuple[float, float]:
    """Two numbers in [0, 1) drawn by a text alone: for its split (so duplicates share it), for sampling."""
    hashed = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), "<u8")
    return float(hashed[0] >> np.uint64(11)) / 2**53, float(hashed[1] >> np.uint64(11)) / 2**53


# --- what went wrong ---


def empty_error(corpus: Corpus) -> ConfigError:
    """No document has text."""
    names = ", ".join(dict.fromkeys(group.name for group in corpus.groups)) or "the files"
    return ConfigError(f"{corpus.setting}: no document with text in {names}; check the files and --data.text_column")


def reading_error(error: Exception, corpus: Corpus) -> ConfigError:
    """One line that names the first bad file (and its line), for an error met anywhere in a corpus."""
    for group in corpus.groups:
        for file in group.files:
            problem = _probe(group.kind, file)
            if problem:
                return ConfigError(f"{corpus.setting}: {file}: {problem}")
    names = ", ".join(group.hub_name or group.name for group in corpus.groups)
    hint = "; it is no local file, folder or glob match either" if any(g.kind == "hub" for g in corpus.groups) else ""
    return ConfigError(f"{corpus.setting}: cannot read {names}: {first_line(error)}{hint}")


def _probe(kind: str, file: str) -> str | None:
    number = 0
    try:
        if kind == "parquet":
            pq.read_metadata(file)
            return None
        with fsspec.open(file, "rb", compression="infer") as lines:
            for number, line in enumerate(lines, start=1):  # noqa: B007 (the except clauses read it)
                text = line.decode("utf-8")
                if kind == "jsonl" and text.strip():
                    json.loads(text)
    except UnicodeDecodeError:
        return f"line {number} is not UTF-8 text; convert the file, or leave it out with a narrower glob"
    except json.JSONDecodeError as error:
        return f"line {number} is not JSON ({error.msg}); write one object a line"
    except Exception as error:
        hint = "; pip install zstandard" if "zstd" in str(error) else ""
        return f"cannot be read ({first_line(error)}){hint}"
    return None


def first_line(error: BaseException) -> str:
    """The error's message, cut to one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
