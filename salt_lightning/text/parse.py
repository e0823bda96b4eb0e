"""Rows as read -> documents: text, or for fine-tuning a conversation, with the name of its source.

This runs in the worker processes; one process reads for them (documents.py).
"""

import hashlib
import json
from codecs import BOM_UTF8
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from salt_lightning.errors import ConfigError, few, first_line, printable
from salt_lightning.text.documents import Corpus, Raw, check_columns, utf8

_TOKEN_IDS = {".bin", ".idx", ".npy", ".npz"}  # of Megatron and nanoGPT


class BadLine(ConfigError):
    """A line of a file that does not hold a valid document; `place` says where and why, without a remedy."""

    def __init__(self, message: str, place: str = "") -> None:
        super().__init__(message)
        self.place = printable(place)  # it will be in a line of the log


@dataclass
class Skipped:
    """Bad lines that were left out: how many, and where the first is."""

    lines: int = 0
    first: str = ""

    def add(self, other: "Skipped") -> None:
        self.lines, self.first = self.lines + other.lines, self.first or other.first

    def __str__(self) -> str:
        more = "s" if self.lines > 1 else ""
        return f"{self.lines} bad line{more} left out (--data.bad_lines skip), first {self.first}"


def documents(
    raw: Raw, corpus: Corpus, take: Callable[[Any], Any] = lambda content: content
) -> tuple[list[tuple[Any, str]], Skipped]:
    """(text, source name) of every row with text, and what was skipped; empty rows (null, blank) are left out.

    For examples, the conversation (examples.py) takes the place of the text. `take` converts it; None leaves it out.

    Raises:
        BadLine: bytes are not UTF-8, a text file is full of NULs, a line is not a JSON object or lacks a column, a text
            is not a string, the examples' templates cannot write the fields, or the chat template or `take` refuses a
            conversation; not raised if the corpus skips bad lines.
        ConfigError: the same for a text or fields in a table.
    """
    kept, skipped = [], Skipped()
    for row in range(len(raw.rows)):
        try:
            content, source = _parse(raw, row, corpus)
            if content and not (isinstance(content, str) and content.isspace()):
                taken = _taken(take, content, raw, row)
                if taken is not None:
                    kept.append((taken, utf8(source).decode()))
        except BadLine as error:
            if not corpus.skip_bad_lines:
                raise
            skipped.add(Skipped(1, error.place))
    return kept, skipped


def _name(source: Any) -> str:
    """A row's source as one line, for tags and tables."""
    return "(none)" if source is None else " ".join(str(source).split()) or "(none)"


def _taken(take: Callable[[Any], Any], content: Any, raw: Raw, row: int) -> Any:
    try:
        return take(content)
    except ConfigError as error:
        where = _place(raw, row) if raw.places else f"{raw.name}: {str(content)[:60]!r} ..."
        raise _refused(f"{error}; {where}") from error


