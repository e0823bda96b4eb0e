"""The buckets in which DDP sums gradients."""

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel


def settle(module: Any) -> None:
    """Gives DDP its final buckets at each start of a fit, which it would otherwise make after the first step.
    Collective.

    torch sums the gradients of the first step in one bucket, and those of later ones in the order in which that step's
    became ready. With three or more ranks, its place in a bucket decides the order in which a gradient is summed: the
    first step after a resume would round otherwise than that of a run that never stopped.
    """
    ddp = module.trainer.strategy.model
    if not isinstance(ddp, DistributedDataParallel) or module.trainer.world_size < 3:
        return
    if ddp.find_unused_parameters or ddp.static_graph:  # keeps its buckets; or the first step decides for all
        return

    def untrained(_: torch.Tensor) -> torch.Tensor:
        # autograd takes what came last first, as through layers. Not the student's own forward: it may be of any kind,
        # have hooks that need a batch, or change buffers, which a run that never stopped does once
        return torch.stack([p.sum(dtype=torch.float32) for p in module.parameters() if p.requires_grad]).sum() * 0

    forward, module.forward = module.forward, untrained
    try:
        ddp(torch.zeros((), device=module.device)).backward()
    finally:
        module.forward = forward
    module.zero_grad()
