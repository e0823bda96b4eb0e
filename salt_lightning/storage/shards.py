"""A checkpoint as a folder with one file of tensors per rank, written by all ranks and readable by one process.

    step-00000100.ckpt/
        meta.pt            all that is not a tensor: settings, counters, names; loads with weights_only
        pieces.json        which piece of which tensor is where
        __R_ID_0.distcp    the pieces of rank R; ID is that of the save: files of two saves are never taken for one
        .metadata          the same table as torch.distributed.checkpoint writes it, a pickle: for other tools
    state_dict.NAME        a weight
    optimizer.NAME.KEY     the optimizer's KEY (exp_avg, ...) of that weight

It is written under a temporary name and renamed at the end, so under its final name it is complete. Each piece has a
checksum in its own archive; that of `pieces.json` is in meta.pt. `.metadata` is never opened here: nothing in a folder
can run code.
"""

import errno
import hashlib
import io
import math
import os
import pickle
import re
import shutil
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta

from salt_lightning import __version__
from salt_lightning.errors import ConfigError, failed_write, few, first_line
from salt_lightning.storage import pieces
from salt_lightning.storage.kinds import TO_GO_ON, VERSION, is_bounded, is_checkpoint
from salt_lightning.text.journal import whole

META, TABLE = "meta.pt", pieces.FILE
_DIGEST = "pieces_digest"  # key of meta.pt
_WEIGHTS, _OPTIMIZER = "state_dict.", "optimizer."


class _Reader(dcp.FileSystemReader):
    """torch's reader without its pickle.load."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = table_of(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def table_of(folder: Path) -> Metadata:
    """The table of pieces, cached: with many ranks, reading takes seconds, and a start needs it repeatedly."""
    file = (folder / TABLE).stat()
    return _read_table(folder, file.st_mtime_ns, file.st_size)


@lru_cache(maxsize=1)
def _read_table(folder: Path, *_: int) -> Metadata:
    data = (folder / TABLE).read_bytes()
    if _meta(folder).get(_DIGEST) not in (None, _digest(data)):  # a changed byte could cost any amount of memory below
        raise ValueError("it has changed since it was written")
    return pieces.parse(data)


def forget() -> None:
    """Clears the cached table, which takes a few kB per rank and tensor."""
    _read_table.cache_clear()


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _meta(folder: Path) -> dict[str, Any]:
    """The contents of META; nothing if it cannot be read."""
    try:
        require_stored(folder / META)
        return dict(torch.load(folder / META, map_location="cpu", weights_only=True))
    except Exception as error:  # `read` says what is wrong with it
        require_answer(folder / META, error)
        return {}


def missing(folder: Path) -> str | None:
    """What a folder lacks to be a whole checkpoint, in a few words; None if it is one. Reads no tensor."""
    for name in (META, TABLE):
        if not _is_file(folder / name):
            old = name == TABLE and _is_file(folder / ".metadata")
            return f"{name} is missing" + "; if an earlier commit wrote it, export it with that" * old
    sizes: dict[str, int] = {}
    try:
        metadata = table_of(folder)
        for place in metadata.storage_data.values():
            sizes[place.relative_path] = max(sizes.get(place.relative_path, 0), place.offset + place.length)
    except Exception as error:  # a damaged table raises errors of any kind
        require_answer(folder, error)
        return f"{TABLE} cannot be read: {str(error) or type(error).__name__}"
    for name, size in sorted(sizes.items()):
        if not _is_file(folder / name):
            return f"{name} is missing"
        if (folder / name).stat().st_size < size:
            return f"{name} is cut off"
    total, tensors = sum(sizes.values()), dict[str, Any](metadata.state_dict_metadata)
    for key, info in tensors.items():
        if math.prod(info.size) * info.properties.dtype.itemsize > total:
            return f"{TABLE} gives {key} more elements than its files contain"
    return None


def _is_file(path: Path) -> bool:
    """Like Path.is_file, but raises errors: from Python 3.14 on, that returns False for every error."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return False


class UnansweredError(OSError):
    """The file system failed to read something; another try may succeed."""


