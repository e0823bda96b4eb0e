"""What a run's settings need of the device and the machine that it runs on."""

import os
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from salt_lightning.errors import ConfigError, raised, refuse
from salt_lightning.hugging_face.attention import require_gpu
from salt_lightning.text import processes


def require(module: Any, kind: str) -> None:
    """Raises ConfigError for what a SALTModule needs and a device of this kind (cpu, cuda), or its machine, lacks."""
    looks = [partial(require_gpu, module.student_spec.attention, kind)]
    refuse(raised([*looks, *([partial(require_compiler, kind)] if module.hparams["compile"] else ())]))


def memory_bytes(kind: str, num_devices: int) -> int | None:
    """Memory that each device of this kind (cpu, cuda) can use; None: there is no such device here."""
    if kind == "cpu":
        return processes.memory_bytes() // max(1, num_devices)  # which share it
    return torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None


def require_compiler(kind: str) -> None:
    """Raises ConfigError if torch.compile would find no compiler, or a folder for code from which none can be loaded.

    Images of containers often lack a compiler, which torch.compile needs for the code that it writes on a CPU, and
    Triton to start a kernel on a GPU.
    """
    names: list[str] = []
    if kind == "cpu" and not os.environ.get("TORCH_INDUCTOR_INSTALL_GXX"):  # torch would install one
        from torch._inductor import config  # slow to import

        names = [name for name in np.atleast_1d(config.cpp.cxx).tolist() if name]
    elif kind == "cuda" and torch.cuda.is_available():  # if not, `check` estimates for another machine
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if names and not any(map(shutil.which, names)):
        raise ConfigError(
            f"--model.compile true needs a compiler, {' or '.join(names)}, and finds none; install it (in a container "
            "e.g. apt-get install g++), or set --model.compile false"
        )
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()).absolute()
    there = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if os.statvfs(there).f_flag & getattr(os, "ST_NOEXEC", 0):  # as Docker mounts a tmpfs
        raise ConfigError(
            f"--model.compile true writes code into {folder}, which is mounted noexec; set TORCHINDUCTOR_CACHE_DIR to "
            "another folder, or set --model.compile false"
        )
