"""The buckets in which DDP sums gradients."""

from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from salt_lightning.hugging_face.attention import testable


def settle(module: Any) -> None:
    """Gives DDP, at each start of a fit, the buckets that it would otherwise have from the second step on. Collective.

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
        with testable(module.student):
            hidden_ND = module.student.hidden()
        # with every weight, as DDP waits for all; for those of the head and of a subclass's parts, first
        return torch.stack([hidden_ND.sum(), *(p.sum() for p in module.parameters() if p.requires_grad)]).sum() * 0

    forward, module.forward = module.forward, untrained
    try:
        with module.trainer.precision_plugin.train_step_context(), torch.compiler.set_stance("force_eager"):
            ddp(torch.zeros((), device=module.device)).backward()
    finally:
        module.forward = forward
    module.zero_grad()
