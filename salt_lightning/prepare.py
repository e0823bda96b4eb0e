"""Documents -> tokens -> memory-mapped files, once.

    cache/tokenizer-FINGERPRINT/            a tokenizer trained here, as transformers saves it
    cache/FINGERPRINT/manifest.json         inputs, versions, counts, sizes, checksums, names of the sources
    cache/FINGERPRINT/{train,val}/
        tokens.bin       uint16 or uint32   all documents one after the other, each followed by EOS
        doc_ends.bin     int64              exclusive end of each document in tokens.bin
        doc_sources.bin  int32              each document's index into the manifest's names of sources
        token_bytes.bin  int32              val only: UTF-8 bytes of text that each token stands for (EOS: 0)

A folder is written under a temporary name and renamed at the end: what has its final name is complete.
"""

import hashlib
import json
import os
import shutil
import signal
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import cached_property
from importlib.metadata import version
from multiprocessing import get_all_start_methods, get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from salt_lightning.documents import Corpus, Raw, empty_error, read_raw
from salt_lightning.errors import ConfigError
from salt_lightning.tokenizer import (
    Block,
    Encoder,
    digest,
    rules_fingerprint,
    tokenizer_fingerprint,
    train_tokenizer,
)

FORMAT = 1
MAX_SOURCES = 1000
_STALE_S = 24 * 3600.0


# --- what is in the cache, and what is put there ---


def tokenizer_folder(corpus: Corpus, vocab_size: int, val_fraction: float, cache_dir: Path) -> Path:
    """Where the tokenizer trained on a corpus is kept."""
    return cache_dir / f"tokenizer-{digest([FORMAT, corpus.inputs(), vocab_size, val_fraction])}"


def prepare_tokenizer(corpus: Corpus, vocab_size: int, val_fraction: float, cache_dir: Path) -> Path:
    """Train a tokenizer on the training documents of a corpus unless the cache has it; its folder."""
    folder = tokenizer_folder(corpus, vocab_size, val_fraction, cache_dir)
    if not folder.exists():
        with _new_folder(folder) as partial:
            # In a child: once the Rust library has started threads here, it would object to every later fork.
            _in_child(train_tokenizer, corpus, vocab_size, val_fraction, str(partial))
    return folder


def token_folder(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, val_fraction: float, cache_dir: Path) -> Path:
    """Where a corpus is kept as tokens: named by a fingerprint of all that determines them."""
    return cache_dir / digest([FORMAT, corpus.inputs(), rules_fingerprint(tokenizer), val_fraction])


def prepare_tokens(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, val_fraction: float, cache_dir: Path, workers: int = 0
) -> Path:
    """Tokenize a corpus in several processes unless the cache has it; its folder.

    A document goes to `val` if the hash of its text is below `val_fraction` (0: all to train, 1: all to val).
    Two processes may do this at once: each writes a folder of its own, the first to finish wins.

    Raises:
        ConfigError: no text, an unreadable file, or files that changed while they were read.
    """
    folder = token_folder(corpus, tokenizer, val_fraction, cache_dir)
    if folder.exists():
        return folder
    inputs = corpus.inputs()
    with _new_folder(folder) as partial:
        manifest = {"inputs": inputs, **_write_splits(corpus, tokenizer, val_fraction, partial, workers)}
        if corpus.inputs() != inputs:
            raise ConfigError(
                f"{corpus.setting}: files changed while they were read; start again when they are complete"
            )
        (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return folder


def _write_splits(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, val_fraction: float, folder: Path, workers: int
) -> dict[str, Any]:
    largest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
    dtype = "uint16" if largest < 1 << 16 else "uint32"
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_truncation()
    backend.no_padding()
    encoder = Encoder(backend, int(tokenizer.eos_token_id), dtype, corpus, val_fraction)
    writers = {split: SplitWriter(folder / split, with_bytes=split == "val") for split in ("train", "val")}
    names: dict[str, int] = {}
    try:
        with closing(_encode_all(encoder, workers or _num_cores())) as encoded:
            for split, block in encoded:
                writers[split].add(block, [names.setdefault(source, len(names)) for source in block.sources])
                if len(names) > MAX_SOURCES:
                    raise ConfigError(
                        f"--data.source_column: {corpus.source_column!r} has more than {MAX_SOURCES} values; "
                        "choose a column with few"
                    )
    finally:
        splits = {split: writer.close() for split, writer in writers.items()}
    if not any(split["documents"] for split in splits.values()):
        raise empty_error(corpus)
    return {
        "format": FORMAT,
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "datasets", "numpy")},
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "size": len(tokenizer),
            "eos_id": encoder.eos_id,
        },
        "dtype": dtype,
        "sources": list(names),
        "splits": splits,
    }


