"""Under SLURM: the signal that asks for the job to be queued again, and doing so."""

import os
import signal
import subprocess

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info


def requeue_signal(trainer: pl.Trainer) -> signal.Signals | None:
    """SIGUSR1, or what `SLURMEnvironment(requeue_signal=...)` names; None: not under SLURM, or told not to."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def requeue() -> None:
    """Queues this job, or this task of an array, again; says so where that fails."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        why = done.stderr.strip() if done.returncode else None
    except OSError as error:
        why = str(error)
    said = "queued again" if why is None else f"not queued again ({why}): do it by hand, {' '.join(command)}"
    rank_zero_info(f"SLURM job {job}: {said}")
