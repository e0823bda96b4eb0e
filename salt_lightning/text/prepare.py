"""Text -> token files and trained tokenizers, once: finds them in the cache, or makes them.

cache/tokenizer-FINGERPRINT/     a tokenizer trained here, as transformers saves it
cache/FINGERPRINT/               token files (token_files.py)
cache/.FINGERPRINT.partial/      either one while it is made (journal.py)
"""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from transformers import PreTrainedTokenizerBase

from salt_lightning.errors import ConfigError, MachineError, counted, few, raised, refuse
from salt_lightning.preflight import size_said
from salt_lightning.text import token_files
from salt_lightning.text.documents import MAX_SOURCES, Corpus, Raw, first_lines, look_into, read_raw
from salt_lightning.text.encoder import Encoder, day_written, make_encoder
from salt_lightning.text.journal import Unfinished, making, write_json
from salt_lightning.text.parse import Skipped, documents, empty_error
from salt_lightning.text.processes import in_child, num_cores, ordered_map
from salt_lightning.text.progress import Done, Progress, summary_line
from salt_lightning.text.token_files import (
    FORMAT,
    SPLITS,
    Block,
    SplitWriter,
    TokenFiles,
    digest,
    no_counts,
    sealed,
    sizes,
)
from salt_lightning.text.tokenizer import (
    WORDS,
    beginning,
    rules_fingerprint,
    spelled_ids,
    tokenizer_fingerprint,
    train_tokenizer,
)

_TRAINED = 4  # version of what a tokenizer is trained on
_JOURNAL_S = 10.0  # the work that a kill may lose
_KEPT = f"; the same --data.cache_dir keeps all but about the last {_JOURNAL_S:g} s of work"
_CHARS_PER_WORKER = 3 << 19  # three tasks: one being processed, one queued, one waiting to be written


def tokenizer_folder(corpus: Corpus, vocab_size: int, val_fraction: float, cache_dir: Path) -> Path:
    """The cache folder of the tokenizer trained on a corpus."""
    return cache_dir / f"tokenizer-{digest([_TRAINED, WORDS, corpus.inputs(), vocab_size, val_fraction])}"


def trained_tokenizer(corpus: Corpus, vocab_size: int, val_fraction: float, cache_dir: Path) -> str:
    """That folder; an error if it does not exist."""
    folder = tokenizer_folder(corpus, vocab_size, val_fraction, cache_dir)
    token_files.require_readable(folder)
    if not folder.exists():
        raise ConfigError("--data.tokenizer: 'train' is trained by prepare_data(); call that first")
    return str(folder)


def prepare_tokenizer(corpus: Corpus, vocab_size: int, val_fraction: float, cache_dir: Path, workers: int = 0) -> Path:
    """Train a tokenizer on a corpus's training documents unless the cache has it; return its folder. `workers`: as in
    `prepare_tokens`."""
    folder = tokenizer_folder(corpus, vocab_size, val_fraction, cache_dir)
    token_files.require_readable(folder)
    if not folder.exists():
        stamps = corpus.stamps()
        with _accidents(cache_dir, ""), making(folder) as unfinished:
            if unfinished is not None:
                arguments = (corpus, vocab_size, val_fraction, str(unfinished.path))
                if workers == 1:
                    with _serial_tokenizers():
                        train_tokenizer(*arguments)
                else:  # if the Rust library starts threads here, it complains at every later fork
                    in_child(train_tokenizer, *arguments)
                _check_unchanged(corpus, stamps)
    return folder


