"""What processes do together before they are connected: real processes at torch's real store."""

import multiprocessing
import os
import socket
import time
from datetime import timedelta
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from jsonargparse import Namespace

from salt_lightning.command import resume
from salt_lightning.errors import ConfigError
from salt_lightning.run import meeting
from salt_lightning.storage import damage


@pytest.fixture
def apart(monkeypatch):
    """apart(work, world) runs work(rank) in forked processes that torchrun, srun, an operator of pods or, on each of
    several nodes, a user seems to have started."""
    meeting._met.cache_clear()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")

    def place(launcher: str, rank: int, world: int) -> dict[str, str]:
        if launcher == "pods":
            return {"RANK": str(rank), "WORLD_SIZE": str(world)}
        if launcher == "nodes":
            return {"NODE_RANK": str(rank)}
        if launcher == "torchrun":
            return {"TORCHELASTIC_RUN_ID": "x", "LOCAL_RANK": str(rank), "RANK": str(rank), "WORLD_SIZE": str(world)}
        return {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_STEP_NUM_TASKS": str(world),
                "SLURM_NTASKS": str(world), "SLURM_NTASKS_PER_NODE": str(world), "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank), "SLURM_NODEID": "0"}  # fmt: skip

    def run(work, world: int, launcher: str = "torchrun", there: tuple[int, ...] | None = None) -> list:
        fork = multiprocessing.get_context("fork")
        ranks = there or tuple(range(world))
        answers, may_end = [fork.Pipe(duplex=False) for _ in ranks], fork.Event()

        def begin(rank: int, answer) -> None:
            os.environ.update(place(launcher, rank, world))
            plugins = [Namespace(class_path="lightning.fabric.plugins.environments.KubeflowEnvironment")]
            meeting.tell(Namespace(num_nodes=world, plugins=plugins if launcher == "pods" else None))
            answer.send(work(rank))
            may_end.wait(60)  # a run's first process, where the store is, would go on, too

        processes = [
            fork.Process(target=begin, args=(rank, pipe[1])) for rank, pipe in zip(ranks, answers, strict=True)
        ]
        try:
            for process in processes:
                process.start()
            assert all(receiver.poll(60) for receiver, _ in answers)
            return [receiver.recv() for receiver, _ in answers]
        finally:
            may_end.set()
            for process in processes:
                process.join(60)
                process.kill()

    return run


def whats(looks: list, told: str | None = None, at: int = 0):
    """A look that notes its part, and finds something in one of them."""

    def look(part: int, parts: int) -> str | None:
        looks.append((part, parts))
        return told if part == at else None

    return look


@pytest.mark.parametrize("launcher", ["torchrun", "srun", "pods", "nodes"])
def test_each_looks_at_a_part_and_all_know_what_one_has_found(launcher, apart):
    """After it they connect as ever, at the same address."""

    def work(rank: int):
        looks: list = []
        good = meeting.divide("whole", whats(looks))
        bad = meeting.divide("damaged", whats(looks, "cut off", at=2))
        dist.init_process_group("gloo", rank=rank, world_size=3, timeout=timedelta(seconds=30))
        dist.all_reduce(total := torch.tensor(rank))
        dist.destroy_process_group()
        return looks, good, bad, int(total)

    assert apart(work, 3, launcher) == [([(rank, 3)] * 2, None, "cut off", 3) for rank in range(3)]


def test_copies_on_disks_of_their_own_are_looked_at_by_those_who_have_them(apart):
    def work(rank: int):
        looks: list = []
        mine = "node 0" if rank < 2 else "node 1"
        return looks, meeting.divide(mine, whats(looks, "cut off" if mine == "node 1" else None))

    assert apart(work, 3) == [([part], "cut off") for part in [(0, 2), (1, 2), (0, 1)]]


@pytest.mark.parametrize("form", ["file", "folder"])
def test_processes_that_see_the_same_checkpoint_share_the_reading(form, apart, tmp_path, monkeypatch):
    for folder in ("shared", "own"):
        path = tmp_path / folder / "step-00000001.ckpt" / ("meta.pt" if form == "folder" else "")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"the same bytes")
        os.utime(path, (1, 1))  # as rsync copies it
    looks: list = []
    monkeypatch.setattr(damage, "of", lambda path, part, parts: looks.append((part, parts)))

    def work(rank: int):
        resume._damage(tmp_path / "shared/step-00000001.ckpt")
        resume._damage(tmp_path / ("own" if rank else "shared") / "step-00000001.ckpt")
        return looks

    assert apart(work, 2) == [[(0, 2), (0, 1)], [(1, 2), (0, 1)]]


