"""What the processes of a run tell each other before they are connected."""

import os
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any

import torch.distributed as dist
from jsonargparse import Namespace
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment

from salt_lightning.run import slurm

_SEEN = "SALT_LIGHTNING_SEEN"  # environment variable: what that process has looked at and found right
_MEETING = timedelta(minutes=5)  # longer than the first process may wait for an earlier start to end
_LOOKING = timedelta(minutes=30)  # one may read from a slower disk; afterwards, connecting waits as long

_TOLD: tuple[str, str] | None = None


def tell(trainer: Any) -> None:
    """Takes from the trainer's settings which pod or node this process starts on, and of how many: no launcher has put
    that into the environment."""
    global _TOLD
    _TOLD = None
    if not isinstance(trainer, Namespace):
        return  # an error comes later
    plugins = trainer.get("plugins")
    named = [
        str(plugin.get("class_path")) for plugin in (plugins if isinstance(plugins, list) else [plugins]) if plugin
    ]
    launched = "LOCAL_RANK" in os.environ or slurm.tasks() > 1
    if launched or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return
    if any(name.endswith("KubeflowEnvironment") for name in named):
        _TOLD = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    elif trainer.get("num_nodes"):  # on each node, the process that will start the others there
        _TOLD = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0")), str(trainer.num_nodes)


class _Others:
    """The processes that were started together with this one, before they are connected: they meet at the store by
    which they connect later, which torch takes over from here."""

    def __init__(self, rank: int, number: int) -> None:
        self.rank, self.number, self._round = rank, number, 0
        # As if alone, so that it waits for nobody here: it must remain if not all come, since the others connect by it.
        store, *_ = next(dist.rendezvous("env://", self.rank, world_size=1, timeout=_MEETING))
        self._store = dist.PrefixStore("salt_lightning", store)
        self._met = False
        with suppress(RuntimeError, TimeoutError):
            self._store = dist.PrefixStore(self._meet(self._store), self._store)
            self._met = True

    def _meet(self, store: dist.Store) -> str:
        """A name for this meeting. Under torchrun the store outlives a restart, so what an earlier process left must
        not be taken for what the others say: a process of the same rank goes by another name each time."""
        own = uuid.uuid4().hex
        if self.rank == 0:
            store.set("first", own)
            names = store.multi_get([f"{own}/{rank}" for rank in range(1, self.number)])
            store.set(f"{own}/all", b" ".join(names).decode())
            return own
        deadline = time.monotonic() + _MEETING.total_seconds()
        while time.monotonic() < deadline:
            first = store.get("first").decode()
            store.set(f"{first}/{self.rank}", own)
            if store.check([f"{first}/all"]) and own in store.get(f"{first}/all").decode():
                return first
            time.sleep(0.1)
        raise TimeoutError

    def exchange(self, text: str, limit: timedelta) -> list[str]:
        """The text of each process, by rank, once all have called this; empty, from then on, if one does not come."""
        if not self._met:
            return []
        self._round += 1
        keys = [f"{self._round}/{rank}" for rank in range(self.number)]
        try:
            self._store.set(keys[self.rank], text.encode("unicode_escape").decode())
            self._store.set_timeout(limit)
            return [value.decode("unicode_escape") for value in self._store.multi_get(keys)]
        except RuntimeError:  # of torch
            self._met = False  # what the others say next would be taken for an answer to something else
            return []


def _others() -> _Others | None:
    """None if there are none, or their store cannot be reached in time; connecting will say so."""
    return _met(_TOLD)


@cache  # a store must live as long as the others may connect to it
def _met(told: tuple[str, str] | None) -> _Others | None:
    with suppress(RuntimeError, ValueError):  # of torch; of Lightning; of a MASTER_PORT that is no number
        if TorchElasticEnvironment.detect():
            environment: ClusterEnvironment = TorchElasticEnvironment()
        elif slurm.tasks() > 1 and SLURMEnvironment.detect():
            environment = SLURMEnvironment()
        else:
            rank, number = map(int, told or (0, 1))
            return _Others(rank, number) if 0 <= rank < number > 1 else None
        os.environ["MASTER_ADDR"] = environment.main_address  # as Lightning does later
        os.environ["MASTER_PORT"] = str(environment.main_port)
        return _Others(environment.global_rank(), environment.world_size()) if environment.world_size() > 1 else None
    return None


def gather(text: str = "") -> list[str]:
    """The text of each process, once all that were started together have called this, if they can be reached: processes
    of torchrun and srun, pods, or the first processes of nodes; else empty."""
    others = _others()
    return others.exchange(text, _MEETING) if others else []


def divide(what: str, look: Callable[[int, int], str | None]) -> str | None:
    """What one of a run's processes has found wrong with something that each must know to be right, before they are
    connected; None if nothing.

    `look(part, parts)` looks at a part. Processes with the same `what` take a part each, and all get the same answer.
    Without others, or if they do not come in time, a process looks at everything by itself. One that Lightning starts
    relies on the one that started it.
    """
    if "LOCAL_RANK" in os.environ and os.environ.get(_SEEN) == f"{os.getppid()} {what}":
        return None
    found: list[str] = []
    if (others := _others()) and (named := others.exchange(what, _MEETING)):
        same = [rank for rank, other in enumerate(named) if other == what]
        own = look(same.index(others.rank), len(same))
        found = others.exchange(own or "", _LOOKING)
    if wrong := next(filter(None, found or [look(0, 1) or ""]), None):
        return wrong
    os.environ[_SEEN] = f"{os.getpid()} {what}"
    return None