def look_inside(
    corpora: dict[str, Corpus], folder: Callable[[str], Path], workers: int = 0, val_fraction: float = 0.0
) -> None:
    """Look into the parquet files, first lines and hub data sets of all corpora without tokens: what is wrong with the
    last one would be found after hours of work. `folder`: the token folder of a source setting. `val_fraction`: the
    share of the training text to hold out, which one document cannot give.

    Raises:
        ConfigError: a data set, split, subset, revision or column does not exist, a file is damaged or holds something
            else, the hub cannot be reached, or the training text is one document.
    """
    waiting = []
    for setting, corpus in corpora.items():
        try:
            is_prepared = folder(setting).exists()
        except ConfigError:  # its tokenizer is not trained yet
            is_prepared = False
        waiting += [] if is_prepared else [corpus]
    if any(corpus.reads_hub() for corpus in waiting) and workers != 1:
        in_child(_look_into_all, waiting)  # connections and threads are better not forked along
    else:
        _look_into_all(waiting)
    if val_fraction and "source" in corpora and not (corpus := corpora["source"]).examples.given:
        files = [file for group in corpus.groups for file in group.files]
        if len(files) == 1 and all(group.kind == "text" for group in corpus.groups):
            raise token_files.nothing_held_out(val_fraction, 1)


def _look_into_all(waiting: list[Corpus]) -> None:
    refuse(raised(partial(look, corpus) for corpus in waiting for look in (look_into, _parse_first_lines)))


def _parse_first_lines(corpus: Corpus) -> None:
    for raw in first_lines(corpus):
        documents(raw, corpus)


_CUT = 4  # version of how examples are cut into parts that are learned or not


def token_folder(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, val_fraction: float, cache_dir: Path) -> Path:
    """The cache folder of a corpus's tokens, named by a fingerprint of everything that determines them."""
    named: list[Any]
    if corpus.examples.messages:  # a template may write any of the named tokens
        named = [_CUT, tokenizer.chat_template, tokenizer.special_tokens_map, *day_written(tokenizer)]
    else:  # those that a text spells out are hidden
        named = [*([_CUT] if corpus.examples.given else []), *spelled_ids(tokenizer)]
    told = [FORMAT, corpus.inputs(), rules_fingerprint(tokenizer), val_fraction, named, beginning(tokenizer)]
    return cache_dir / digest(told)


def prepare_tokens(
    corpus: Corpus,
    tokenizer: PreTrainedTokenizerBase,
    val_fraction: float,
    cache_dir: Path,
    workers: int = 0,
    first: Callable[[], None] = lambda: None,
) -> Path:
    """Tokenize a corpus in several processes unless the cache has it, after calling `first`; return its folder.

    A document goes to `val` if the hash of its text is below `val_fraction` (0: all to train, 1: all to val).
    If it is killed, the next start continues, and writes the same files as a preparation that was never stopped.
    A second process waits for the first, and takes over if that one dies.

    Raises:
        ConfigError: there is no text, a file cannot be read or changed while it was read, the cache folder cannot be
            written or has no room for the rest, or a worker was killed.
    """
    folder = token_folder(corpus, tokenizer, val_fraction, cache_dir)
    token_files.require_readable(folder)
    if not folder.exists():
        first()
        _prepare(folder, corpus, tokenizer, val_fraction, workers)
    manifest = TokenFiles(folder, "train").manifest
    skipped, column = Skipped(**manifest["skipped"]), corpus.examples.tools
    if skipped.lines:
        rank_zero_info(f"{corpus.setting}: {skipped}")
    if left_out := manifest["left_out"]:
        what = "no response to learn, or a null" if corpus.examples.given else "no text"
        rank_zero_info(f"{corpus.setting}: {counted(left_out, 'row')} left out ({what})")
    if corpus.examples.messages and (day := day_written(tokenizer)):
        rank_zero_info(f"{corpus.setting}: the chat template writes a date; it is {day[0]} in all conversations")
    if column and not manifest["num_tools"]:  # one JSON line may lack the column, but all?
        rank_zero_warn(f"--data.examples.tools: no row of {corpus.setting} has tools in a column {column!r}")
    return folder


