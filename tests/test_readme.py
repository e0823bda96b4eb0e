"""Runs the README's examples, shortened; commands for a GPU are parsed and built."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import arguments, built, write_corpus

from salt_lightning import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.S)
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines()]
PAGES = [line for path in sorted((ROOT / "docs").glob("*.md")) for line in path.read_text().splitlines()]
OTHER_OPTIONS = {"compare", "export"}  # check has the options of fit


def test_the_python_example_runs(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_text").mkdir()
    write_corpus(tmp_path / "my_text" / "a.jsonl", 400)
    code = next(text for kind, text in BLOCKS if kind == "python")
    assert len([line for line in code.splitlines() if line.strip() and "import" not in line]) <= 10
    small = {"max_steps=300": "max_steps=4, accelerator='cpu', logger=False", "steps=60": "steps=2",
             "block_size=256": "block_size=32, num_workers=0, prepare_workers=1",
             "step-00005000": "step-00000020"}  # fmt: skip
    for long, short in small.items():
        assert long in code
        code = code.replace(long, short)
    teacher = {"data.source": "my_text/*.jsonl", "data.val_fraction": 0.01, "data.cache_dir": "cache",
               "run": "runs/teacher", "kd.weight": 0.0, "trainer.max_steps": 20, "trainer.val_check_interval": 20,
               "model.optim.warmup_steps": 0}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, teacher)]) == 0
    scope: dict[str, object] = {}
    exec(code, scope)
    assert scope["trainer"].global_step == 4
    assert scope["module"].teacher is None  # loaded and unloaded


def test_the_cells_of_the_notebook_page_run_one_after_another(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "text.jsonl", 400)
    cells = re.findall(r"```python\n(.*?)```", (ROOT / "docs/notebooks.md").read_text(), re.S)
    assert len(cells) == 4
    small = {
        "hidden_size: 128": "hidden_size: 32",
        ", 300": ", 20",
        ", 50": ", 10",
        '"--data.num_w': '*OTHERS, "--data.num_w',
    }
    for long, short in small.items():
        assert long in cells[0]
        cells[0] = cells[0].replace(long, short)
    others = {"data.vocab_size": 300, "data.block_size": 32, "data.global_batch_size": 8, "data.micro_batch_size": 8}
    scope: dict[str, object] = {"OTHERS": [f"--{key}={value}" for key, value in others.items()]}
    for cell in cells:
        exec(cell, scope)
    assert list(scope["curves"]["val/ce"].steps) == [10, 20]
    assert [row["run"] for row in scope["rows"]] == ["baseline"]
    assert scope["model"].config.hidden_size == 32


@pytest.mark.parametrize(
    "command",
    [
        line
        for line in dict.fromkeys((*COMMANDS, *PAGES))
        if line.startswith("python cli.py") and line.split()[2] not in OTHER_OPTIONS
    ],
)
def test_commands_for_a_gpu_parse_and_build(command, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    verb, *args = shlex.split(command)[2:]
    assert verb in ("fit", "check", "validate", "test", "predict")
    args = [a for a in args if a not in ("--ckpt_path", "last")]
    built(*args, "--trainer.accelerator=cpu", f"--run={tmp_path}")


def test_the_shorter_try_is_consistent(teacher, tmp_path, monkeypatch, capsys):
    """Its settings are accepted together; only the missing text is an error."""
    monkeypatch.chdir(ROOT)
    options = re.search(r"\*\*A shorter try\*\*: `([^`]*)`", README)[1]
    args = ["--config=configs/salt.yaml", *shlex.split(options), "--trainer.accelerator=cpu", "--data.source=no/*.txt"]
    assert cli.main(["fit", *args, f"--run={tmp_path}/run", f"--model.teacher.path={teacher}"]) == 2
    assert "matches no file" in capsys.readouterr().err


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for line in COMMANDS:
        if line.startswith("make "):
            assert re.search(rf"^{line.split()[1]}:", makefile, re.M)
    assert "make test" in (ROOT / ".ci" / "run").read_text()
