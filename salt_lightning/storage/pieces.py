"""The table of a sharded checkpoint: which piece of which tensor is where, as JSON.

    {name of a tensor: [dtype, size, [[offsets, sizes, file, place in the file, length in bytes], ... one per piece]]}

torch writes the same into a pickle, `.metadata`, for its own tools; nothing here opens that.
"""

import gc
import json
import math

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

FILE = "pieces.json"


def dump(metadata: Metadata) -> bytes:
    """The contents of the file, from torch's own table of what was written."""
    table = {}
    for name, info in metadata.state_dict_metadata.items():
        if isinstance(info, TensorStorageMetadata):
            pieces = []
            for chunk in info.chunks:
                place = metadata.storage_data[MetadataIndex(name, chunk.offsets)]
                pieces.append([chunk.offsets, chunk.sizes, place.relative_path, place.offset, place.length])
            table[name] = [str(info.properties.dtype).removeprefix("torch."), info.size, pieces]
    return json.dumps(table).encode()


def parse(data: bytes) -> Metadata:
    """torch's table from the contents of the file.

    Raises:
        ValueError: it contains something else, or impossible numbers. Damage may raise any other error.
    """
    searches = gc.isenabled()
    gc.disable()  # searching the many objects for garbage would take most of the time
    try:
        tensors, places = dict[str, TensorStorageMetadata](), dict[MetadataIndex, _StorageInfo]()
        for name, (dtype, size, pieces) in json.loads(data).items():
            kind, chunks = getattr(torch, dtype), list[ChunkStorageMetadata]()
            if not isinstance(kind, torch.dtype):
                raise ValueError("a tensor without dtype")
            spans = (span for offsets, sizes, *_ in pieces for span in zip(offsets, sizes, size, strict=True))
            if min(size, default=0) < 0 or any(min(o, n) < 0 or o + n > end for o, n, end in spans):
                raise ValueError("a piece that lies outside of its tensor")
            if sum(math.prod(sizes) for _, sizes, *_ in pieces) != math.prod(size):
                raise ValueError("pieces that do not fill their tensor")
            for offsets, sizes, file, start, length in pieces:
                if {type(start), type(length)} != {int} or min(start, length) < 0 or type(file) is not str:
                    raise ValueError("a piece without a valid place in a file")
                if "/" in file or file in ("", ".", ".."):
                    raise ValueError(f"{file!r} lies outside of the folder")
                if not file.isprintable() or len(file) > 200:
                    raise ValueError("a piece in a file with an impossible name")
                chunks.append(ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)))
                places[MetadataIndex(name, offsets)] = _StorageInfo(file, start, length)
            tensors[name] = TensorStorageMetadata(TensorProperties(dtype=kind), torch.Size(size), chunks)
        return Metadata(dict(tensors), storage_data=places)
    finally:
        if searches:
            gc.enable()