def _prepare(
    folder: Path, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, val_fraction: float, workers: int
) -> None:
    stamps, inputs = corpus.stamps(), corpus.inputs()
    encoder = make_encoder(corpus, tokenizer, val_fraction)
    origin = {
        "format": FORMAT,
        "folder": folder.name,
        "inputs": inputs,
        "versions": {name: version(name) for name in ("tokenizers", "transformers", "datasets", "numpy")},
        "tokenizer": {
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "rules": rules_fingerprint(tokenizer),
            "size": len(tokenizer),
            "eos_id": encoder.eos_id,
        },
        "dtype": encoder.dtype,
    }
    with _accidents(folder.parent, _KEPT), making(folder) as unfinished:
        if unfinished is not None:
            try:
                contents = _write(encoder, origin, unfinished, workers or num_cores())
                _check_unchanged(corpus, stamps)
            except ConfigError as error:
                # Corrected text gets another fingerprint. A disk or hub that failed may work again.
                if not (corpus.reads_hub() or getattr(error.__cause__, "errno", None)):
                    unfinished.forget()
                raise
            write_json(unfinished.path / "manifest.json", sealed({**origin, **contents}))


def _check_unchanged(corpus: Corpus, stamps: dict[str, Any]) -> None:
    changed = [file for file, stamp in corpus.stamps().items() if stamp != stamps[file]]
    if changed:
        raise ConfigError(
            f"{corpus.setting}: files changed while they were read: {few(changed)}; start again when they are complete"
        )


