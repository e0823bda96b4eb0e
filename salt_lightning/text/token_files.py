"""Token files: written in order, opened as memory maps, checked.

    FOLDER/manifest.json     inputs, versions, counts, source names; sizes and checksums of the files, own checksum
    FOLDER/{train,val}/
        tokens.bin           uint16 or uint32   all documents one after the other, each followed by EOS
        doc_ends.bin         int64              exclusive end of each document in tokens.bin
        doc_sources.bin      int32              each document's index into the manifest's source names
        doc_lots.bin         float64            drew its split; equal for equal texts (examples: prompts)
        token_bytes.bin      int32              val only: UTF-8 bytes of text that each token stands for (EOS: 0)
        learned.bin          uint8              examples only: 1 where a token belongs to a response

Checks:

    opening   the manifest's own checksum, the size of each file, and a checksum of 16 pages of 64 KiB spread evenly
              over it (all of a file up to 1 MiB): a truncated, foreign or partly copied file is refused by name
              within milliseconds; a few bytes changed in a large file are not found
    verify()  every byte of every file, about 1 GB a second
"""

import hashlib
import json
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from salt_lightning.errors import ConfigError

FORMAT = 6
SPLITS = ("train", "val")
_PAGE_BYTES, _NUM_PAGES = 1 << 16, 16