class SplitWriter:
    """Appends blocks to the files of one split."""

    def __init__(self, folder: Path, with_bytes: bool) -> None:
        folder.mkdir()
        names = ["tokens.bin", "doc_ends.bin", "doc_sources.bin"] + (["token_bytes.bin"] if with_bytes else [])
        self._files = {name: open(folder / name, "wb") for name in names}  # noqa: SIM115 (`close` closes them)
        self._hashes = {name: hashlib.blake2b(digest_size=16) for name in names}
        self.num_tokens = self.num_documents = self.text_bytes = 0

    def add(self, block: Block, source_ids: list[int]) -> None:
        lengths = np.array([len(ids) for ids in block.ids], np.int64)
        self._write("tokens.bin", *block.ids)
        self._write("doc_ends.bin", self.num_tokens + np.cumsum(lengths))
        self._write("doc_sources.bin", np.array(source_ids, np.int32))
        if block.token_bytes is not None:
            self._write("token_bytes.bin", *block.token_bytes)
        self.num_tokens += int(lengths.sum())
        self.num_documents += len(lengths)
        self.text_bytes += block.text_bytes

    def _write(self, name: str, *arrays: np.ndarray) -> None:
        data = b"".join(array.tobytes() for array in arrays)
        self._files[name].write(data)
        self._hashes[name].update(data)

    def close(self) -> dict[str, Any]:
        """Flush to disk; the split's entry in the manifest."""
        files = {}
        for name, file in self._files.items():
            file.flush()
            os.fsync(file.fileno())
            files[name] = {"bytes": file.tell(), "blake2b": self._hashes[name].hexdigest()}
            file.close()
        counts = {"tokens": self.num_tokens, "documents": self.num_documents, "text_bytes": self.text_bytes}
        return {**counts, "files": files}


# --- worker processes ---


def _encode_all(encoder: Encoder, workers: int) -> Generator[tuple[str, Block], None, None]:
    """(split, block) in the order of the documents, with a progress bar; a few tasks at a time in memory."""
    bar = tqdm(desc="tokenizing", unit="B", unit_scale=True, disable=None, mininterval=0.5)
    num_documents, began = 0, time.perf_counter()
    with (
        bar,
        _serial_tokenizers(),
        ProcessPoolExecutor(workers, _processes(), _start_worker, (encoder,)) as pool,
    ):
        try:
            for blocks in _in_order(pool, read_raw(encoder.corpus), 3 * workers):
                for split, block in blocks.items():
                    num_documents += len(block.ids)
                    bar.set_postfix_str(
                        f"{num_documents / (time.perf_counter() - began):.0f} documents/s", refresh=False
                    )
                    bar.update(block.text_bytes)
                    yield split, block
        except BrokenProcessPool as error:
            raise ConfigError(
                f"--data.prepare_workers: one of {workers} tokenizing processes was killed, as it happens for want of "
                "memory; take fewer"
            ) from error


def _in_order(pool: ProcessPoolExecutor, raws: Iterator[Raw], depth: int) -> Iterator[dict[str, Block]]:
    pending: deque[Future] = deque()
    try:
        for raw in raws:
            with quiet_fork():
                pending.append(pool.submit(_encode, raw))
            if len(pending) >= depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for task in pending:
            task.cancel()


