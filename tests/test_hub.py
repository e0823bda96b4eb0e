"""Names on the hub, read over HTTP from a small hub of the tests' own, and offline from its cache."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import arguments
from hub import commit, served
from safetensors.torch import load_file, save_file

from salt_lightning.export import export
from salt_lightning.hugging_face.folders import config_hash

# One process, since its imports take longer than all of its commands.
PROGRAM = """
import json, shutil, sys
from huggingface_hub import constants
sys.path.append(sys.argv[2])
import parsers
parsers.keep()
from salt_lightning.cli import main
for args in json.loads(sys.argv[1]):
    if args[0] == "copy":
        shutil.copytree(*args[1:3], dirs_exist_ok=True, symlinks=True)
        continue
    constants.HF_HUB_OFFLINE = args[0] == "offline"
    print("\\nexit", main(args[constants.HF_HUB_OFFLINE:]), flush=True)
"""


@pytest.fixture(scope="module")
def hub(corpus, teacher, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    models, stories = root / "models/acme", root / "datasets/acme/stories/main"
    export(Path(teacher), models / "teacher/main")
    others = (
        "v1",
        *(
            f"../{name}/main"
            for name in ("bert", "pickled", "strange", "gated", "cut", "adapter", "adapted", "moving", "stopping")
        ),
    )
    for name in others:
        shutil.copytree(models / "teacher/main", models / "teacher" / name)
    for name, settings in {
        "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
        "strange": {"model_type": "strange"},
    }.items():
        file = models / name / "main/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    vocabulary = (tokenizer := json.loads((models / "bert/main/tokenizer.json").read_text()))["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (models / "bert/main/tokenizer.json").write_text(json.dumps(tokenizer))
    (models / "pickled/main/model.safetensors").rename(models / "pickled/main/pytorch_model.bin")
    (models / "adapter/main/config.json").rename(models / "adapter/main/adapter_config.json")
    (models / "adapted/main/adapter_config.json").write_text("{}")
    (models / "cut/main/model.safetensors").rename(models / "cut/main/model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (models / "cut/main/model.safetensors.index.json").write_text(json.dumps(index))
    file = shutil.copytree(models / "teacher/main", models / "moving/later") / "model.safetensors"
    save_file({name: 0.5 * weight for name, weight in load_file(file).items()}, file, {"format": "pt"})
    (root / "datasets/acme/books/main").mkdir(parents=True)
    for number in range(3):
        book = "\n\n".join(json.loads(line)["text"] for line in corpus.read_text().splitlines()[number::3])
        (root / f"datasets/acme/books/main/{number}.txt").write_text(book)
    (root / "datasets/acme/numbers/main").mkdir(parents=True)
    (root / "datasets/acme/numbers/main/train.csv").write_text("text\n" + "007\n1.50\nNA\n" * 30)
    languages = root / "datasets/acme/languages/v2"
    languages.mkdir(parents=True)
    configs = ""
    for name, line in {"en": '{"text": "x"}\n', "de": '{"of": 1, "content": "x"}\n' * 2}.items():
        configs += f"- config_name: {name}\n  data_files: {name}.jsonl\n"
        (languages / f"{name}.jsonl").write_text(line)
    (languages / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    rows = [json.loads(line) for line in corpus.read_text().splitlines()]
    for split, part in {"train": rows[:80], "validation": rows[80:]}.items():
        (stories / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(part), stories / f"data/{split}-00000-of-00001.parquet")
    return root


@pytest.fixture(scope="module")
def cached(hub, tmp_path_factory) -> tuple[Path, str]:
    """A cache of the hub with models that are not whole, each of the same commit."""
    root, sha = tmp_path_factory.mktemp("cached"), "c0ffee" + "0" * 34
    for name in ("lost", "damaged", "only", "cut", "adapted"):
        (refs := root / f"models--acme--{name}/refs").mkdir(parents=True)
        (refs / "v2").write_text(sha)
        (refs / "main").write_text(sha)
        there = shutil.copytree(hub / "models/acme/teacher/main", refs.parent / "snapshots" / sha)
        if name == "lost":
            (there / "model.safetensors").rename(there / "model-00001-of-00002.safetensors")
            index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
            (there / "model.safetensors.index.json").write_text(json.dumps(index))
        if name == "damaged":
            (there / "model.safetensors").write_bytes((there / "model.safetensors").read_bytes()[:-1])
        if name == "only":
            (refs / "main").unlink()
        if name == "cut":
            (blob := (there / "config.json").rename(root / "blob")).write_text("{")
            (there / "config.json").symlink_to(blob)
        if name == "adapted":
            (there / "adapter_config.json").write_text("{}")
    shutil.copytree(root / "models--acme--lost/snapshots" / sha, root / "models--acme--lost/snapshots" / sha[::-1])
    (root / "models--acme--lost/snapshots" / sha[::-1] / "config.json").unlink()
    return root, sha


@pytest.fixture(scope="module")
def tried(hub, settings, tmp_path_factory):
    """Runs commands that use the hub, in order; returns what each printed, which ends with its exit code."""
    folder = tmp_path_factory.mktemp("tried")

    def try_all(*commands: dict[str, object]) -> list[str]:
        own = {"run": "run", "kd.steps": None, "kd.allow_untrained": True, "model.teacher.path": "acme/teacher",
               "data.source": "acme/stories", "data.val_source": "acme/stories:validation", "data.val_fraction": 0.0,
               "data.tokenizer": "acme/teacher", "data.cache_dir": "cache"}  # fmt: skip
        lists = []
        for command in commands:
            words = command.pop("words", ["fit"])
            if words[0] == "copy":
                lists.append(words)
                continue
            lists.append(words + arguments(settings, own, command))
        with served(hub) as address:
            own = {"HF_ENDPOINT": address, "HF_HOME": "home", "HF_HUB_OFFLINE": "0", "NO_PROXY": "*", "no_proxy": "*"}
            env = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | own
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, json.dumps(lists), Path(__file__).parent], env=env, cwd=folder,
                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240,
            )  # fmt: skip
        assert done.returncode == 0, done.stdout
        return re.findall(r".*?\nexit \d+\n", done.stdout, re.DOTALL)

    try_all.folder = folder
    return try_all


def test_names_on_the_hub_are_tried_before_text_is_prepared(tried, hub, cached):
    """Which may take hours. Then offline: what the cache has is enough to start, and to continue."""
    of_teacher = {
        "acme/nothing": r"cannot be loaded \(no such folder here, so it was looked for on the hub\): OSError: acme/n",
        "acme/gated": r"cannot be loaded .*: You are trying to access a gated repo",
        "acme/bert": "contains a BertForMaskedLM, whose tokens see later ones",
        "acme/strange": r"is not a causal language model that this transformers knows \(model_type 'strange'",
        "acme/adapter": "has no config.json on the hub: it may be an adapter or a GGUF file; give the whole",
        "acme/adapted": r"has an adapter \(adapter_config.json\), as LoRA makes, which is not read; merge it into ",
        "acme/cut": "lacks model-00002-of-00002.safetensors on the hub, which its model.safetensors.index.json names",
        "acme/stopping": "cannot be loaded .* check your connection and try again",
        "acme/pickled": "has neither model.safetensors nor model.safetensors.index.json on the hub; use a revision",
    }
    of_data = {
        ("source", "acme/nothing"): r"cannot read acme/nothing: .* doesn't exist .*; it is not a local file, folder",
        ("val_source", "acme/stories:valid"): r"cannot read acme/stories: Bad split: valid\. Available splits: \['tr",
        ("test_source", "acme/nothing"): "cannot read acme/nothing: .* doesn't exist",
        ("revision", "v9"): "cannot read acme/stories: Revision 'v9' doesn't exist .*; it is",
        ("subset", "small"): "cannot read acme/stories: BuilderConfig 'small' not found",
        ("text_column", "txt"): "no column 'txt' in acme/stories; there are: text",
    }
    wrong = [
        *(({"model.teacher.path": name}, f"--model.teacher.path {name} {said}") for name, said in of_teacher.items()),
        ({"model.teacher.revision": "v9"}, "--model.teacher.path acme/teacher cannot be loaded .* v9 is not a valid"),
        ({"data.tokenizer": "acme/teacher@v9"}, "--data.tokenizer: cannot load 'acme/teacher@v9' .*v9 is not a valid "),
        (
            {"model.teacher.path": "a/b@v1"},
            "--model.teacher.path a/b@v1: .*, give a/b, and --model.teacher.revision v1",
        ),
        ({"model.teacher.path": "a/b@"}, "--model.teacher.path a/b@: no such folder here; for .* hub, give a/b$"),
        (
            {"data.tokenizer": "acme/bert", "model.teacher.revision": "v1"},
            "--model.teacher.path acme/teacher and --data.tokenizer name 2 token .* --data.tokenizer acme/teacher@v1",
        ),
        ({"model.student.path": "acme/bert"}, "--model.student.path acme/bert contains a BertForMaskedLM"),
        ({"words": ["predict"], "model.teacher.path": "acme/bert"}, "--model.teacher.path acme/bert contains"),
        *(
            ({f"data.{setting}": value}, rf"--data.({setting}|source|val_source): {said}")
            for (setting, value), said in of_data.items()
        ),
        ({"data.tokenizer": "train", "data.val_source": "acme/x", "kd.weight": 0.0}, "--data.val_source: .* acme/x"),
    ]
    version = commit(hub / "models/acme/teacher/v1")
    moving = [hub / "models/acme/moving/main", hub / "models/acme/moving/later"]
    commits = [commit(folder) for folder in moving]
    tuning = {"run": "tuned", "model.student.revision": "v1", "kd.weight": 0.0, "data.tokenizer": "acme/teacher@v1"}
    right = [
        {"model.teacher.revision": "v1", "trainer.max_steps": 4, "trainer.val_check_interval": 2},
        {"words": ["offline", "fit", "--ckpt_path=last"], "model.teacher.revision": version},
        {"words": ["offline", "fit"], "run": "other", "model.teacher.revision": "v1"},
        {**tuning, "model.student.path": "acme/teacher", "trainer.max_steps": 6},
        {**tuning, "model.student.path": "acme/gated", "words": ["fit", "--ckpt_path=last"]},
        {"run": "moving", "model.teacher.path": "acme/moving", "trainer.max_steps": 4, "data.source": "acme/books"},
        {"words": ["copy", str(moving[1]), str(moving[0])]},
        {
            "words": ["fit", "--ckpt_path=last"],
            "run": "moving",
            "model.teacher.path": "acme/moving",
            "data.source": "acme/books",
        },
        {"words": ["offline", "fit"], "run": "third", "data.source": "acme/others"},
        {
            "words": ["predict"],
            "run": "numbers",
            "data.block_size": 8,
            "data.text_column": "[text, content]",
            "data.source": "['acme/numbers:train[7:69]', 'acme/languages@v2:en:train', 'acme/languages@v2:de:train']",
        },
        {"words": ["offline", "fit"], "run": "third", "model.teacher.path": "acme/pickled"},  # its config is here
    ]
    root, sha = cached
    of_cache = {
        "acme/lost": "path acme/lost: the hub is offline, .* has no model-00002-of-00002.safetensors of commit c0ffee",
        "acme/damaged": rf"path acme/damaged: model.safetensors in the hub's .* is cut off .*; delete \S+/{sha}/model",
        "acme/only": r"revision main: the hub is offline .* has acme/only at v2; give one of these or the whole hash",
        "acme/none": "path acme/none: no such folder here; the hub is offline .*home/hub, has no such model; for",
        "acme/cut": r"path \S+/config.json is not valid JSON .*; delete \S+/cached\d+/blob and download it again",
        "acme/adapted": r"path acme/adapted has an adapter \(adapter_config.json\), as LoRA makes, which is not read",
    }
    hashed = ("acme/lost", sha[::-1], f"path acme/lost: .* has no config.json of {sha[::-1]}; download it first")
    right.append({"words": ["copy", str(root), "home/hub"]})
    no_text = {"words": ["offline", "fit"], "run": "fourth"}
    right += [{**no_text, "model.teacher.path": name} for name in of_cache]
    right.append({**no_text, "model.teacher.path": hashed[0], "model.teacher.revision": hashed[1]})
    shown = tried(*(settings for settings, _ in wrong), *right)
    assert len(shown) == len(wrong) + len(right) - 2, shown[-1]
    expect = [*of_cache.values(), hashed[2]]
    shown, of_cached = shown[: -len(expect)], shown[-len(expect) :]
    for expected, text in zip(expect, of_cached, strict=True):
        assert re.search(rf"^error: --model.teacher.{expected}", text, re.MULTILINE), text
        assert not re.search("^(tokenized|data:)", text, re.MULTILINE), text
    for (settings, expected), text in zip(wrong, shown, strict=False):
        assert re.search(rf"^error: {expected}", text, re.MULTILINE), (settings, text)
        assert text.endswith("exit 2\n")
        assert not re.search("^(tokenized|data:)", text, re.MULTILINE), text
    first, continued, again, tuned, without_start, *moved, offline, numbers, no_weights = shown[len(wrong) :]
    assert f"--model.teacher.path acme/teacher: commit {version}\n" in first
    assert re.search("^tokenized 80 documents", first, re.MULTILINE)
    assert re.search("^tokenized 40 documents", first, re.MULTILINE)
    assert re.search("^done: step 4, ", first, re.MULTILINE)
    assert "computed differently" not in continued  # the commit is that of v1
    assert "teacher: acme/teacher, 13,392 parameters" in continued
    assert re.search("^done: step 12, ", continued, re.MULTILINE)
    assert re.search("^done: step 12, ", again, re.MULTILINE), again
    assert re.search("^done: step 6, ", tuned, re.MULTILINE), tuned
    assert "--model.student.path acme/gated is gone: the student is built from the checkpoint, " in without_start
    assert re.search("^done: step 12, ", without_start, re.MULTILINE), without_start
    assert re.search("^tokenized 3 documents", moved[0], re.MULTILINE), moved[0]  # not lines
    [report] = tried.folder.glob("numbers/**/report.md")
    assert re.search("^tokenized 65 documents", numbers, re.MULTILINE), numbers
    assert {"007", "1.50", "NA"} <= set(re.findall(r"[\w.]+", report.read_text())), numbers
    scored = json.loads((report.parent / "scores.json").read_text())["scored"]
    assert scored["teacher"].endswith(str(config_hash(hub / "models/acme/teacher/main")))
    said = f"continuing with --model.teacher.weights {commits[1]} (checkpoint: {commits[0]}): the steps that follow"
    assert said in moved[1], moved[1]
    assert "error: --data.source: cannot read acme/others: Couldn't reach 'acme/others'" in offline
    assert not any("tokenized" in text for text in (continued, again, offline))
    assert "acme/pickled: the hub is offline, and its cache here has no weights in safetensors of commit" in no_weights
