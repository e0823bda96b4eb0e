"""How a model is sharded: FSDP2 over all devices, FSDP1, DDP and one device train the same module.

Each transformer block is its own FSDP group. Embedding, final norm and head belong to the root group, whose forward
computes the loss: there the head weight is whole, tied or not.
"""

from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from functools import partial
from inspect import signature
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from jsonargparse import Namespace
from lightning.pytorch import strategies
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
    StrategyRegistry,
    XLAStrategy,
)
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import wrap
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint as recompute
from transformers.modeling_layers import GradientCheckpointingLayer

from salt_lightning.command.settings import wrong_precision
from salt_lightning.errors import ConfigError, few, refuse
from salt_lightning.fit.averaging import averages
from salt_lightning.fit.device import require_compiler
from salt_lightning.hugging_face import quantized
from salt_lightning.models import CausalLM, read_checkpoint
from salt_lightning.run import peers
from salt_lightning.storage import shards

_GRAPHS = 64  # of one function; torch's limit is 8

# Weights are gathered and used in bf16, and gradients are reduced in fp32. Inputs of a forward are not cast: among
# them are the loss's KD weight and number of tokens, for which bf16 has only 8 bits.
POLICIES = {
    "32-true": MixedPrecisionPolicy(),
    "bf16-mixed": MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False),
    "bf16-true": MixedPrecisionPolicy(reduce_dtype=torch.float32, cast_forward_inputs=False),
}
# The same for FSDP1; Lightning's default reduces in bf16 and rounds the frequencies of rotary embeddings.
_FSDP1_POLICIES = {
    "32-true": None,
    "bf16-mixed": MixedPrecision(torch.bfloat16, torch.float32, torch.float32, cast_root_forward_inputs=False),
    "bf16-true": MixedPrecision(reduce_dtype=torch.float32, cast_root_forward_inputs=False),
}