def require_answer(path: Path, error: BaseException) -> None:
    """Raises UnansweredError if an error of the file system itself has led to `error`.

    It says nothing about the file, and taken as damage it would make a run skip a whole checkpoint. Damage itself leads
    to two such errors, which do not count: a missing file, and a place before its beginning.
    """
    for each in _led_to(error):
        by_torch = re.search(r"unable to (?:mmap|open) .*: (.+) \((\d+)\)$", str(each))
        number = int(by_torch[2]) if by_torch else getattr(each, "errno", None)
        if number not in (None, errno.ENOENT, errno.EINVAL):
            said = f"{path} cannot be read ({os.strerror(number)}); nothing was changed, try again"
            raise UnansweredError(said) from error


def _led_to(error: BaseException | None) -> Iterator[BaseException]:
    """An error and the errors that led to it: libraries hide that of the file system behind their own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class DamageError(Exception):
    """Why a path is not a whole checkpoint, in a few words."""


STUDENT = "student.model."  # prefix of the student's weights
_FOLDER = 0x10  # MS-DOS's attribute, for which torch's zip reader looks


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of this project, file or folder, as plain data and tensors, which stay on disk until used.

    Raises:
        DamageError: it is cut off, lacks a file, or is not a checkpoint.
        OSError: the file system cannot read it now.
    """
    try:
        if path.is_dir() and (reason := missing(path)):
            raise DamageError(reason)
        checkpoint = read(path) if path.is_dir() else _read_file(path)
        if not is_bounded(checkpoint):
            raise DamageError("its settings contain themselves, or millions of values")
        if is_checkpoint(checkpoint):
            return checkpoint
        reason = "other contents"
    except (DamageError, UnansweredError):
        raise
    except (KeyError, TypeError):
        reason = "other contents"
    except Exception as error:  # on damage, torch's reader raises errors of any kind
        require_answer(path, error)
        kind = f"cut off, damaged, or another kind of file: {type(error).__name__}"
        kind = "a link to nothing" if not path.exists() else kind if path.stat().st_size else "empty"
        reason = f"{META}: {kind}" if path.is_dir() else kind
    raise DamageError(reason)