@contextmanager
def _accidents(cache_dir: Path, kept: str) -> Iterator[None]:
    """Report errors that are not the text's fault in one line. `kept`: what is, of the work so far."""
    try:
        yield
    except BrokenProcessPool as error:
        raise MachineError(
            "--data.prepare_workers: a tokenizing process was killed, usually for lack of memory; use fewer (1 "
            f"starts none) and start again{kept}"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOLCK:
            raise ConfigError(
                f"--data.cache_dir: {cache_dir} is on a file system without file locks ({error.strerror}), so two runs "
                "could prepare the same text at once; choose a folder on another file system, e.g. local to each node"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM) and os.path.lexists(error.filename or ""):
            raise ConfigError(
                f"--data.cache_dir: {error.filename} belongs to another user, who is preparing the same text or was "
                "killed while doing so; wait until it is done, let its owner remove it and the folder .partial beside "
                "it, or choose another folder"
            ) from error
        raise ConfigError(
            f"--data.cache_dir: {cache_dir} cannot be written ({error.strerror or error}); fix that or "
            f"choose another folder, then start again{kept}"
        ) from error


# --- raw text -> files, with a journal ---


@dataclass
class _Written:
    """How far the files are written: the content of the journal."""

    origin: str  # digest of the manifest's entries that determine the files
    num_raws: int = 0
    num_left_out: int = 0  # rows
    num_split: int = 0  # conversations that became several examples
    num_more: int = 0  # their examples after the first
    num_tools: int = 0  # conversations with tools
    raws_hash: str = ""
    read_bytes: int = 0
    sources: dict[str, int] = field(default_factory=dict)  # name -> index
    skipped: Skipped = field(default_factory=Skipped)
    counts: dict[str, dict[str, int]] = field(default_factory=lambda: {split: no_counts() for split in SPLITS})
    spelled: dict[str, dict[str, int]] = field(default_factory=dict)  # by split, as in a Block

    def follow(self, raw_hash: bytes, read_bytes: int) -> None:
        """Count one more raw."""
        self.num_raws += 1
        self.raws_hash = hashlib.blake2b(self.raws_hash.encode() + raw_hash, digest_size=16).hexdigest()
        self.read_bytes = read_bytes

    def done(self) -> Done:
        documents, tokens, text_bytes = (
            sum(counts[name] for counts in self.counts.values()) for name in ("documents", "tokens", "text_bytes")
        )
        return Done(time.monotonic(), documents, tokens, text_bytes, self.read_bytes)


def _resume(unfinished: Unfinished, origin: str, encoder: Encoder) -> tuple[_Written, Iterator[Raw]]:
    """What is written, and what is still to read (all, unless a journal of this origin fits files and text)."""
    journal = unfinished.journal()
    if journal.get("origin") == origin:
        written, read = _Written(**journal), _Written(origin)
        written.skipped = Skipped(**journal.get("skipped", {}))
        least = {
            unfinished.path / split / name: size
            for split, counts in written.counts.items()
            for name, size in sizes(split, encoder.dtype, counts, encoder.corpus.examples.given).items()
        }
        if all(path.exists() and path.stat().st_size >= size for path, size in least.items()):
            rank_zero_info(f"tokenizing: resuming in {unfinished.path}")
            raws = read_raw(encoder.corpus)
            for raw in islice(raws, written.num_raws):  # reading takes 1% of the time of tokenizing
                read.follow(raw.digest(), raw.read_bytes)
            if read.raws_hash == written.raws_hash:
                return written, raws
    unfinished.forget()
    return _Written(origin), read_raw(encoder.corpus)


def _write(encoder: Encoder, origin: dict[str, Any], unfinished: Unfinished, workers: int) -> dict[str, Any]:
    """Fill the folder from where its journal ends; return the manifest's entries about the files."""
    written, raws = _resume(unfinished, digest(origin), encoder)
    writers = {
        split: SplitWriter(unfinished.path / split, encoder.dtype, counts, encoder.corpus.examples.given)
        for split, counts in written.counts.items()
    }
    start = written.done()
    text_bytes = encoder.corpus.num_bytes()
    progress, journaled_s = Progress(text_bytes, start), start.time_s
    try:
        with _serial_tokenizers(), closing(ordered_map(encoder, raws, workers, workers * _CHARS_PER_WORKER)) as encoded:
            for raw, (raw_hash, blocks, skipped) in encoded:
                written.skipped.add(skipped)
                for split, block in blocks.items():
                    writers[split].add(block, _source_ids(block, written.sources, encoder.corpus))
                    written.num_split += block.num_split
                    written.num_more += block.num_more
                    written.num_tools += block.num_tools
                    before = written.spelled.get(split, {})
                    written.spelled[split] = {end: n + before.get(end, 0) for end, n in block.spelled.items()}
                kept = sum(len(block.lengths) - block.num_more for block in blocks.values())
                written.num_left_out += len(raw.rows) - kept - skipped.lines
                written.follow(raw_hash, raw.read_bytes)
                done = written.done()
                progress.update(done)
                if done.time_s - journaled_s >= _JOURNAL_S:
                    journaled_s = done.time_s
                    _write_journal(unfinished, writers, written)
                    if not encoder.corpus.reads_hub():  # its size is unknown
                        _require_room(unfinished.path, text_bytes / max(written.read_bytes, 1))
        if not written.done().documents:
            raise empty_error(encoder.corpus, written.skipped)
        _write_journal(unfinished, writers, written)
    finally:
        progress.close()
        for writer in writers.values():
            writer.close()
    split = (
        f"; {written.num_split} conversations became {written.num_split + written.num_more} examples, because the chat "
        "template writes earlier messages differently later on"
    )
    rank_zero_info(summary_line(start, written.done()) + (split if written.num_split else ""))
    return {
        "sources": list(written.sources),
        "splits": {split: writer.entry() for split, writer in writers.items()},
        "skipped": asdict(written.skipped),
        "left_out": written.num_left_out,
        "spelled": written.spelled,
        **({"num_tools": written.num_tools} if encoder.corpus.examples.tools else {}),
    }


def _require_room(folder: Path, times: float) -> None:
    """Raises OSError if token files so many times as large as now do not fit on the disk."""
    rest = sum(file.stat().st_size for file in folder.glob("*/*.bin")) * (times - 1)
    if rest > (free := shutil.disk_usage(folder).free):
        raise OSError(
            errno.ENOSPC, f"the rest of the text needs about {size_said(rest)}, but {size_said(free)} are free"
        )


def _write_journal(unfinished: Unfinished, writers: dict[str, SplitWriter], written: _Written) -> None:
    for writer in writers.values():
        writer.sync()
    unfinished.write_journal(asdict(written))


def _source_ids(block: Block, ids: dict[str, int], corpus: Corpus) -> list[int]:
    of_block = [ids.setdefault(source, len(ids)) for source in block.sources]
    if len(ids) > MAX_SOURCES:
        raise ConfigError(
            f"--data.source_column: {corpus.source_column!r} has more than {MAX_SOURCES} values; "
            "choose a column with few"
        )
    return of_block


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """One thread per worker process; also stops the Rust library's warnings about forks."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        del os.environ["TOKENIZERS_PARALLELISM"]
        if before is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = before
