"""The table of a sharded checkpoint: which piece of which tensor is where.

torch stores it as a pickle. It is read with an unpickler that accepts only the few classes it consists of, so that
nothing in it can run code.
"""

import gc
import io
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, filesystem
from torch.distributed.checkpoint import metadata as tables
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

FILE = ".metadata"

_BUILT = {
    *(filesystem._StorageInfo, tables.Metadata, tables.MetadataIndex, tables.StorageMeta, tables.TensorProperties),
    *(tables.BytesStorageMetadata, tables.ChunkStorageMetadata, tables.TensorStorageMetadata),
}
_KNOWN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    *((made.__module__, made.__name__) for made in _BUILT),
}


class UnknownNameError(pickle.UnpicklingError):
    """A name of torch or Python's own that other versions may use in a table."""


class OnlyTensors(DefaultLoadPlanner):
    """Loads nothing else: torch's would unpickle any class, and the table may have changed since it was checked."""

    def load_bytes(self, *_: Any) -> None:
        raise pickle.UnpicklingError("an entry that is no tensor")


class _Call:
    """Stands for something that a table may only call."""

    __slots__ = ("_real",)

    def __init__(self, real: Callable[..., Any]) -> None:
        self._real = real

    def __call__(self, *args: Any) -> Any:
        return self._real(*args)


def _stand_in(real: type) -> type:
    """Makes objects of `real`, without attributes."""
    return type(real.__name__, (), {"__new__": lambda *_: object.__new__(real)})


class _Choice(int):
    """Stands for a memory format."""

    __slots__ = ()


class _Properties(tables.TensorProperties):
    def __setstate__(self, state: Any) -> None:
        known = state[:5]  # torch 2.15 adds strides, which older ones refuse
        super().__setstate__(tuple(tables._MEM_FORMAT_ENCODING(v) if type(v) is _Choice else v for v in known))
        self.__class__ = tables.TensorProperties  # type: ignore[assignment]


class _Unpickler(pickle.Unpickler):
    """Knows nothing else than the classes in _KNOWN, and sets attributes only on objects of those in _BUILT.

    The opcode BUILD would also set attributes of a class, a function or a choice of an enum, for the whole process. The
    unpickler in C cannot override it (the one in Python can, but takes several times as long), so it gets none of
    these, but stand-ins, made anew for each table.
    """

    def __init__(self, file: io.BufferedIOBase) -> None:
        super().__init__(file)
        self._found: dict[tuple[str, str], Any] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if (module, name) not in _KNOWN:
            may_be = module.partition(".")[0] in ("torch", "pathlib", "collections")
            kind = UnknownNameError if may_be else pickle.UnpicklingError
            raise kind(f"{module}.{name} does not belong in {FILE}")
        if (module, name) not in self._found:
            real: Any = super().find_class(module.removesuffix("._local"), name)  # Python 3.13's name for pathlib
            if real in _BUILT:
                self._found[module, name] = _stand_in(_Properties if real is tables.TensorProperties else real)
            else:
                self._found[module, name] = _Call(_Choice if real is tables._MEM_FORMAT_ENCODING else real)
        return self._found[module, name]


def parse(data: bytes) -> Metadata:
    """The table in the bytes of its file.

    Raises:
        pickle.UnpicklingError: it contains something else, or impossible numbers. Damage may raise any other error.
    """
    searches = gc.isenabled()
    gc.disable()  # searching the many objects for garbage would take most of the time
    try:
        metadata = _Unpickler(io.BytesIO(data)).load()
    finally:
        if searches:
            gc.enable()
    if type(metadata) is not Metadata or {dict} != {type(metadata.state_dict_metadata), type(metadata.storage_data)}:
        raise pickle.UnpicklingError("no table")
    for key, info in metadata.state_dict_metadata.items():
        if type(key) is not str:
            raise pickle.UnpicklingError("a tensor without a name")
        if type(info) is tables.TensorStorageMetadata:
            sizes = [info.size, *(size for chunk in info.chunks for size in (chunk.offsets, chunk.sizes))]
            if {torch.Size} != set(map(type, sizes)) or not isinstance(info.properties.dtype, torch.dtype):
                raise pickle.UnpicklingError("a tensor without sizes or dtype")
            ends = ((o, n, end) for c in info.chunks for o, n, end in zip(c.offsets, c.sizes, info.size, strict=True))
            if min(info.size, default=0) < 0 or any(min(o, n) < 0 or o + n > end for o, n, end in ends):
                raise pickle.UnpicklingError("a piece that lies outside of its tensor")
        elif type(info) is not tables.BytesStorageMetadata or vars(info):
            raise pickle.UnpicklingError("an entry that is no tensor")
    for index, place in metadata.storage_data.items():
        name = place.relative_path
        kinds = tuple(map(type, (index, index.fqn, name, place.offset, place.length)))
        if kinds != (MetadataIndex, str, str, int, int) or min(place.offset, place.length) < 0:
            raise pickle.UnpicklingError("an entry without a valid place in a file")
        if "/" in name or name in ("", ".", ".."):
            raise pickle.UnpicklingError(f"{name!r} lies outside of the folder")
    return metadata
