"""ScoreWriter: lets the teacher score the training rows (the verb `predict`), shard by shard.

Nothing waits for the device within a shard: the teacher's statistics collect there, are fetched once per shard, and
are written by a thread while the next shard is scored.
"""

import hashlib
import math
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from salt_lightning.errors import ConfigError, Stopped, counted
from salt_lightning.fit import alike
from salt_lightning.hugging_face.folders import config_hash
from salt_lightning.hugging_face.quantized import stored
from salt_lightning.run import peers
from salt_lightning.selection import row_scores
from salt_lightning.teacher import score_report
from salt_lightning.teacher.probe import judged
from salt_lightning.teacher.scores import Scores


def check_strategy(trainer: pl.Trainer) -> None:
    """Raises ConfigError for a strategy that shards models."""
    if not isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise ConfigError(
            f"--trainer.strategy {type(trainer.strategy).__name__} shards models, but predict needs the whole teacher "
            "on each device; use --trainer.strategy ddp"
        )


def check_start(trainer: pl.Trainer, module: Any) -> None:
    """Raises ConfigError if no teacher is named, or the strategy shards models. Needs no text."""
    if not module.has_teacher:
        raise ConfigError(
            "--model.teacher.path is null, but predict scores with the teacher; give an early checkpoint of it, a "
            "Hugging Face folder or a hub name"
        )
    check_strategy(trainer)