def _parse(raw: Raw, row: int, corpus: Corpus) -> tuple[Any, str]:
    """Content and source of a row."""
    data = raw.rows[row]
    if raw.kind in ("parquet", "hub"):
        values = list(data.values()) if isinstance(data, dict) else [data]
        if not all(map(_is_utf8, [*values, *raw.sources[row : row + 1]])):
            remedy = "fix that row, leave the file out with a narrower glob"
            raise _bad_line(corpus, _place(raw, row), "is not UTF-8 text", remedy)
        source = _name(raw.sources[row]) if raw.sources else raw.name
        return _checked(data, corpus, _place(raw, row), of_table=True), source
    if data.startswith(BOM_UTF8) and raw.place(row)[1] == 1:  # a file mark of Windows, not text
        data = data.removeprefix(BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        problem, lines_on = "is not UTF-8 text", data.count(b"\n", 0, error.start)
        remedy = "convert the file, leave it out with a narrower glob"
        if Path(raw.place(row)[0]).suffix in _TOKEN_IDS:
            remedy = (
                "if it holds token ids, give the text that they were made of, else leave it out with a narrower glob"
            )
        raise _bad_line(corpus, _place(raw, row, lines_on), problem, remedy) from error
    if raw.kind == "text":
        if data.count(b"\0") * 10 > len(data):  # UTF-16 without a mark is valid UTF-8, too
            problem = "has a NUL in more than 1 of 10 bytes, as UTF-16 has"
            remedy = "convert the file to UTF-8, leave it out with a narrower glob"
            raise _bad_line(corpus, raw.place(row)[0], problem, remedy)
        return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text, raw.name
    if not text.strip():
        return None, raw.name
    of_array = " (jq -c '.[]' converts an array)" if text.lstrip().startswith("[") else ""
    remedy = f"write one object per line{of_array}"
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        problem = f"is not JSON ({getattr(error, 'msg', first_line(error))})"
        raise _bad_line(corpus, _place(raw, row), problem, remedy) from error
    if not isinstance(fields, dict):
        problem = f"is not a JSON object but {text[:40].strip()!r}"
        raise _bad_line(corpus, _place(raw, row), problem, remedy)
    if corpus.examples.tools:  # a line may lack this column
        fields = {corpus.examples.tools: None, **fields}
    try:
        check_columns(corpus, list(fields), _place(raw, row))
        source = _name(fields[corpus.source_column]) if corpus.source_column else raw.name
        return _checked(corpus.content(fields), corpus, _place(raw, row)), source
    except ConfigError as error:
        raise _refused(str(error)) from None


def _checked(content: Any, corpus: Corpus, where: str, of_table: bool = False) -> Any:
    """A row's text, or the conversation that the fields of an example make."""
    if corpus.examples.given:
        try:
            return corpus.examples.conversation(content, of_table)
        except ConfigError as error:
            raise ConfigError(f"{error}; {where}") from error
    if content is not None and not isinstance(content, str):
        raise ConfigError(
            f"--data.text_column: {corpus.text_column!r} of {where} holds {type(content).__name__}, not text; name a "
            "column with text"
        )
    return content


def _place(raw: Raw, row: int, lines_on: int = 0) -> str:
    if not raw.places:  # from the hub
        return raw.name
    file, line = raw.place(row)
    return f"{file}: {'row' if raw.kind == 'parquet' else 'line'} {line + lines_on}"


def _is_utf8(value: Any) -> bool:
    try:
        return not isinstance(value, bytes) or bool(value.decode() or True)
    except UnicodeDecodeError:
        return False


def _refused(said: str) -> BadLine:
    return BadLine(f"{said}; use --data.bad_lines skip to leave such lines out", said)


def _bad_line(corpus: Corpus, place: str, problem: str, remedy: str) -> BadLine:
    message = f"{corpus.setting}: {place} {problem}; {remedy}, or use --data.bad_lines skip to leave such lines out"
    return BadLine(message, f"{place} {problem}")


def lots(data: bytes) -> tuple[float, float]:
    """Two numbers in [0, 1) that depend only on the text: one for its split (duplicates share it), one for sampling."""
    hashed = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), "<u8")
    return float(hashed[0] >> np.uint64(11)) / 2**53, float(hashed[1] >> np.uint64(11)) / 2**53


def empty_error(corpus: Corpus, skipped: Skipped) -> ConfigError:
    """The error for a corpus without text."""
    names = few([*corpus.read().values()])
    of_columns = " and --data.text_column" if any(group.kind != "text" for group in corpus.groups) else ""
    why = f": {skipped}" if skipped.lines else f"; check the files{of_columns}"
    if corpus.examples.given and not skipped.lines:
        where = "(in a conversation: from the role assistant, after a question)"
        why = f"; an example needs a response that is not blank {where}"
    return ConfigError(f"{corpus.setting}: no document with text in {names}{why}")
