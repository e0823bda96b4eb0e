"""A small real run, driven by the real command line: corpus, settings, and how to read what it logged."""

import atexit
import gc
import json
import os
import random
import re
import signal
from pathlib import Path

# Models have a few thousand weights: threads, of this process or one that it starts, would only wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)  # read at import; with it, no program turns bars on or off

import pytest
import torch
from huggingface_hub import constants
from hypothesis import settings as hypothesis_settings
from lightning.pytorch.callbacks import Callback
from torch.distributed.checkpoint import FileSystemReader

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test, nor a process that it starts, uses the network
os.environ["TORCHINDUCTOR_VEC_ISA_OK"] = "0"  # kernels without vector instructions compile in half the time
constants.HF_HUB_OFFLINE = True  # huggingface_hub has already read the variable
hypothesis_settings.register_profile("house", deadline=None)  # slowness of a busy machine is not a failure
hypothesis_settings.load_profile("house")


def pytest_configure(config):
    """Hides GPUs except for `-m gpu`: Lightning warns about an unused GPU, and `auto` would use it."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # a job in the background ignores it, and so would all processes that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.disable()


# Files that take more than a minute: a worker that began one of them last would be alone at the end.
LONG = "parallel resume benchmarks check bad_input module triton_rows security cli scoring fake_cuda".split()  # noqa: SIM905


def pytest_collection_modifyitems(items):
    """Puts the longest files first: workers take whole files in this order (`--no-loadscope-reorder`)."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


def pytest_collection_finish():
    """As the command does: a search for garbage among all that is imported takes a third of a second."""
    gc.freeze()
    atexit.register(gc.unfreeze)
    gc.enable()


@pytest.fixture(autouse=True, scope="session")
def one_parser_per_verb():
    import parsers

    end = parsers.keep()
    yield
    end()


@pytest.fixture(autouse=True)
def no_global_seed():
    """Removes the seed that the command leaves in this process, so that a later test's modules do not use it."""
    os.environ.pop("PL_GLOBAL_SEED", None)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


WORDS = "the a small frozen teacher helps large student reads what it wrote before and then leaves so".split()  # noqa: SIM905


# Entries of every checkpoint besides settings and weights.
ALWAYS = {
    **{"global_step": 3, "max_steps": 3, "tokenizer": None, "pytorch-lightning_version": "2.6.6"},
    **{name: {} for name in ("text", "data", "forward_flops", "totals", "totals_before")},
    **dict.fromkeys(("time_s", "teacher_time_s"), 0.0),
}


def add_table(folder: Path) -> None:
    """Gives a sharded checkpoint of Lightning or torch the table that this project's own have."""
    from salt_lightning.storage import pieces

    (folder / pieces.FILE).write_bytes(pieces.dump(FileSystemReader(folder).read_metadata()))


def write_corpus(path: Path, num_documents: int = 120, seed: int = 0) -> Path:
    """Writes sentences with some structure to learn, in documents of very different lengths."""
    rng = random.Random(seed)
    with open(path, "w", encoding="utf-8") as out:
        for _ in range(num_documents):
            words, word = [], rng.randrange(len(WORDS))
            for _ in range(rng.choice([3, 10, 40, 120])):
                word = (word * 5 + rng.choice([1, 1, 1, 2, 7])) % len(WORDS)
                words.append(WORDS[word])
            out.write(json.dumps({"text": " ".join(words) + "."}) + "\n")
    return path