def _read_file(path: Path) -> dict[str, Any]:
    if path.exists() and not path.is_file():
        raise DamageError("not a file")  # opening a pipe would wait
    require_stored(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for name, tensor in checkpoint["state_dict"].items():
        if name.startswith(STUDENT) and not _is_dense(tensor):
            raise DamageError(f"{name} is not a plain tensor")
    return checkpoint


def _is_dense(tensor: Any) -> bool:
    is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout is torch.strided
    return is_plain and not (tensor.is_meta or tensor.is_quantized or tensor.is_nested)


def require_stored(archive: Any) -> None:
    """Raises DamageError if an archive has entries that torch.save never writes: compressed ones could need any amount
    of memory, and would be misread if mapped; of one marked as a folder, torch reads uninitialized memory."""
    with zipfile.ZipFile(archive) as files:
        require_stored_entries(files)


def require_stored_entries(files: zipfile.ZipFile) -> None:
    assert files.fp is not None
    stated = zipfile._EndRecData(files.fp)[zipfile._ECD_OFFSET]  # type: ignore[attr-defined]
    if files.start_dir != stated:
        raise zipfile.BadZipFile("torch would read another list of entries in it")
    for info in files.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise DamageError(f"{info.filename} in it is compressed")
        if info.external_attr & _FOLDER:
            raise DamageError(f"{info.filename} in it is marked as a folder")


def require_whole(checkpoint: Mapping[str, Any]) -> None:
    """Raises ConfigError if a checkpoint has only weights, or lacks counters that a fit needs to continue."""
    if not checkpoint.keys() >= {"lr_schedulers", "callbacks", "loops"}:
        raise ConfigError(
            "--ckpt_path: this checkpoint contains only weights, as with ModelCheckpoint's save_weights_only; use "
            "a whole one to continue, or give this one as --model.student.path to start a new run"
        )
    if lacking := sorted(TO_GO_ON - checkpoint.keys()):
        raise ConfigError(
            f"--ckpt_path: this checkpoint lacks {few(lacking)}, as if from another version of this project (it names "
            f"{checkpoint.get(VERSION)}, this is {__version__}); use that version to continue, or give the checkpoint "
            "as --model.student.path to start a new run"
        )


def unreadable(path: Path) -> str | None:
    """The class in a checkpoint, file or folder, that torch would have to unpickle; None if none is found, e.g. before
    it is written."""
    with suppress(OSError, RuntimeError, ValueError):
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path / META if path.is_dir() else path)
        return unsafe[0] if unsafe else None
    return None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns a failed write, e.g. on a full disk, into one line with its cause, which torch hides in other errors."""
    try:
        yield
    except (OSError, RuntimeError, CheckpointException) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # not about writing
            raise
        failure = next((failure for failure, _ in getattr(error, "failures", {}).values()), error)
        number = next((each.errno for each in _led_to(failure) if isinstance(each, OSError)), None)
        raise failed_write(path, first_line(failure), number, "continue with --ckpt_path last") from error


class _Writer(dcp.FileSystemWriter):
    def prepare_global_plan(self, plans: list[Any]) -> list[Any]:  # on the first rank
        save = uuid4().hex[:8]
        named = super().prepare_global_plan(plans)
        prefixes = (replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{save}_") for plan in named)
        return [replace(plan, storage_data=prefix) for plan, prefix in zip(named, prefixes, strict=True)]

    def finish(self, metadata: Any, results: list[list[Any]]) -> None:  # on the first rank, once all have written
        places = {written.index: written.storage_data for of_rank in results for written in of_rank}
        for name in sorted({place.relative_path for place in places.values()}):
            if not os.path.exists(self.path / name):
                why = "not there, though a process has written it; do all nodes see the same folder?"
                raise FileNotFoundError(errno.ENOENT, why, name)
        super().finish(metadata, results)
        with whole(Path(self.path) / TABLE) as file:
            file.write(pieces.dump(replace(metadata, storage_data=places)))


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Writes Lightning's checkpoint, whose tensors may be sharded, with one optimizer's state by names; all ranks call
    it together. An existing folder is replaced when the new one is complete."""
    tensors, meta = _split(checkpoint)
    temporary, first = path.with_name(f".{path.name}.tmp"), dist.get_rank() == 0
    if first:
        with writing(path):
            if temporary.exists():
                delete(temporary)  # what a killed save left
            temporary.mkdir(parents=True)
    dist.barrier()
    with writing(path):
        # On the first rank, this returns when all ranks have written and synced their files.
        dcp.save(tensors, storage_writer=_Writer(temporary))
        if first:
            with whole(temporary / META) as file:
                torch.save({**meta, _DIGEST: _digest((temporary / TABLE).read_bytes())}, file)
            sync_folder(temporary)
            before = _retire(path) if path.exists() else None
            os.replace(temporary, path)
            sync_folder(path.parent)
            if before is not None:
                delete(before)


def remove(path: Path) -> None:
    """Removes a checkpoint, file or folder. Renames it first, so that its name never stands for half a folder."""
    try:
        retired = _retire(path)
    except PermissionError as error:  # in a folder that lets only owners remove
        _say_left(path, error.strerror)
    else:
        delete(retired)


def _retire(path: Path) -> Path:
    retired = path.with_name(f".{path.name}.old")
    if retired.exists():
        delete(retired)
    os.replace(path, retired)
    return retired


def delete(path: Path) -> None:
    """Removes a file, a folder or a link. What another user has left, and this one may not remove, ends no run: it is
    named, and renamed, as its name may be needed."""
    try:
        if path.is_dir() and not path.is_symlink():  # never delete the target of a link
            shutil.rmtree(path)
        else:
            path.unlink()
    except PermissionError as error:
        left = path
        if not re.search(r"\.[0-9a-f]{8}\.old$", path.name):
            left = path.with_name(f"{path.name}.{uuid4().hex[:8]}.old")
            os.replace(path, left)
        _say_left(left, error.strerror)


@cache
def _say_left(path: Path, reason: str) -> None:
    rank_zero_info(f"{path} cannot be removed ({reason}); it takes room until its owner removes it")