@pytest.mark.parametrize("launcher", ["torchrun", "pods", "nodes"])
def test_all_see_what_the_first_process_has_waited_for(launcher, apart, tmp_path):
    def work(rank: int):
        if rank == 0:
            time.sleep(0.5)
            (tmp_path / "saved").touch()
        meeting.gather()
        seen = os.listdir(tmp_path)
        if launcher != "torchrun":
            meeting.tell(Namespace(num_nodes=1))  # a further command in this process, of this node alone
            assert meeting._others() is None
        return seen

    assert apart(work, 2, launcher) == [["saved"]] * 2


@pytest.mark.parametrize(
    ("own", "nodes", "others"),
    [
        ({}, 1, {}),
        ({"LOCAL_RANK": "1"}, 2, {}),  # started by another, on which it relies
        ({"NODE_RANK": "2"}, 2, {}),  # a line about it comes later
        ({"RANK": "0", "WORLD_SIZE": "many"}, 2, {"plugins": Namespace(class_path="a.KubeflowEnvironment")}),
        ({"RANK": "0", "WORLD_SIZE": "2"}, 1, {"plugins": Namespace(class_path="a.LightningEnvironment")}),
    ],
)
def test_who_is_alone_waits_for_nobody(own, nodes, others, apart, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    meeting.tell(Namespace(num_nodes=nodes, **{"strategy": "ddp", "plugins": None} | others))
    assert meeting._others() is None
    meeting.tell(Namespace(num_nodes=1))


def test_what_processes_said_before_a_restart_does_not_count(apart, monkeypatch, request):
    """torchrun's store outlives them, in a process of its own: it has threads, whose locks a fork would copy as they
    are."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def keep_store() -> None:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True)
        sender.send(store.port)
        time.sleep(600)

    keeper = fork.Process(target=keep_store, daemon=True)
    keeper.start()
    request.addfinalizer(keeper.kill)
    monkeypatch.setenv("MASTER_PORT", str(receiver.recv()))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")

    def work(start: int, rank: int):
        time.sleep(0.3 * (rank == start % 2))  # each finds what the other left
        looks: list = []
        found = [meeting.divide("checkpoint", whats(looks, f"damaged {start}", start % 2)) for _ in range(2)]
        return looks, found

    for start in range(3):
        assert apart(partial(work, start), 2) == [([(rank, 2)] * 2, [f"damaged {start}"] * 2) for rank in range(2)]
    monkeypatch.setattr(meeting, "_MEETING", timedelta(seconds=1))
    assert apart(partial(work, 3), 2, there=(1,)) == [([(0, 1)] * 2, [None] * 2)]  # the first process did not come


@pytest.mark.parametrize("there", [(0,), (0, 1), (1, 2)])
def test_without_one_of_them_each_looks_at_everything(there, apart, monkeypatch):
    """Connecting will say that it is not there."""
    monkeypatch.setattr(meeting, "_MEETING", timedelta(seconds=1))

    def work(rank: int):
        looks: list = []
        meeting.gather()
        return looks, meeting.divide("same", whats(looks, "cut off"))

    assert apart(work, 3, there=there) == [([(0, 1)], "cut off")] * len(there)


def test_what_one_that_does_not_come_back_has_looked_at_is_looked_at_again(apart, monkeypatch):
    """It has found damage, but hangs or dies before it could say so."""
    monkeypatch.setattr(meeting, "_LOOKING", timedelta(seconds=1))
    again = multiprocessing.get_context("fork").Event()

    def work(rank: int):
        looks: list = []

        def look(part: int, parts: int) -> str | None:
            looks.append((part, parts))
            if (rank, parts) == (0, 1):
                again.set()
            if (rank, parts) == (1, 2):
                again.wait(30)
            return "cut off" if part == parts - 1 else None

        return meeting.divide("same", look), looks

    assert apart(work, 2)[0] == ("cut off", [(0, 2), (0, 1)])


@pytest.mark.parametrize("late", [0, 2])
def test_one_that_comes_too_late_to_share_can_still_connect(late, apart, monkeypatch):
    """The others connect by the first process's store, also where they did not meet."""
    monkeypatch.setattr(meeting, "_MEETING", timedelta(seconds=1))
    alone = multiprocessing.get_context("fork").Semaphore(0)

    def work(rank: int):
        looks: list = []
        for _ in range(2 * (rank == late)):  # until the two others have given it up
            assert alone.acquire(timeout=30)
        meeting.divide("same", whats(looks))
        alone.release()
        dist.init_process_group("gloo", rank=rank, world_size=3, timeout=timedelta(seconds=30))
        dist.all_reduce(total := torch.tensor(rank))
        dist.destroy_process_group()
        return looks, int(total)

    assert apart(work, 3) == [([(0, 1)], 3)] * 3


def test_who_has_a_fast_disk_waits_for_the_others(apart, monkeypatch):
    def work(rank: int):
        looks: list = []

        def look(part: int, parts: int) -> None:
            looks.append((part, parts))
            time.sleep(2.0 * part)

        meeting.gather()
        monkeypatch.setattr(meeting, "_MEETING", timedelta(seconds=1))
        meeting.divide("same", look)
        return looks

    assert apart(work, 2) == [[(0, 2)], [(1, 2)]]


def test_after_one_did_not_come_nobody_takes_what_it_says_for_an_answer(apart, monkeypatch):
    """Here it comes late to the first look, when the other is at the second."""
    monkeypatch.setattr(meeting, "_LOOKING", timedelta(seconds=1))
    alone = multiprocessing.get_context("fork").Event()

    def work(rank: int):
        looks: list = []

        def look(part: int, parts: int) -> str | None:
            looks.append((part, parts))
            alone.set()
            return None if rank else "cut off"

        meeting.gather()
        monkeypatch.setattr(meeting, "_MEETING", timedelta(seconds=1))
        if rank == 1:
            assert alone.wait(30)
        return [meeting.divide(what, look) for what in ("newest", "older")]

    assert apart(work, 2) == [["cut off"] * 2, [None] * 2]


def test_what_they_say_may_contain_any_characters(apart):
    """Names of files, and of tensors in a hostile table."""
    assert (
        apart(lambda rank: meeting.divide("\udcff", whats([], "\ud800 \\u00e9 \n", at=1)), 2)
        == ["\ud800 \\u00e9 \n"] * 2
    )


def test_a_start_that_lightning_refuses_is_left_to_it(monkeypatch):
    """srun without --ntasks-per-node: a line says so later."""
    meeting._met.cache_clear()
    for name, value in {"JOB_NAME": "train", "STEP_NUM_TASKS": "2", "NTASKS": "2", "PROCID": "0"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE", raising=False)
    meeting.gather()
    assert meeting._others() is None


def test_a_process_relies_on_the_one_that_has_started_it(monkeypatch):
    """With Lightning's launcher, which sets LOCAL_RANK for those that it starts."""
    looks: list = []
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv(meeting._SEEN, "")
    assert meeting.divide("a", whats(looks)) is None
    assert meeting.divide("b", whats(looks, "cut off")) == "cut off"
    assert looks == [(0, 1)] * 2

    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def begin() -> None:
        os.environ["LOCAL_RANK"] = "1"
        for what in ("a", "b"):
            meeting.divide(what, whats(looks))
        sender.send(looks[2:])

    process = fork.Process(target=begin)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert receiver.recv() == [(0, 1)]  # only b, in which its starter has found damage


def test_processes_that_see_different_newest_checkpoints_do_not_look_into_them(apart, tmp_path, monkeypatch):
    """Those that see one would wait five minutes for the others to take their part. The first may see it later."""
    monkeypatch.setattr(resume, "UNSEEN_S", 3)
    file = "step-00000008.ckpt"
    for rank in "01":
        (tmp_path / rank).mkdir()
    (tmp_path / "1" / file).touch()

    def work(rank: int):
        own = tmp_path / str(rank)
        with mock.patch.object(resume.time, "sleep", side_effect=lambda _: (own / file).touch()):
            late = resume._seen_by_all(own)
        if rank == 0:
            (own / file).unlink()
        config = Namespace(run=str(tmp_path), checkpoint=Namespace(folder=str(own)))
        with mock.patch.object(resume.time, "sleep"), pytest.raises(ConfigError) as error:
            resume.resolve("last", config, "fit")
        return [step for step, _ in late], str(error.value)

    said = f"the processes see different newest checkpoints in {tmp_path}/{{}}: none, {file}; give a folder that all "
    said = f"--ckpt_path last: {said}nodes share, or copy the newest checkpoint to all of them"
    assert apart(work, 2) == [([8], said.format(rank)) for rank in (0, 1)]
