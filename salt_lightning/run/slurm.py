"""SLURM: checks that srun started the processes a run needs, and requeues the job on a signal."""

import os
import signal
import subprocess
from typing import Any

import lightning.pytorch as pl
from lightning.fabric.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from lightning.pytorch.utilities import rank_zero_info

from salt_lightning.errors import ConfigError, one_line

_IN_A_SHELL = ("bash", "interactive")  # job names that Lightning takes for shells


def tasks() -> int:
    """How many processes srun started, including this one; 1 for a batch script."""
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1)


def require_place() -> None:
    """Raises ConfigError in a shell that has a job's variables but not a process's, which Lightning needs."""
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID") if name not in os.environ]
    if not SLURMEnvironment.detect() or TorchElasticEnvironment.detect():
        return
    if missing:
        raise ConfigError(
            f"this shell has the variables of SLURM's job {os.environ.get('SLURM_JOB_ID')}, but no {missing[0]}; start "
            "the command with srun, or put SLURM_JOB_NAME=bash before it to let Lightning start the processes"
        )
    try:
        SLURMEnvironment()
    except RuntimeError as error:  # about --ntasks
        raise ConfigError(one_line(error)) from error


def require_processes(environment: Any, num_devices: int, num_nodes: int, connects: bool) -> None:
    """Raises ConfigError if srun started another number of processes than the run needs: each would train alone.

    `connects`: the strategy creates a process group, even of one process; then Lightning checks more.
    """
    started, wanted = tasks(), num_devices * num_nodes
    in_a_shell = SLURMEnvironment.job_name() in _IN_A_SHELL
    if started > 1 and in_a_shell and os.environ.get("SLURM_TASK_PID") == str(os.getpid()):  # e.g. within salloc
        raise ConfigError(
            f"srun started {started} processes in a job named {SLURMEnvironment.job_name()}, which Lightning takes for "
            "a shell, so each would train alone; use srun --job-name train ..."
        )
    counts = isinstance(environment, SLURMEnvironment) or (wanted == 1 and not in_a_shell)
    if counts and started != wanted:
        remedy = "start that many with srun" if "SLURM_STEP_NUM_TASKS" in os.environ else "start it with srun"
        raise ConfigError(
            f"--trainer.devices {num_devices} times --trainer.num_nodes {num_nodes} is not the number of processes "
            f"that srun started, {started}; {remedy}, or leave out --ntasks to let Lightning start those of one node"
        )
    if connects and isinstance(environment, SLURMEnvironment):
        try:
            environment.validate_settings(num_devices, num_nodes)
        except ValueError as error:
            raise ConfigError(f"--trainer.devices {num_devices}: {one_line(error)}, or change srun's number") from error


def requeue_signal(trainer: pl.Trainer) -> signal.Signals | None:
    """SIGUSR1, or the signal in `SLURMEnvironment(requeue_signal=...)`; None: not under SLURM, or disabled."""
    environment: Any = trainer._accelerator_connector.cluster_environment
    return environment.requeue_signal if has_started(trainer) and environment.auto_requeue else None


def has_started(trainer: pl.Trainer) -> bool:
    """Whether srun has started the processes."""
    return isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment)


def requeue() -> None:
    """Requeues this job, or this task of an array; reports whether that worked."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    command = ["scontrol", "requeue", job]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        why = done.stderr.strip() if done.returncode else None
    except OSError as error:
        why = str(error)
    said = "requeued" if why is None else f"not requeued ({why}); requeue it by hand: {' '.join(command)}"
    rank_zero_info(f"SLURM job {job}: {said}")