_ENCODER: Encoder | None = None  # one per worker process


def _start_worker(encoder: Encoder | None = None) -> None:
    global _ENCODER
    _ENCODER = encoder
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: die in silence, the parent has something to say
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # a killed parent would leave its workers waiting for ever


def _encode(raw: Raw) -> dict[str, Block]:
    assert _ENCODER is not None
    return _ENCODER(raw)


def _in_child(function: Callable[..., None], *args: Any) -> None:
    """Call a function in a process of its own; what it raises is raised here."""
    receiver, sender = _processes().Pipe(duplex=False)
    child = _processes().Process(target=_call, args=(sender, function, args))
    with quiet_fork():
        child.start()
    sender.close()
    try:
        error = receiver.recv()
    except EOFError:
        error = ConfigError("--data.tokenizer: the process that trained it was killed; is there enough memory?")
    finally:
        child.kill()
        child.join()
        receiver.close()
    if error is not None:
        raise error


def _call(sender: Connection, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    _start_worker()
    try:
        function(*args)
        sender.send(None)
    except Exception as error:
        sender.send(error)


def _processes() -> Any:
    """Fork where there is fork: spawned workers would run the user's script again."""
    return get_context("fork" if "fork" in get_all_start_methods() else "spawn")


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def quiet_fork() -> Iterator[None]:
    """Python 3.12 warns of forks beside threads. Our children compute with tokenizers and numpy alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
        yield


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """One thread per worker process; also keeps the Rust library from printing about forks."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `folder` if the block succeeds and nobody was faster."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for old in folder.parent.glob(f".{folder.name}.*.partial"):
        if time.time() - max(path.stat().st_mtime for path in [old, *old.rglob("*")]) > _STALE_S:
            shutil.rmtree(old, ignore_errors=True)  # left behind by a kill
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
    partial.mkdir()
    try:
        yield partial
        try:
            os.replace(partial, folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- files -> arrays ---


class TokenFiles:
    """One split of a prepared folder. The memory maps are opened on first use, in each process anew.

    Raises:
        ConfigError: not prepared, or a file is missing or has not the size that the manifest says.
    """

    def __init__(self, folder: Path, split: str) -> None:
        if not (folder / "manifest.json").exists():
            raise ConfigError(
                f"--data.cache_dir: {folder} holds no prepared text: prepare_data() has not run, the sources "
                "changed after it, or the folder is damaged; delete it and start again"
            )
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.folder = folder / split
        entry = self.manifest["splits"][split]
        for name, file in entry["files"].items():
            path = self.folder / name
            size = path.stat().st_size if path.exists() else 0
            if size != file["bytes"]:
                raise ConfigError(
                    f"--data.cache_dir: {path} has {size} bytes instead of {file['bytes']}; "
                    f"delete {folder} to prepare it again"
                )
        self.num_tokens: int = entry["tokens"]
        self.num_documents: int = entry["documents"]
        self.eos_id: int = self.manifest["tokenizer"]["eos_id"]
        self.has_bytes = "token_bytes.bin" in entry["files"]

    @cached_property
    def tokens(self) -> np.ndarray:
        return self._map("tokens.bin", self.manifest["dtype"])

    @cached_property
    def doc_ends(self) -> np.ndarray:
        return self._map("doc_ends.bin", "int64")

    @cached_property
    def doc_sources(self) -> np.ndarray:
        return self._map("doc_sources.bin", "int32")

    @cached_property
    def token_bytes(self) -> np.ndarray:
        return self._map("token_bytes.bin", "int32")

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.folder / name
        # As a plain array: slices of np.memmap's own class are slow. An empty file cannot be mapped.
        return np.asarray(np.memmap(path, dtype, mode="r")) if path.stat().st_size else np.zeros(0, dtype)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if not isinstance(value, np.ndarray)}