class ScoreWriter(pl.Callback):
    """Writes the teacher's loss and rank of every label of the training rows, and a report.

    Existing shards are kept, so the same command continues after a kill. Ranks take shards in turn. scores.json has
    the seconds of scoring (`scoring_s`): of the job, not summed over devices, like all seconds in compare; added up
    over all starts, each up to its last finished shard.

    Raises:
        ConfigError: the folder holds scores of other rows or of another teacher, or the teacher knows nothing of this
            text (accepted with KDScheduleCallback(allow_untrained=True)).
    """

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._written: Future | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        if stage != "predict":
            return
        self._stopped_by: signal.Signals | None = None
        self._filled = 0  # rows done of the current shard
        check_start(trainer, pl_module)
        data = trainer.datamodule  # type: ignore[attr-defined]
        pl_module.load_teacher()
        teacher, run = pl_module.teacher, Path(trainer.default_root_dir)
        fingerprint = f"{weights_fingerprint(teacher)}{config_hash(pl_module.teacher_spec.folder) or ''}"
        precision = f"{teacher.head.weight.dtype}, {trainer.precision}"
        scored = data.scored(teacher=fingerprint, precision=precision)
        alike.require(trainer, {**asdict(scored), "--data.micro_batch_size": data.micro_batch_size})
        if wrong := peers.not_shared(trainer, run):
            raise ConfigError(
                f"--run {run}: {wrong}; give a folder that all nodes share, since each writes shards of scores"
            )
        Scores.require_begun(run, scored)  # on every rank, so that all stop
        began_s = time.perf_counter()
        _check_teacher(trainer, teacher, str(pl_module.teacher_spec.path))
        self._checked_s = time.perf_counter() - began_s  # with what is compiled for it
        if trainer.is_global_zero:
            spec, per_token = pl_module.teacher_spec, pl_module.meter.forward_flops["teacher"]
            flops = per_token * (scored.num_rows * scored.block_size)
            origin = {
                "teacher": {"path": spec.path, "revision": spec.revision},
                "scoring_flops": None if math.isnan(flops) else flops,
                "scoring_s": 0.0,
                "versions": {name: version(name) for name in ("torch", "transformers", "lightning", "pyarrow")},
            }
            Scores.create(run, scored, origin)
        trainer.strategy.barrier("scores are there")
        self.scores = Scores(run, "--run")
        # as the first rank sees the folder: others may not see all of it yet
        missing = trainer.strategy.broadcast(self.scores.missing())
        self._shards = missing[trainer.global_rank :: trainer.world_size]
        data.score_only([*self._shards], bool(missing))
        self._num_tokens = sum(len(self.scores.rows(shard)) for shard in missing) * scored.block_size  # on all ranks
        done = scored.num_shards - len(missing)
        self._spent_s = self.scores.manifest.get("scoring_s", 0.0)  # by earlier starts
        rank_zero_info(
            f"scoring {scored.num_rows} rows of {scored.block_size} tokens in {counted(scored.num_shards, 'shard')}, "
            f"{done} done"
        )

    def on_predict_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._began_s = time.perf_counter() - self._checked_s
        shape = (self.scores.scored.shard_rows, self.scores.scored.block_size)
        self._nll_RT = torch.empty(shape, device=trainer.strategy.root_device)
        self._rank_RT = torch.empty(shape, dtype=torch.int32, device=trainer.strategy.root_device)
        if threading.current_thread() is threading.main_thread():
            self._handlers = {n: signal.signal(n, self._stop) for n in (signal.SIGINT, signal.SIGTERM)}

    def _stop(self, number: int, frame: Any) -> None:
        self._stopped_by = signal.Signals(number)

    def on_predict_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: dict[str, Tensor], batch: Any, batch_idx: int, *_: Any
    ) -> None:
        nll_BT, rank_BT = outputs["nll"], outputs["rank"]
        if self._shards:  # else this rank only waits for the others
            rows = len(self.scores.rows(self._shards[0]))
            into = slice(self._filled, min(self._filled + len(nll_BT), rows))
            self._nll_RT[into] = nll_BT[: into.stop - into.start]
            self._rank_RT[into] = rank_BT[: into.stop - into.start]
            self._filled = into.stop % rows
            if not self._filled:
                self._write(self._shards.pop(0), trainer.is_global_zero)
        if self._stopped_by is not None:
            self._wait()
            left = len(self.scores.missing())
            raise Stopped(
                self._stopped_by,
                f"stopped by {self._stopped_by.name}; {left} of {self.scores.scored.num_shards} shards are left; to "
                "continue, run the same command",
            )

    def _write(self, shard: int, is_first: bool) -> None:
        rows = self.scores.rows(shard)
        nll_RT, rank_RT = (t[: len(rows)].cpu().numpy().copy() for t in (self._nll_RT, self._rank_RT))
        if not np.isfinite(nll_RT).all():
            row = rows[np.flatnonzero(~np.isfinite(nll_RT).all(1))[0]]
            raise ConfigError(
                f"--model.teacher.path: the teacher's loss is not finite in row {row}; is it a trained model? "
                "If it overflows, set --model.teacher.dtype float32"
            )
        self._wait()
        assert self._pool is not None
        self._written = self._pool.submit(self._keep, shard, nll_RT, rank_RT, self._seconds if is_first else None)

    @property
    def _seconds(self) -> float:
        return time.perf_counter() - self._began_s

    def _keep(self, shard: int, nll_RT: np.ndarray, rank_RT: np.ndarray, seconds: float | None) -> None:
        self.scores.write(shard, nll_RT, rank_RT)
        if seconds is not None:
            self.scores.note(scoring_s=self._spent_s + seconds)

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()  # raises the thread's error, e.g. of a full disk

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()  # waits for the shard that is being written
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self._wait()
        self._close()

    def teardown(self, trainer: pl.Trainer, pl_module: Any, stage: str) -> None:
        """Writes the report; not in on_predict_end: if all shards exist already, Lightning runs no prediction."""
        if stage != "predict":
            return
        trainer.strategy.barrier("all shards are written")
        if self._num_tokens and trainer.is_global_zero:
            seconds = self._seconds
            speed = self._num_tokens / seconds / trainer.world_size
            rank_zero_info(f"scored {self._num_tokens:,} tokens in {seconds:.1f} s, {speed:,.0f} per second and device")
            self.scores.note(scoring_s=self._spent_s + seconds)
        pl_module.release_teacher()
        if trainer.is_global_zero:
            data = trainer.datamodule  # type: ignore[attr-defined]
            files = score_report.write(self.scores, data.keep, data.decode_row)
            zeros = np.mean(row_scores(self.scores, data.keep.k, data.keep.masked) == 0)
            took = f"{self.scores.flops_said}, {self.scores.manifest.get('scoring_s', math.nan):.1f} s"
            said = f"{zeros:.1%} of the rows score 0; report: {', '.join(map(str, files))}"
            rank_zero_info(f"all rows: {took}; {said}")


def _check_teacher(trainer: pl.Trainer, teacher: Any, path: str) -> None:
    """As in a fit; some runs use a teacher for its scores alone. An early one may be as weak as it is early."""
    allowed = any(getattr(callback, "allow_untrained", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    # as in prediction, so that it is compiled once
    with torch.inference_mode(trainer.predict_loop.inference_mode), trainer.precision_plugin.predict_step_context():
        found = judged(teacher, trainer, path, allowed)
    if found.level != "warning":
        found.require()


def weights_fingerprint(module: nn.Module) -> str:
    """Hash of all weights by name, dtype and bits, wherever they came from."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        for part in stored(tensor):
            hashed.update(part.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()