def sync_folder(folder: Path) -> None:
    """Syncs a folder, so that a rename in it reaches the disk. Many network file systems do not sync folders."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def _split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    meta = {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}
    tensors = {f"{_WEIGHTS}{name}": tensor for name, tensor in checkpoint["state_dict"].items()}
    for optimizer in checkpoint.get("optimizer_states", []):  # exactly one
        meta["param_groups"] = optimizer["param_groups"]
        for name, state in optimizer["state"].items():
            tensors |= {f"{_OPTIMIZER}{name}.{key}": tensor for key, tensor in state.items()}
    return tensors, meta


class Tensors(Mapping[str, Tensor]):
    """The tensors of a folder under a prefix; each is read from disk on access, whole, onto the CPU."""

    def __init__(self, folder: Path, metadata: Metadata, prefix: str) -> None:
        self._folder, self._where, self._prefix = folder, metadata, prefix
        tensors: dict[str, Any] = metadata.state_dict_metadata
        self.shapes = {k.removeprefix(prefix): info.size for k, info in tensors.items() if k.startswith(prefix)}

    def on_meta(self, name: str) -> Tensor:
        """An empty tensor with shape and dtype; reads nothing."""
        info: Any = self._where.state_dict_metadata[self._prefix + name]
        return torch.empty(info.size, dtype=info.properties.dtype, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        key = self._prefix + name
        info: Any = self._where.state_dict_metadata[key]
        whole = torch.zeros(info.size, dtype=info.properties.dtype)  # pieces of a forged table may overlap
        for chunk in info.chunks:
            piece = self._piece(key, chunk.offsets)
            if piece.shape != chunk.sizes or piece.dtype != whole.dtype:
                raise self._damaged(
                    key, f"{tuple(piece.shape)} {piece.dtype} instead of {tuple(chunk.sizes)} {whole.dtype}"
                )
            whole[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))] = piece
        return whole

    def _piece(self, key: str, offsets: torch.Size) -> Tensor:
        try:
            place = self._where.storage_data[MetadataIndex(key, offsets)]
            with open(self._folder / place.relative_path, "rb") as file:
                file.seek(place.offset)
                piece = io.BytesIO(file.read(place.length))
            require_stored(piece)
            piece.seek(0)
            tensor = torch.load(piece, map_location="cpu", weights_only=True)
        except DamageError as error:
            raise self._damaged(key, str(error)) from error
        except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
            raise self._damaged(key, type(error).__name__) from error
        if not _is_dense(tensor):
            raise self._damaged(key, "it is not a plain tensor")
        return tensor

    def _damaged(self, key: str, reason: str) -> ConfigError:
        return ConfigError(f"{self._folder} is damaged: {key} cannot be read ({reason}); use another checkpoint")

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def read(folder: Path) -> dict[str, Any]:
    """Reads a folder as the dict of a single-file checkpoint; `state_dict` reads each tensor on access.

    So does `optimizer`, the optimizer's tensors as NAME.KEY; `optimizer_states` assembles them.
    """
    require_stored(folder / META)
    checkpoint = torch.load(folder / META, map_location="cpu", weights_only=True)
    checkpoint.pop(_DIGEST, None)
    metadata = table_of(folder)  # raises an error if it is not the one of this digest
    checkpoint["state_dict"] = Tensors(folder, metadata, _WEIGHTS)
    checkpoint["optimizer"] = Tensors(folder, metadata, _OPTIMIZER)
    return checkpoint


def optimizer_states(checkpoint: dict[str, Any]) -> list[dict[str, Any]]:
    """The one optimizer in what `read` returned, in the form that torch's optimizers load."""
    tensors = checkpoint["optimizer"]
    return [{"state": _by_weight(tensors, tensors.__getitem__), "param_groups": checkpoint["param_groups"]}]


def optimizer_layout(checkpoint: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """The optimizer's tensors in a checkpoint, file or folder, by weight and key; for a folder, on the meta device."""
    if "optimizer" not in checkpoint:
        return checkpoint["optimizer_states"][0]["state"]
    return _by_weight(checkpoint["optimizer"], checkpoint["optimizer"].on_meta)


def _by_weight(names: Iterable[str], read: Callable[[str], Tensor]) -> dict[str, dict[str, Tensor]]:
    state: dict[str, dict[str, Tensor]] = {}
    for key in names:
        name, _, entry = key.rpartition(".")
        state.setdefault(name, {})[entry] = read(key)
    return state


def load_into(checkpoint: dict[str, Any], folder: Path) -> None:
    """Fills the tensors of a checkpoint-like dict, sharded in any way, from a folder; all ranks call it together.

    Each rank reads only what its shards need.
    """
    tensors, _ = _split(checkpoint)
    dcp.load(tensors, storage_reader=_Reader(folder))