class FSDP2(ModelParallelStrategy):
    """FSDP2 over all devices: weights, gradients and optimizer are sharded; each block is gathered while in use.

    The first rank reads or creates a model and sends the others their shards: no other process ever holds it whole.

    Args:
        replicas: Copies of the model (hybrid sharding), each sharded over world size / replicas neighboring devices.
            1: one copy over all devices; the number of nodes: shards stay within a node, only gradients cross nodes,
            once per step.
        shard_teacher: Shard the teacher too, separately. false: a whole copy on each device, with nothing to gather.
        save_distributed_checkpoint: Save a checkpoint as a folder with one file per rank. false: as one file, gathered
            on the first rank.
        timeout_minutes: Minutes that a rank waits for the others before it gives up, from 0.01 to 1000000.
    """

    def __init__(
        self,
        replicas: int = 1,
        shard_teacher: bool = True,
        save_distributed_checkpoint: bool = True,
        timeout_minutes: float = 30.0,
    ) -> None:
        if not 0.01 <= timeout_minutes <= 1e6:  # torch ends with a trace at 0; a longer one does not fit its clocks
            raise ConfigError(f"--trainer.strategy.timeout_minutes {timeout_minutes:g} must be from 0.01 to 1000000")
        timeout = timedelta(minutes=timeout_minutes)
        super().__init__(save_distributed_checkpoint=save_distributed_checkpoint, timeout=timeout)
        self.replicas, self.shard_teacher = replicas, shard_teacher

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:  # also before the processes exist
        return {"num_replicas": self.num_nodes * self.num_processes, "rank": self.global_rank}

    def setup_environment(self) -> None:
        # Lightning's default is data parallel across nodes, tensor parallel within one; YAML cannot say "over all".
        self._data_parallel_size, self._tensor_parallel_size = self.num_nodes * self.num_processes, 1
        super().setup_environment()
        self._sizes = (self.replicas, self.world_size // self.replicas)
        self._mesh = self.device_mesh["data_parallel"]
        if self.replicas > 1:
            self._mesh = init_device_mesh(self.root_device.type, self._sizes, mesh_dim_names=("replicate", "shard"))

    def _setup_distributed(self) -> None:
        super()._setup_distributed()
        peers.require_same_strategy(self)  # the mesh is next: each of its dimensions is made by all ranks together

    def shard(self, lm: CausalLM, policy: MixedPrecisionPolicy) -> None:
        """Shards the first rank's model over all ranks, group by group, in place."""
        lm.keep_apart(self.broadcast(lm.apart))
        for group in (*blocks(lm), lm):
            _receive(group, self)
            fully_shard(group, mesh=self._mesh, mp_policy=policy, shard_placement_fn=self._placement)

    def _placement(self, p: nn.Parameter) -> Shard | None:
        """The dimension to split experts (experts, in, out) by: the first that is divisible by the devices. With fewer
        experts than devices, splitting by expert would leave some devices without one. None: the first dimension."""
        return next((Shard(i) for i, n in enumerate(p.shape) if p.ndim == 3 and n % self._sizes[1] == 0), None)

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Gradients go to the other replicas once per step, with its last micro-batch; torch alone sends each
        micro-batch's, and keeps what it sends until the backward pass ends."""
        super().pre_backward(closure_loss)
        if self.replicas > 1:
            module: Any = self.lightning_module
            module.student.set_requires_all_reduce(not module.trainer.fit_loop._should_accumulate())

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self._for_saving(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state_dict, gathered if a checkpoint is one file."""
        state = optimizer.state_dict()
        others = {key for each in state["state"].values() for key, value in each.items() if not torch.is_tensor(value)}
        if others:
            raise ConfigError(
                f"{type(optimizer).__name__} keeps {few(sorted(others))} as numbers; under FSDP2, whose checkpoints "
                "hold tensors, it must keep tensors"
            )
        return {**state, "state": {number: self._for_saving(tensors) for number, tensors in state["state"].items()}}

    def _for_saving(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if self._save_distributed_checkpoint:
            return tensors
        kept = {}
        for name, tensor in tensors.items():  # one by one: all ranks gather, only the first keeps it
            whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.is_global_zero:
                kept[name] = whole.cpu()
        return kept

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        path = Path(self.broadcast(filepath))
        if self._save_distributed_checkpoint:
            shards.write(checkpoint, path)
        else:
            Strategy.save_checkpoint(self, checkpoint, path)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads this rank's shards of module and optimizer from any strategy's checkpoint; returns the rest of it."""
        assert self.lightning_module is not None
        path = Path(self.broadcast(checkpoint_path))
        checkpoint = read_checkpoint(str(path), "--ckpt_path")
        if self.optimizers:
            shards.require_whole(checkpoint)
        weights = self.lightning_module.state_dict()
        check_same_model(weights, checkpoint["state_dict"], f"--ckpt_path {path} holds another student")
        saved = shards.optimizer_layout(checkpoint) if self.optimizers else {}
        states = [_empty_state(optimizer, saved) for optimizer in self.optimizers]  # empty except in fit
        if path.is_dir():
            shards.load_into({"state_dict": weights, "optimizer_states": states}, path)
        else:
            for name, tensor in weights.items():
                _copy(tensor, checkpoint["state_dict"][name])
            for ours in states:
                for name, tensors in ours["state"].items():
                    for key, tensor in tensors.items():
                        _copy(tensor, saved[name][key])
        return {key: value for key, value in checkpoint.items() if key not in ("state_dict", "optimizer_states")}


StrategyRegistry.register("fsdp2", FSDP2, "FSDP2 over all devices", override=True)  # a name, as fsdp and ddp are


SHARDS_MODELS = FSDP2 | FSDPStrategy  # the strategies that shard models, of those that `check` accepts


def _empty_state(optimizer: Optimizer, saved: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Any]:
    """Empty tensors, by name, for the optimizer state in a checkpoint; the optimizer has them, loading fills them."""
    state: dict[str, dict[str, Tensor]] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
            state[name] = {
                key: torch.zeros_like(parameter, dtype=None if tensor.is_floating_point() else tensor.dtype)
                if tensor.shape == parameter.shape
                else torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
                for key, tensor in saved.get(name, {}).items()
            }
            if state[name]:
                optimizer.state[parameter] = state[name]
    return {"state": state, "param_groups": []}


@torch.no_grad()
def _copy(target: Tensor, whole: Tensor) -> None:
    """Copies this rank's part of `whole`, which may be mapped from disk, into `target`."""
    if isinstance(target, DTensor):
        whole = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None).to_local()
        target = target.to_local()
    target.copy_(whole)


def check_same_model(ours: Mapping[str, Tensor], saved: Mapping[str, Tensor], said: str) -> None:
    """Raises ConfigError, beginning with `said`, that names the first weights where model and checkpoint differ."""
    shapes = getattr(saved, "shapes", None) or {name: tensor.shape for name, tensor in saved.items()}
    here = {name: tensor.shape for name, tensor in ours.items()}
    differing = [name for name in sorted({*here, *shapes}) if here.get(name) != shapes.get(name)]
    if differing:
        shown = (f"{name} {_size(here.get(name))} (checkpoint: {_size(shapes.get(name))})" for name in differing[:5])
        raise ConfigError(f"{said} ({len(differing)} of its weights differ: {', '.join(shown)})")


def _size(shape: torch.Size | None) -> str:
    return "none" if shape is None else " x ".join(map(str, shape))


# ------------------------------------------------------- from a model to its shards


def blocks(lm: CausalLM) -> list[nn.Module]:
    """The transformer blocks, in order."""
    found: list[nn.Module] = [module for module in lm.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise ConfigError(
            f"--model.{lm.name}: {type(lm.model).__name__} has no transformers blocks (GradientCheckpointingLayer), "
            "which sharding and --model.activation_checkpointing need; train it with --trainer.strategy ddp"
        )
    return found


def build_device(strategy: Strategy | None, whole: torch.device) -> torch.device:
    """Where to build a model before it is distributed: `whole`, or, if sharded by FSDP2, only the first rank's CPU."""
    if isinstance(strategy, FSDP2):
        return torch.device("cpu" if strategy.is_global_zero else "meta")
    return whole


def distribute(lm: CausalLM, strategy: Strategy | None, compile: bool) -> nn.Module:
    """The student as the strategy needs it: sharded or unchanged. Collective."""
    if compile:
        _compile(lm, strategy, in_blocks=isinstance(strategy, SHARDS_MODELS))
    if isinstance(strategy, FSDP2):
        strategy.shard(lm, POLICIES[strategy.precision_plugin.precision])
    elif isinstance(strategy, FSDPStrategy):
        policy = _FSDP1_POLICIES[strategy.precision_plugin.precision]
        own = {"mixed_precision": policy, "device_id": strategy.root_device}
        inside = {id(block) for block in blocks(lm)}
        for parent in list(lm.model.modules()):
            for name, child in list(parent.named_children()):
                if id(child) in inside:
                    setattr(parent, name, wrap(child, **own))  # `wrap` knows the strategy's settings
        return wrap(lm, **own)
    return lm


def distribute_teacher(lm: CausalLM, strategy: Strategy, compile: bool) -> CausalLM:
    """The frozen teacher on this rank's device: sharded separately with FSDP2, but whole if quantized. Collective.

    Its root group stays whole after a forward, so that the student's forward can use the head weight that the
    teacher's forward returns.
    """
    packed = quantized.method(lm.model) is not None
    in_shards = isinstance(strategy, FSDP2) and strategy.shard_teacher and not packed
    if compile:
        _compile(lm, strategy, in_blocks=in_shards)
    if isinstance(strategy, FSDP2):
        if in_shards:
            strategy.shard(lm, MixedPrecisionPolicy())
            return lm
        lm.keep_apart(strategy.broadcast(lm.apart))
        if not packed:  # else each process has loaded it
            _receive(lm, strategy)
    return lm.to(strategy.root_device)


@torch.no_grad()
def _receive(group: nn.Module, strategy: FSDP2) -> None:
    """Replaces every whole tensor of `group` by the first rank's, on this rank's device. Tied weights stay tied.

    A buffer that only the first rank has, a cache that own code has made while it was checked, is added.
    """
    whole = {name: t for name, t in (*group.named_parameters(), *group.named_buffers()) if not isinstance(t, DTensor)}
    received: dict[int, Any] = {}
    for name, shape, dtype in strategy.broadcast([(name, t.shape, t.dtype) for name, t in whole.items()]):
        old = whole.pop(name, None)
        if old is not None and strategy.is_global_zero:
            new = old.detach().to(strategy.root_device).contiguous()
        else:
            new = torch.empty(shape, dtype=dtype, device=strategy.root_device)
        dist.broadcast(new, 0)
        if old is None:
            parent, _, last = name.rpartition(".")
            group.get_submodule(parent).register_buffer(last, new, persistent=False)
        else:
            received[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    assert not whole, f"the first rank has no {few(sorted(whole))}"
    for module in group.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: received[id(old)] for name, old in tensors.items() if id(old) in received})


def recompute_activations(lm: CausalLM) -> None:
    """Makes each block keep only its input and run again in backward. Hooks of the block stay outside."""
    for block in blocks(lm):
        block.forward = partial(recompute, block.forward, use_reentrant=False)


def _compile(lm: CausalLM, strategy: Strategy | None, in_blocks: bool) -> None:
    """torch.compile without new names in the state dict; block by block if shards are gathered between blocks."""
    if strategy is not None:
        require_compiler(strategy.root_device.type)
    # All fits of a process compile the same function of transformers; after 8 graphs of it, later fits would not be.
    torch._dynamo.config.recompile_limit = max(_GRAPHS, torch._dynamo.config.recompile_limit)
    if in_blocks:
        for block in blocks(lm):
            block.forward = torch.compile(block.forward, dynamic=False)
    else:
        lm.backbone.compile(dynamic=False)


# ------------------------------------------------------------------- gradients


def clip_gradients(student: nn.Module, limit: float | None) -> Tensor:
    """Clips the gradients to a total norm of `limit` (None or 0: no clipping); returns the total norm before."""
    if isinstance(student, FullyShardedDataParallel):
        return student.clip_grad_norm_(limit or float("inf"))
    weights = list(student.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if limit:
        nn.utils.clip_grads_with_norm_(weights, limit, norm)
    return norm


def has_finite_weights(trainer: pl.Trainer, student: nn.Module) -> bool:
    """Whether all weights and their squares are finite on all ranks. Collective; waits for the device."""
    weights = [p.detach() for p in student.parameters()]
    # With FSDP2, a forward without backward, e.g. of a validation, leaves some weights whole.
    sharded, whole = ([w for w in weights if isinstance(w, DTensor) is kind] for kind in (True, False))
    norms = [nn.utils.get_total_norm(group) for group in (sharded, whole) if group]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    return bool(trainer.strategy.reduce(norm.isfinite().long(), reduce_op="min"))


def plain_name(name: str) -> str:
    """The name of a weight without the parts that FSDP1's wrappers add."""
    return name.replace("_fsdp_wrapped_module.", "")


# ---------------------------------------------------------------------- checks

_USE = "is not supported; use auto, ddp, fsdp2, fsdp (FSDP1), or the class path of a subclass of these"


def _is_supported(kind: type) -> bool:
    """DeepSpeed's and XLA's strategies derive from DDP's, but move data, clip and save in their own ways."""
    supported = issubclass(kind, SingleDeviceStrategy | DDPStrategy | SHARDS_MODELS)
    return supported and not issubclass(kind, DeepSpeedStrategy | XLAStrategy)


def name_class(config: Namespace) -> None:
    """Lets --trainer.strategy be a class's name alone, which jsonargparse takes for text."""
    asked = config.get("trainer.strategy")
    if not isinstance(asked, str) or asked.lower() in (*StrategyRegistry, "auto"):
        return
    # of its module when it is imported, or because it needs arguments: `require_supported` refuses the name
    with suppress(Exception, SystemExit):
        kind = getattr(strategies, asked, None) or resolve_name(asked)
        signature(kind).bind()
        if isinstance(kind, type) and _is_supported(kind):
            whole = asked if "." in asked else f"{strategies.__name__}.{asked}"
            config["trainer.strategy"] = Namespace(class_path=whole)


def require_supported(asked: Any) -> None:
    """Raises ConfigError for a strategy, as a config names it, that cannot train here.

    Called before Lightning sees it: its errors advise other strategies that do not work here, or to install them.
    """
    if path := getattr(asked, "class_path", None):
        name, kind = path.rpartition(".")[2], resolve_name(path)
        if not isinstance(kind, type):  # a function; `check` sees what it returns
            return
    else:
        name, key = asked, str(asked).lower()  # as Lightning reads names
        kind = StrategyRegistry[key]["strategy"] if key in StrategyRegistry else None
        if key == "auto":
            return
    if kind is None or not _is_supported(kind):
        raise ConfigError(f"--trainer.strategy {name} {_USE}")
    if kind is FSDPStrategy and not torch.cuda.is_available():
        raise ConfigError(
            f"--trainer.strategy {name} (FSDP1) needs GPUs; use --config configs/fsdp.yaml (FSDP2), which also runs on "
            "CPUs"
        )


def check(trainer: pl.Trainer, ckpt_path: str | None = None) -> None:
    """Raises ConfigError if the strategy cannot train this project's module, or not on this machine or checkpoint."""
    strategy, world = trainer.strategy, trainer.world_size
    name = f"--trainer.strategy {type(strategy).__name__}"
    if not _is_supported(type(strategy)):
        raise ConfigError(f"{name} {_USE}")
    peers.require_place(trainer)
    if isinstance(strategy, FSDP2) and (strategy.replicas < 1 or world % strategy.replicas):
        fitting = ", ".join(str(n) for n in range(1, world + 1) if world % n == 0)
        raise ConfigError(
            f"--trainer.strategy.replicas {strategy.replicas} does not fit {world} devices (--trainer.devices times "
            f"--trainer.num_nodes); use one of {fitting}"
        )
    if isinstance(strategy, SHARDS_MODELS) and (found := averages(trainer)):
        raise ConfigError(
            f"--trainer.callbacks {type(found[0]).__name__} copies whole models, but {name} shards them; use ddp"
        )
    if isinstance(strategy, SHARDS_MODELS):
        refuse(wrong_precision(trainer.precision))
    if isinstance(strategy, FSDPStrategy) and strategy._state_dict_type == "sharded":
        raise ConfigError(
            f"{name} with state_dict_type sharded is not supported: a crash could leave half a checkpoint; use full, "
            "or --config configs/fsdp.yaml, which writes a file per rank atomically"
        )
    if isinstance(strategy, FSDPStrategy) and ckpt_path is not None and Path(ckpt_path).is_dir():
        raise ConfigError(
            f"--ckpt_path {ckpt_path} is a folder of shards, which {name} (FSDP1) cannot read; resume from it with "
            "--config configs/fsdp.yaml, ddp, or one device"
        )
    asked, on_gpu = getattr(strategy, "process_group_backend", None), strategy.root_device.type == "cuda"
    if asked == "nccl" and not on_gpu:
        raise ConfigError(f"--trainer.strategy.process_group_backend {asked} is for GPUs; leave it out, or use gloo")
    if world > 1 and on_gpu and not dist.is_nccl_available():
        raise ConfigError(f"{name} on {world} GPUs needs NCCL, which this torch {torch.__version__} was built without")


def device_remark(trainer: pl.Trainer) -> tuple[str, str] | None:
    """What may be a surprise about a run's device, and what to do; None: nothing."""
    device = trainer.strategy.root_device
    if device.type not in ("cuda", "cpu"):
        return f"{device.type}: this project has never been run on such a device", "--trainer.accelerator cpu is tested"
    bf16 = "bf16" in str(trainer.precision) and device.type == "cuda"
    if bf16 and not torch.cuda.is_bf16_supported(including_emulation=False):
        said = f"{torch.cuda.get_device_name(device)} emulates bf16, which is slower than fp32 and cannot be compiled"
        return said, "--trainer.precision 32-true"
    return None