def alive(pid: int | str) -> bool:
    """Whether a process runs: neither gone nor waiting to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def error_of(capsys) -> str:
    """The only error of a command; its problems, which are a line each, joined as in the exception."""
    err = capsys.readouterr().err
    blocks = re.findall(r"(?:^error: .*\n)+", err, re.MULTILINE)
    assert len(blocks) == 1, err
    assert "Traceback" not in err
    assert "usage:" not in err
    return blocks[0].rstrip("\n").replace("\nerror: ", "; ")


def run(args: list[str]) -> int:
    from salt_lightning import cli

    return cli.main(args)


def built(*args: str):
    """The command with its trainer, model and data, before anything has run."""
    from salt_lightning import cli

    return cli.SALTCLI(
        cli.SALTModule, cli.SALTDataModule, run=False, parser_class=cli.Parser, trainer_defaults=cli.TRAINER_DEFAULTS,
        seed_everything_default=0, auto_configure_optimizers=False, save_config_callback=None, args=list(args),
    )  # fmt: skip


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "text.jsonl")


@pytest.fixture(scope="session")
def settings(corpus) -> dict[str, object]:
    """Settings of a run that takes a few seconds and goes through both phases."""
    return {
        "model.student.config": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
            "tie_word_embeddings": True,
        },
        "model.optim.lr": 3e-3,
        "model.optim.warmup_steps": 2,
        "data.source": str(corpus),
        "data.vocab_size": 300,
        "data.block_size": 32,
        "data.global_batch_size": 8,
        "data.micro_batch_size": 8,
        "data.val_fraction": 0.1,
        "data.cache_dir": str(corpus.parent / "cache"),
        "data.num_workers": 0,
        "data.prepare_workers": 1,
        "trainer.max_steps": 12,
        "trainer.val_check_interval": 6,
        "trainer.log_every_n_steps": 1,
        "trainer.accelerator": "cpu",
        "trainer.enable_progress_bar": False,
        "checkpoint.keep": None,
    }  # fmt: skip


def arguments(*layers: dict[str, object]) -> list[str]:
    """Command-line arguments; later layers win."""
    merged = {key: value for layer in layers for key, value in layer.items()}
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in merged.items()]


@pytest.fixture(scope="session")
def teacher(settings, tmp_path_factory) -> str:
    """A checkpoint of a smaller model, trained by the same command."""
    from salt_lightning.cli import main

    run = tmp_path_factory.mktemp("teacher") / "run"
    small = {**settings["model.student.config"], "hidden_size": 16}
    own = {"run": str(run), "model.student.config": small, "kd.weight": 0.0, "trainer.max_steps": 20,
           "trainer.val_check_interval": 20, "seed_everything": 7}  # fmt: skip
    assert main(["fit", *arguments(settings, own)]) == 0
    return str(run / "checkpoints" / "step-00000020.ckpt")


class StopAt(Callback):
    """Sends this process a signal in the middle of an optimizer step."""

    def __init__(self, step: int, number: int = signal.SIGTERM) -> None:
        self.step, self.number = step, number

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step + 1 == self.step:
            self.step = -1
            os.kill(os.getpid(), self.number)


@pytest.fixture
def slurm(monkeypatch, tmp_path):
    """slurm(queue="there", **variables) starts a job of one process; returns a function for the calls of scontrol."""

    def begin(queue: str = "there", **variables: str):
        folder, told = tmp_path / "slurm-bin", tmp_path / "told"
        folder.mkdir()
        if queue != "missing":
            says = {"refuses": "echo job may not be requeued >&2; exit 1", "warns": "echo an old option >&2"}
            (folder / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {told}\n{says.get(queue, "")}\n')
            (folder / "scontrol").chmod(0o755)
        job = {"NTASKS": "1", "JOB_NAME": "train", "JOB_ID": "77", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
        for name, value in {**{f"SLURM_{key}": value for key, value in job.items()}, **variables}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PATH", str(folder), prepend=None if queue == "missing" else os.pathsep)
        return lambda: told.read_text().splitlines() if told.exists() else []

    return begin


def scalars(run: Path, tags: tuple[str, ...] = ("train/", "val/")) -> dict[str, dict[int, float]]:
    """All logged values of a run by tag and step; if a step was logged twice, the later value."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    values: dict[str, dict[int, float]] = {}
    for file in sorted(Path(run).glob("events.*"), key=lambda path: (path.stat().st_mtime_ns, path.name)):
        for event in EventFileLoader(str(file)).Load():
            for value in event.summary.value:
                if value.tag.startswith(tags):
                    values.setdefault(value.tag, {})[event.step] = make_ndarray(value.tensor).item()
    return values


CLOCK = {"train/time_s", "train/teacher_time_s", "train/tokens_per_s", "train/data_wait_s"}  # tags that may differ


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.fixture
def fit_with(settings):
    """fit_with(run, *callbacks, verb="fit", **overrides) -> exit code of the real command with these callbacks."""
    import ranks

    def run_fit(run: Path, *callbacks: Callback, verb: str = "fit", **overrides: object) -> int:
        return ranks.run([verb, *arguments(settings, {"run": str(run), "kd.weight": 0.0}, overrides)], *callbacks)

    return run_fit
