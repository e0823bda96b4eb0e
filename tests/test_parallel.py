"""One device, DDP and FSDP2 train the same; real processes on a CPU (gloo), driven by the real command."""

from pathlib import Path

import pytest
import ranks
import torch
from conftest import arguments, scalars, weights

from salt_lightning.models import read_checkpoint

ROOT = Path(__file__).parents[1]
FSDP2 = {"config": str(ROOT / "configs/fsdp.yaml"), "trainer.precision": "32-true"}
DDP = {"config": str(ROOT / "configs/ddp.yaml")}
STEPS = 20
UNTIED = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
          "tie_word_embeddings": False, "attention_bias": True}  # fmt: skip


@pytest.fixture(scope="module")
def salt(settings, teacher) -> dict[str, object]:
    """Both phases and a ramp, clipping that bites, two micro-batches of uneven masks on each of two ranks."""
    return {
        **settings, "model.teacher.path": teacher, "kd.weight": 0.667, "kd.steps": 12, "kd.anneal_steps": 4,
        "kd.shape": "linear", "trainer.max_steps": STEPS, "trainer.val_check_interval": 10, "data.micro_batch_size": 2,
        "trainer.gradient_clip_val": 0.5, "model.optim.lr": 3e-3,
    }  # fmt: skip


VARIANTS = {
    "ddp": DDP,
    "fsdp": FSDP2,
    "ddp untied": {**DDP, "model.student.config": UNTIED},
    "fsdp untied": {
        **FSDP2, "model.student.config": UNTIED, "trainer.strategy.shard_teacher": False,
        "trainer.strategy.save_distributed_checkpoint": False, "model.activation_checkpointing": True,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(salt, tmp_path_factory) -> Path:
    """Runs of one process in `one`, `one untied`; of two processes under the names of VARIANTS."""
    folder = tmp_path_factory.mktemp("parallel")
    one = {"one": {}, "one untied": {"model.student.config": UNTIED}}
    for name, own in one.items():
        args = ["fit", *arguments(salt, {"run": str(folder / name)}, own)]
        assert ranks.run(args, ranks.Spy(folder / f"{name}.spy")) == 0
    jobs = [
        {"args": ["fit", *arguments(salt, {"run": str(folder / name), "trainer.devices": 2}, own)],
         "spy": str(folder / f"{name}.spy")}
        for name, own in VARIANTS.items()
    ]  # fmt: skip
    ranks.launch(jobs, folder)
    return folder


def spied(runs: Path, name: str, rank: int = 0) -> dict:
    return torch.load(f"{runs / name}.spy.{rank}", weights_only=True)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_same_numbers(runs, name):
    print(name)
    one = "one untied" if "untied" in name else "one"
    ours, theirs = scalars(runs / name), scalars(runs / one)
    assert ours.keys() == theirs.keys()
    for tag in ("train/loss", "train/kd", "train/grad_norm", "val/ce"):
        print(tag, max(abs(ours[tag][s] - theirs[tag][s]) for s in theirs[tag]))
    a, b = spied(runs, name)["gradients"], spied(runs, one)["gradients"]
    for s in (0, 1, 11, 12, 19):
        print(s, max((a[s][k] - b[s][k]).abs().max().item() / b[s][k].abs().max().item() for k in b[s]))
    print(
        spied(runs, name)["labels"][:6],
        spied(runs, name, 1)["labels"][:6],
        spied(runs, name)["teacher_bytes"],
        spied(runs, name, 1)["teacher_bytes"],
    )
    print([v for v in theirs["train/grad_norm"].values()][:8])