def digest(data: Any) -> str:
    """Fingerprint of plain data."""
    return hashlib.blake2b(json.dumps(data, sort_keys=True).encode(), digest_size=10).hexdigest()


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest with its own checksum."""
    return {**manifest, "checksum": digest(manifest)}


def no_counts() -> dict[str, int]:
    return {"documents": 0, "tokens": 0, "text_bytes": 0}


@dataclass
class Block:
    """Some documents of one split, tokenized."""

    ids: np.ndarray  # of all documents, each with EOS
    lengths: np.ndarray  # ids of each document
    sources: list[str]  # of each document
    lots: np.ndarray  # of each document, which drew its split
    token_bytes: np.ndarray | None  # of each id
    text_bytes: int = 0
    learned: np.ndarray | None = None  # of each id, where documents are examples
    num_split: int = 0  # conversations that became several documents
    num_more: int = 0  # their documents after the first
    num_tools: int = 0  # conversations with tools
    spelled: dict[str, int] = field(default_factory=dict)  # marks of an end that the text spells out -> how often


def columns(split: str, dtype: str, examples: bool = False) -> dict[str, tuple[str, str]]:
    """File name -> (dtype, which of the split's counts is its length)."""
    files = {
        "tokens.bin": (dtype, "tokens"),
        "doc_ends.bin": ("int64", "documents"),
        "doc_sources.bin": ("int32", "documents"),
        "doc_lots.bin": ("float64", "documents"),
    }
    if split == "val":
        files["token_bytes.bin"] = ("int32", "tokens")
    if examples:
        files["learned.bin"] = ("uint8", "tokens")
    return files


def sizes(split: str, dtype: str, counts: dict[str, int], examples: bool = False) -> dict[str, int]:
    """File name -> bytes."""
    return {name: np.dtype(kind).itemsize * counts[of] for name, (kind, of) in columns(split, dtype, examples).items()}


class SplitWriter:
    """Appends blocks to the files of one split, after the entries in `counts`; any later entries are cut off.

    `counts` grows with each block.
    """

    def __init__(self, folder: Path, dtype: str, counts: dict[str, int], examples: bool = False) -> None:
        self.counts, self._folder = counts, folder
        folder.mkdir(exist_ok=True)
        self._files = {}
        for name, size in sizes(folder.name, dtype, self.counts, examples).items():
            self._files[name] = file = open(folder / name, "ab")  # noqa: SIM115 (`close` closes them)
            file.truncate(size)

    def add(self, block: Block, source_ids: list[int]) -> None:
        self._files["tokens.bin"].write(block.ids.data)
        self._files["doc_ends.bin"].write((self.counts["tokens"] + np.cumsum(block.lengths, dtype=np.int64)).data)
        self._files["doc_sources.bin"].write(np.array(source_ids, np.int32).data)
        self._files["doc_lots.bin"].write(block.lots.data)
        if block.token_bytes is not None:
            self._files["token_bytes.bin"].write(block.token_bytes.data)
        if block.learned is not None:
            self._files["learned.bin"].write(block.learned.data)
        self.counts["tokens"] += len(block.ids)
        self.counts["documents"] += len(block.lengths)
        self.counts["text_bytes"] += block.text_bytes

    def sync(self) -> None:
        """Flush all that was added to the disk."""
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files.values():
            with suppress(OSError):  # `sync` reports errors of data that must be kept
                file.close()

    def entry(self) -> dict[str, Any]:
        """The split's entry in the manifest, from the files on the disk."""
        files = {name: self._folder / name for name in self._files}
        checked = {
            name: {"bytes": path.stat().st_size, "blake2b": _full_checksum(path), "pages": _page_checksum(path)}
            for name, path in files.items()
        }
        return {**self.counts, "files": checked}


def _full_checksum(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _page_checksum(path: Path) -> str:
    size = path.stat().st_size
    if size <= _PAGE_BYTES * _NUM_PAGES:
        return _full_checksum(path)
    hashed = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        for i in range(_NUM_PAGES):
            file.seek((size - _PAGE_BYTES) * i // (_NUM_PAGES - 1))
            hashed.update(file.read(_PAGE_BYTES))
    return hashed.hexdigest()


def require_readable(folder: Path) -> None:
    """Raises ConfigError if what was prepared, perhaps by another user, may not be read."""
    for closed in (folder.parent, folder):
        # not Path.is_dir, which raises if the folder around it may not be read
        if os.path.isdir(closed) and not os.access(closed, os.R_OK | os.X_OK):
            raise ConfigError(
                f"--data.cache_dir: {closed} may not be read by this user; let its owner run chmod -R a+rX on it, or "
                "choose another folder"
            )


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    require_readable(folder)
    if not path.exists():
        raise ConfigError(
            f"--data.cache_dir: {folder} holds no prepared text: prepare_data() has not run, the sources "
            "have changed since, or the folder is damaged; delete it and start again"
        )
    try:
        manifest = json.loads(path.read_bytes())
        good = manifest.pop("checksum") == digest(manifest)
    except (ValueError, LookupError, AttributeError, TypeError):  # not JSON, or not a manifest
        good = False
    if not good:
        raise _damage(path, "is not as it was written", folder)
    if manifest.get("folder", folder.name) != folder.name:  # a copy under the name of other text
        raise _damage(path, f"belongs to {manifest['folder']}", folder)
    return manifest


def _damage(path: Path, problem: str, folder: Path) -> ConfigError:
    return ConfigError(f"--data.cache_dir: {path} {problem}; delete {folder} to prepare it again")


def verify(folder: Path) -> None:
    """Check every byte of a prepared folder against its checksums.

    Raises:
        ConfigError: a file is not as it was written; names the first one.
    """
    for split, entry in _read_manifest(folder)["splits"].items():
        TokenFiles(folder, split)
        for name, file in entry["files"].items():
            if _full_checksum(folder / split / name) != file["blake2b"]:
                raise _damage(folder / split / name, "is not as it was written", folder)


def _mapped(name: str) -> cached_property[np.ndarray]:
    return cached_property(lambda files: files._map(name))


class TokenFiles:
    """One split of a prepared folder. Each process opens the memory maps on first use.

    Raises:
        ConfigError: the text is not prepared, or a file is missing, has another size or changed pages.
    """

    tokens = _mapped("tokens.bin")
    doc_ends = _mapped("doc_ends.bin")
    doc_sources = _mapped("doc_sources.bin")
    doc_lots = _mapped("doc_lots.bin")
    token_bytes = _mapped("token_bytes.bin")
    learned = _mapped("learned.bin")

    def __init__(self, folder: Path, split: str) -> None:
        self.manifest = _read_manifest(folder)
        if self.manifest["dtype"] not in ("uint16", "uint32"):  # an object dtype would read file bytes as pointers
            raise _damage(folder / "manifest.json", "is not as it was written", folder)
        self.folder = folder / split
        entry = self.manifest["splits"][split]
        for name, file in entry["files"].items():
            path = self.folder / name
            if not path.exists():
                raise _damage(path, "is missing", folder)
            if (size := path.stat().st_size) != file["bytes"]:
                raise _damage(path, f"has {size} bytes instead of {file['bytes']}", folder)
            if file["bytes"] and _page_checksum(path) != file["pages"]:
                raise _damage(path, "has the right size, but other content than was written", folder)
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.eos_id: int = self.manifest["tokenizer"]["eos_id"]
        decisive = ("tokens.bin", "doc_ends.bin", "learned.bin")
        self.fingerprint = digest([file["blake2b"] for name in decisive if (file := entry["files"].get(name))])

    def part_in(self, other: "TokenFiles") -> tuple[int, float]:
        """The documents that are also in `other` (its first 67 million), and their share of the tokens."""
        lots_D = np.sort(self.doc_lots)
        is_near = np.zeros(1 << min(max(22, (16 * len(lots_D)).bit_length()), 28), bool)  # searching all takes minutes
        is_near[(lots_D * len(is_near)).astype(np.int32)] = True
        is_found_D = np.zeros(len(lots_D), bool)
        for start in range(0, min(other.num_documents, 1 << 26), 1 << 20):
            lots = other.doc_lots[start : start + (1 << 20)]
            lots = lots[is_near[(lots * len(is_near)).astype(np.int32)]]
            places = np.searchsorted(lots_D, lots)
            places[places == len(lots_D)] = 0
            is_found_D[places[lots_D[places] == lots]] = True
        is_shared_D = np.isin(self.doc_lots, lots_D[is_found_D])
        tokens = int(np.diff(self.doc_ends, prepend=0)[is_shared_D].sum())
        return int(is_shared_D.sum()), tokens / max(self.num_tokens, 1)

    def expect(self, starts: np.ndarray, count: int) -> None:
        """Has the system read `count` tokens from each start, at once and in the background, and nothing around them:
        otherwise each row of a random order costs a whole read-ahead (128 KiB or more) of text not in memory."""
        size, end = self.tokens.itemsize, self.tokens.nbytes
        for start in starts.tolist():
            page = start * size // mmap.PAGESIZE * mmap.PAGESIZE
            with suppress(OSError):  # only advice
                self._tokens_map.madvise(mmap.MADV_WILLNEED, page, min((start + count) * size, end) - page)

    def _map(self, name: str) -> np.ndarray:
        path, (dtype, _) = self.folder / name, columns(self.folder.name, self.manifest["dtype"], examples=True)[name]
        try:
            if not path.stat().st_size:  # which cannot be mapped
                return np.zeros(0, dtype)
            with path.open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if name == "tokens.bin":
                self._tokens_map = mapped
            return np.frombuffer(mapped, dtype)
        except OSError as error:  # from some file systems (FUSE), or a memory limit
            raise ConfigError(
                f"--data.cache_dir: {path} cannot be mapped into memory ({error.strerror or error}); choose a folder "
                "on another file system"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not isinstance(value, np.ndarray | mmap.mmap)}


def nothing_held_out(val_fraction: float, num_documents: int) -> ConfigError:
    return ConfigError(
        f"--data.val_fraction: {val_fraction} left none of {num_documents} documents for "
        f"validation (equal ones stay together); {'raise it, ' * (num_documents > 1)}split the text into more "
        "documents (a text file is one, as is each line of a .jsonl), or give --data.val_source"
    )
