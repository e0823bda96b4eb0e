# ruff: noqa: E402  (torch detects its devices when it is imported)
"""One optimizer step of a real fit, a batch of its validation, and compiled steps, on a CUDA device without data.

Its tensors are torch's FakeTensors of cuda:0: they have shapes, dtypes and gradients. Reading one, copying it to the
CPU, or an op on tensors of two devices raises: this shows without a GPU what a GPU would wait for or refuse.

python tests/fake_cuda.py CORPUS CACHE TEACHER "FAMILY bf16|fp32 packed|mask"...; needs g++ and torch's CPU build.
Each case runs in a separate process, forked after the imports.
"""

import ctypes
import importlib.util
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

NOT_BUILT = 77  # exit code if the compiler lacks headers or libraries
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
TORCH = Path(importlib.util.find_spec("torch").origin).parent


def load_device() -> None:
    """Loads the device before torch is imported, because torch detects its devices only once."""
    with tempfile.TemporaryDirectory() as folder:
        built = f"{folder}/fake_cuda.so"
        include, libraries = f"-I{TORCH}/include", ["-lc10", "-ltorch_cpu"]
        flags = ["-shared", "-fPIC", "-std=c++20", include, str(HERE / "fake_cuda.cpp"), f"-L{TORCH}/lib", *libraries]
        done = subprocess.run(["g++", *flags, "-o", built], capture_output=True, text=True, check=False)
        if "No such file or directory" in done.stderr:  # headers or libraries
            sys.exit(NOT_BUILT)
        assert done.returncode == 0, done.stderr
        for library in (TORCH / "lib" / "libc10.so", TORCH / "lib" / "libtorch_cpu.so", built):
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


load_device()

import lightning.pytorch as pl
import torch
from families import FAMILIES
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from salt_lightning import KDScheduleCallback, ModelSpec, SALTDataModule, SALTModule
from salt_lightning.head import chunked_head
from salt_lightning.hugging_face import attention


class Event:
    def __init__(self, enable_timing: bool) -> None:
        pass

    def record(self) -> None:
        pass


class NoCopies(TorchDispatchMode):
    """Refuses copies between devices, because they make one device wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {x.device for x in (*args, out) if isinstance(x, torch.Tensor)}
            assert len(devices) == 1, f"{func} copies from device to device"
        return out


class Done(Exception):
    pass


class OnFakeGPU(pl.Callback):
    """Moves a fit's objects to the device before the first step, and ends the fit after one step there."""

    def __init__(self, bf16: bool, packed: bool, compiled: bool) -> None:
        self.bf16, self.packed, self.compiled = bf16, packed, compiled

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        try:
            self._step(module, batch)
        finally:
            del module.student  # otherwise Lightning would move it to the CPU

    def _step(self, module, batch):
        lms = [module.student, module.teacher]
        if self.packed:
            hindrances = [attention._change_over(lm.eval()) for lm in lms]
            assert hindrances == [None, None], hindrances
            lms[0].train()
        mode = FakeTensorMode()
        batch = {name: on_gpu(mode, tensor) for name, tensor in batch.items()}
        for lm in lms:
            move(mode, lm)
        for holder, names in (
            (module, ("kd_weight", "_sums", "_step_tokens")),
            (module._watch, ("first",)),
            (module.eval_metrics, module.eval_metrics._defaults),
        ):
            for name in names:
                setattr(holder, name, on_gpu(mode, getattr(holder, name)))
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=self.bf16)
        with mode, NoCopies():
            optimizer = module.configure_optimizers()
            for micro in range(2):
                with autocast:
                    loss = module.training_step(batch, micro)
                loss.backward()
            module.configure_gradient_clipping(optimizer, 1.0, "norm")
            module.on_before_optimizer_step(optimizer)
            optimizer.step()
            with autocast, torch.no_grad():
                module.validation_step(batch, 0)
                scored = module.predict_step(batch, 0)
        if self.compiled:
            with mode:
                self._compiled(lms, module, batch, autocast)
        made = [loss, module._grad_norm, module._sums, module.eval_metrics.nll_sum_S, scored["nll"]]
        assert all(tensor.device == torch.device("cuda:0") for tensor in made)
        raise Done

    def _compiled(self, lms, module, batch, autocast):
        """Checks that each model is one graph for any number of documents; traced for torch.compile, no kernels."""
        for lm in lms:
            lm.backbone.compile(dynamic=False, fullgraph=True, backend="aot_eager")  # a full parallel._compile
        counters.clear()
        for borders in (13, 9, 30, 2):
            cu_seqlens = torch.zeros(borders, dtype=torch.int32, device="cuda")
            with autocast:
                module.training_step({**batch, "cu_seqlens": cu_seqlens}, 0).backward()
        assert counters["stats"]["unique_graphs"] == len(lms), counters


def on_gpu(mode: FakeTensorMode, tensor: torch.Tensor) -> torch.Tensor:
    with mode:
        return mode.from_tensor(tensor).detach().to("cuda")


def move(mode: FakeTensorMode, model: torch.nn.Module) -> None:
    moved: dict[int, torch.Tensor] = {}  # keeps tied weights tied
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and id(tensor) not in moved:
                    there = on_gpu(mode, tensor)
                    is_weight = isinstance(tensor, torch.nn.Parameter)
                    moved[id(tensor)] = torch.nn.Parameter(there, tensor.requires_grad) if is_weight else there
                if tensor is not None:
                    tensors[name] = moved[id(tensor)]


def main(corpus: str, cache: str, teacher: str, family: str, precision: str, documents: str) -> None:
    torch.cuda.Event = Event
    torch.cuda.is_bf16_supported = lambda: True
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    chunked_head._triton_rows = lambda: None  # kernels do not accept fake tensors; tests/test_triton_rows.py tests them
    module = SALTModule(
        ModelSpec(family=family, config=FAMILIES[family] | {"vocab_size": 320}), ModelSpec(path=teacher)
    )
    data = SALTDataModule(source=corpus, cache_dir=cache, vocab_size=300, block_size=32, global_batch_size=16,
                          micro_batch_size=8, val_fraction=0.1, num_workers=0, prepare_workers=1)  # fmt: skip
    is_compiled = family in ("llama", "gpt_oss")  # one of each way; ten seconds each, and test_attention has others
    probe = OnFakeGPU(bf16=precision == "bf16", packed=documents == "packed", compiled=is_compiled)
    trainer = pl.Trainer(
        max_steps=4, callbacks=[KDScheduleCallback(steps=2), probe], accelerator="cpu", logger=False,
        enable_checkpointing=False, use_distributed_sampler=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=4,
    )  # fmt: skip
    try:
        trainer.fit(module, data)
    except Done:
        print(f"{family} {precision} {documents}: no sync, no device beside another", flush=True)


if __name__ == "__main__":
    where, cases = sys.argv[1:4], sys.argv[4:]
    for case in cases:
        if not (child := os.fork()):
            try:
                main(*where, *case.split())
            except BaseException:
                traceback.print_exc()
            os._exit(0)  # autograd's thread for the fake device would sometimes abort an ordinary exit
        os.waitpid(child, 0)
