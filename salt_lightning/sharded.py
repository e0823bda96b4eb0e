"""Checkpoints that are folders, one file per rank, read by one process: no process group, one tensor at a time.

    step-00000100.ckpt/
      meta.pt         all that is no tensor: settings, counters
      .metadata       torch.distributed.checkpoint's table: which piece of which tensor lies where
      __0_0.distcp    the pieces of rank 0, each as torch.save writes it

The table is a pickle, and torch's own reader does whatever a pickle says. Here nothing but the few names that such a
table needs is ever looked up; all the rest is read with weights_only=True.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

from salt_lightning.errors import ConfigError

_META, _TABLE, _PREFIX = "meta.pt", ".metadata", "state_dict."
_CLASSES = (
    "BytesStorageMetadata",
    "ChunkStorageMetadata",
    "Metadata",
    "MetadataIndex",
    "StorageMeta",
    "TensorProperties",
    "TensorStorageMetadata",
    "_MEM_FORMAT_ENCODING",
)
_NAMES = {
    *(("torch.distributed.checkpoint.metadata", name) for name in _CLASSES),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),  # a look-up by name
    ("torch", "Size"),
    ("pathlib", "PosixPath"),  # where it was saved
    ("pathlib._local", "PosixPath"),
}


class _TableUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _NAMES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_sharded(path: str, setting: str) -> dict[str, Any]:
    """A sharded checkpoint as plain data, like one in a single file; its `state_dict` reads a tensor when asked for it.

    Raises:
        ConfigError: a file is missing, cut off, or holds what no checkpoint of ours does; starts with `setting`.
    """
    folder = Path(path)
    for name in (_META, _TABLE):
        if not (folder / name).is_file():
            raise ConfigError(f"{setting} {path} is not a whole checkpoint of this project ({name} is missing)")
    try:
        checkpoint = torch.load(folder / _META, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{setting} {folder / _META} cannot be read ({type(error).__name__})") from error
    return {**checkpoint, "state_dict": ShardedTensors(folder, read_table(folder, setting), setting)}


def read_table(folder: Path, setting: str) -> Metadata:
    """The table of a torch.distributed.checkpoint folder, without running anything that it may hold.

    Raises:
        ConfigError: it is damaged, asks for anything but what such tables are made of, or a file lacks what it lists.
    """
    try:
        with open(folder / _TABLE, "rb") as file:
            table = _TableUnpickler(file).load()
        ends: dict[str, int] = {}
        for info in table.storage_data.values():
            if info.transform_descriptors:
                raise pickle.UnpicklingError(f"its tensors are packed by {info.transform_descriptors}")
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
    except Exception as error:  # a damaged pickle may end in any of them
        raise ConfigError(f"{setting} {folder / _TABLE} is no table of a checkpoint: {error}") from error
    for name, end in sorted(ends.items()):
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None or size < end:
            what = "is missing" if size is None else f"has {size} bytes of {end}"
            raise ConfigError(f"{setting} {folder} is not a whole checkpoint: {name} {what}; copy the folder again")
    return table


class ShardedTensors(Mapping[str, Tensor]):
    """The model's tensors in a sharded checkpoint, by name; each is put together from its pieces when asked for.

    Reading one takes up to three times its own memory, for a moment: the whole, a piece as bytes, and as a tensor.
    """

    def __init__(self, folder: Path, table: Metadata, setting: str) -> None:
        self._folder, self._setting, self._storage = folder, setting, table.storage_data
        self._stored = {
            name.removeprefix(_PREFIX): stored
            for name, stored in table.state_dict_metadata.items()
            if name.startswith(_PREFIX) and isinstance(stored, TensorStorageMetadata)
        }

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def on_meta(self, name: str) -> Tensor:
        """Shape and dtype alone: nothing is read."""
        stored = self._stored[name]
        return torch.empty(stored.size, dtype=stored.properties.dtype, device="meta")

    def __getitem__(self, name: str) -> Tensor:
        stored = self._stored[name]
        whole = torch.empty(stored.size, dtype=stored.properties.dtype)
        filled = 0
        for chunk in stored.chunks:
            piece = self._piece(name, chunk.offsets)
            if piece.shape != chunk.sizes or piece.dtype != whole.dtype:
                raise self._damaged(name, f"{tuple(piece.shape)} {piece.dtype} instead of {tuple(chunk.sizes)}")
            box = [slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True)]
            whole[tuple(box)] = piece
            filled += piece.numel()
        if filled != whole.numel():  # the rest would be whatever was in memory
            raise self._damaged(name, f"{filled} of {whole.numel()} elements")
        return whole

    def _piece(self, name: str, offsets: torch.Size) -> Tensor:
        try:
            info = self._storage[MetadataIndex(_PREFIX + name, offsets)]
            with open(self._folder / info.relative_path, "rb") as file:
                file.seek(info.offset)
                data = io.BytesIO(file.read(info.length))
            return torch.load(data, map_location="cpu", weights_only=True)
        except (KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise self._damaged(name, type(error).__name__) from error

    def _damaged(self, name: str, reason: str) -> ConfigError:
        return ConfigError(f"{self._setting} {self._folder} is damaged: {name} cannot be read ({reason})")
