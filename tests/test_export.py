"""Exports: loading in transformers, the model card, chains of teachers, memory, and what is refused."""

import json
import resource
import shutil
import signal
import sys
from dataclasses import asdict, replace
from pathlib import Path

import forked
import pytest
import torch
import yaml
from conftest import ALWAYS, StopAt, add_table, arguments, scalars
from families import FAMILIES, tiny
from lightning.pytorch.callbacks import Callback
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaTokenizer

from salt_lightning import cli
from salt_lightning.comparison import lineage
from salt_lightning.errors import ConfigError
from salt_lightning.export import _write_settings, _write_tokenizer, check_target, export
from salt_lightning.hugging_face import old_names
from salt_lightning.hugging_face.card import model_card
from salt_lightning.hugging_face.spec import ModelSpec, resolved
from salt_lightning.models import load_pretrained
from salt_lightning.run.run_config import _keep_tokenizer
from salt_lightning.run.runlog import Run, read_run

ROOT = Path(__file__).parents[1]
IDS = torch.tensor([[5, 9, 3, 60, 7, 7, 22, 1, 30, 2]])


def save(model, path: Path, **extra: object) -> Path:
    """Writes a checkpoint of `model` as a run does."""
    state = {f"student.model.{name}": tensor for name, tensor in model.state_dict().items()}
    spec = asdict(resolved(ModelSpec(), model.config))
    torch.save({"state_dict": state, "hyper_parameters": {"student": spec}, **ALWAYS, **extra}, path)
    return path


def load(folder: Path):
    """Loads the exported model; fails if a weight was missing or unused."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def files(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_are_the_students_bit_for_bit(family, tied, tmp_path):
    own = tiny(family, tie_word_embeddings=tied).model.eval()
    export(save(own, tmp_path / "x.ckpt"), tmp_path / "out")
    model = load(tmp_path / "out")
    assert type(model) is type(own)
    assert torch.equal(model(IDS).logits, own(IDS).logits)
    own.save_pretrained(tmp_path / "theirs")  # names, tied weights once, values: as transformers writes them
    ours, theirs = files(tmp_path / "out"), files(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    assert len(ours) == len(own.state_dict()) - tied or "num_experts" in FAMILIES[family]  # stored one by one
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    config, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "theirs"))
    assert config == other | old_names.config_names(own.config)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LONG = {**YARN, "rope_type": "longrope", "short_factor": [1.5] * 4, "long_factor": [2.5] * 4}
FAR, NEAR = {"rope_type": "default", "rope_theta": 3.7e5}, {"rope_type": "default", "rope_theta": 37.0}


@pytest.mark.parametrize(("family", "ropes", "old"), [
    ("llama", FAR, {"rope_theta": 3.7e5}),
    ("mistral", {**YARN, "rope_theta": 3.7e5}, {"rope_theta": 3.7e5, "rope_scaling": YARN}),
    ("phi", {**YARN, "rope_theta": 37.0, "partial_rotary_factor": 0.75},
     {"rope_theta": 37.0, "partial_rotary_factor": 0.75, "rope_scaling": YARN}),
    ("qwen3", {**LONG, "rope_theta": 37.0},
     {"rope_theta": 37.0, "rope_scaling": LONG, "original_max_position_embeddings": 8}),
    ("gpt_oss", NEAR, {"rope_theta": 37.0, "rope_scaling": {"rope_type": "default"}, "num_experts": 4}),
    ("gpt_neox", {**NEAR, "partial_rotary_factor": 0.5}, {"rotary_emb_base": 37.0, "rotary_pct": 0.5}),
    ("gemma3_text", {"full_attention": FAR, "sliding_attention": NEAR},
     {"rope_theta": 3.7e5, "rope_local_base_freq": 37.0}),
    ("olmo3", {"full_attention": FAR, "sliding_attention": FAR}, {"rope_theta": 3.7e5}),
    ("olmo3", {"full_attention": {**YARN, "rope_theta": 37.0}, "sliding_attention": NEAR},
     {"rope_theta": 37.0, "rope_scaling": YARN}),
    ("olmo3", {"full_attention": NEAR, "sliding_attention": {**NEAR, "rope_theta": 5e5}}, {}),
])  # fmt: skip
def test_the_rope_is_said_in_the_names_of_transformers_4_too(family, ropes, old, tmp_path):
    """Version 4 takes the family's own rope, without a word, if it does not find these (tried with 4.57.6)."""
    own = tiny(family, max_position_embeddings=32, rope_parameters=ropes).model.eval()
    export(save(own, tmp_path / "x.ckpt"), tmp_path / "out")
    own.save_pretrained(tmp_path / "theirs")
    config, other = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("out", "theirs"))
    added = {name: value for name, value in config.items() if name not in other or name in old}
    assert added == old  # transformers 5.17 writes phi's share itself
    assert torch.equal(load(tmp_path / "out")(IDS).logits, own(IDS).logits)
    if old and family != "olmo3":  # this version reads them too, where there is nothing else
        del config["rope_parameters"]
        (tmp_path / "out/config.json").write_text(json.dumps(config))
        assert torch.equal(load(tmp_path / "out")(IDS).logits, own(IDS).logits)


def test_layers_may_have_no_rope():
    config = AutoConfig.for_model("llama")
    config.rope_parameters = {"full_attention": None, "sliding_attention": NEAR}  # as in transformers' beam
    assert old_names.config_names(config) == {}


def test_experts_are_stored_one_by_one_as_the_hub_has_them(tmp_path):
    sizes = {**FAMILIES["qwen3"], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    own = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3_moe", **sizes)).eval()
    export(save(own, tmp_path / "x.ckpt"), tmp_path / "out")
    own.save_pretrained(tmp_path / "theirs")
    assert files(tmp_path / "out").keys() == files(tmp_path / "theirs").keys()
    assert len(files(tmp_path / "out")) > len(own.state_dict())
    assert torch.equal(load(tmp_path / "out")(IDS).logits, own(IDS).logits)
    said = json.loads((tmp_path / "out/config.json").read_text())
    assert said["num_experts"] == 4  # the name of transformers 4, and of the hub's qwen3_moe


@pytest.mark.parametrize(("family", "name"), [("qwen3_moe", "num_experts"), ("deepseek_v3", "n_routed_experts"),
                                              ("gpt_oss", "num_local_experts")])  # fmt: skip
def test_the_card_says_how_many_experts_there_are(tmp_path, family, name):
    sizes = {
        **FAMILIES["llama"],
        name: 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
    }
    own = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes))
    export(save(own, tmp_path / "x.ckpt"), tmp_path / "out")
    said = (tmp_path / "out/README.md").read_text()
    assert ", num_experts 4, num_experts_per_tok 2, " in said
    assert ("moe_intermediate_size" in said) == (family != "gpt_oss")
    rest = sum(p.numel() for name, p in own.named_parameters() if p.ndim < 3 or ".experts." not in name)
    all_of_them = sum(p.numel() for name, p in own.named_parameters() if p.ndim == 3 and ".experts." in name)
    assert f" parameters, {rest + all_of_them // 2:,} active per token\n" in said


@pytest.fixture(scope="module")
def salt(settings, teacher, tmp_path_factory) -> Path:
    """A run with a teacher in the first 4 of 12 steps, exported at its end to salt/out."""
    run = tmp_path_factory.mktemp("export") / "salt"
    own = {"run": str(run), "model.teacher.path": teacher, "kd.steps": 4, "checkpoint.export": str(run / "out"),
           "checkpoint.every_n_steps": 6}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    return run


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").iterdir())


def test_a_finished_run_is_exported(salt):
    last = checkpoints(salt)[-1]
    own = load_pretrained(ModelSpec(path=str(last)), "student", torch.float32).eval()
    assert torch.equal(load(salt / "out")(IDS).logits, own(IDS).logits)
    assert {path.name for path in (salt / "out").iterdir()} == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert not list(salt.glob(".*"))
    modes = {path.stat().st_mode for path in (salt / "out").iterdir()}
    assert len(modes) == 1  # all files have the same read permissions
    tokenizer = AutoTokenizer.from_pretrained(salt / "out")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(salt / "tokenizer").get_vocab()
    ids = tokenizer("the small teacher", return_tensors="pt")
    generated = load(salt / "out").generate(**ids, max_new_tokens=3, do_sample=False)
    assert generated.shape[1] == ids["input_ids"].shape[1] + 3 or generated[0, -1] == tokenizer.eos_token_id
    generation = GenerationConfig.from_pretrained(salt / "out")
    assert [generation.eos_token_id, generation.bos_token_id] == [tokenizer.eos_token_id] * 2


@pytest.mark.parametrize(("family", "where"), [("qwen3", ""), ("qwen2", "tokenizer")])
def test_the_exported_tokenizer_cuts_text_as_in_training(settings, tmp_path, caplog, family, where):
    """transformers reads a tokenizer that lies beside a qwen2 by Qwen's rules, whatever tokenizer.json says."""
    run, out = tmp_path / "run", tmp_path / "out"
    config = {**settings["model.student.config"], "num_key_value_heads": 2}
    own = {"run": str(run), "model.student.family": family, "checkpoint.export": str(out), "kd.weight": 0.0,
           "trainer.max_steps": 2, "model.student.config": config}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    expected, found = (AutoTokenizer.from_pretrained(folder) for folder in (run / "tokenizer", out / where))
    text = "in 1984 the \u00e9lan vital, e\u0301 and 12345\n\n  of it"
    assert found(text)["input_ids"] == expected(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(out, subfolder=where)(text) == found(text)
    assert (out / "tokenizer.json").exists() == (where == "")
    assert (out / where / "tokenizer.json").exists()
    card = (out / "README.md").read_text()
    assert ('from_pretrained("out", subfolder="tokenizer")' in card) == (where != "")
    padded = found(["a", text], padding=True, truncation=True)["input_ids"]
    assert {len(ids) for ids in padded} == {32}  # of the model
    assert (found.pad_token_id, found.model_max_length) == (expected.eos_token_id, 32)
    caplog.clear()
    again = {"run": str(tmp_path / "again"), "model.student.path": str(out), "data.tokenizer": str(out),
             "kd.weight": 0.0, "trainer.max_steps": 2}  # fmt: skip
    plain = {key: value for key, value in settings.items() if not key.startswith(("model.student", "data.vocab_size"))}
    assert cli.main(["fit", *arguments(plain, again)]) == 0
    assert "splits text by other rules" not in caplog.text
    saved = [torch.load(checkpoints(each)[-1], weights_only=True)["data"] for each in (run, tmp_path / "again")]
    assert saved[0] == saved[1]  # the same tokens


def test_generation_ends_where_the_tokenizer_says(salt, tmp_path):
    checkpoint = torch.load(checkpoints(salt)[-1], weights_only=True)
    checkpoint["hyper_parameters"]["student"]["config"] |= {"eos_token_id": 7, "pad_token_id": 9}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    for name, tokenizer, expected in (("with", str(salt / "tokenizer"), (0, 9)), ("without", None, (7, 9))):
        export(tmp_path / "x.ckpt", tmp_path / name, tokenizer=tokenizer)
        generation = GenerationConfig.from_pretrained(tmp_path / name)
        assert (generation.eos_token_id, generation.pad_token_id) == expected  # this tokenizer has no pad token
    assert AutoTokenizer.from_pretrained(tmp_path / "with").pad_token is None  # 9 also occurs in text


@pytest.mark.parametrize(("own", "exported"), [(7, 7), (4096, 32)])
def test_a_tokenizer_keeps_its_own_length_up_to_the_models(salt, tmp_path, own, exported):
    tokenizer = AutoTokenizer.from_pretrained(salt / "tokenizer", model_max_length=own)
    tokenizer.save_pretrained(tmp_path / "its own")
    export(checkpoints(salt)[-1], tmp_path / "out", tokenizer=str(tmp_path / "its own"))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").model_max_length == exported


def test_an_export_leaves_the_callers_tokenizer_alone(salt, tmp_path):
    own = AutoTokenizer.from_pretrained(salt / "tokenizer")
    before = own.model_max_length
    export(checkpoints(salt)[-1], tmp_path / "from Python", tokenizer=own)
    assert own.model_max_length == before > AutoTokenizer.from_pretrained(tmp_path / "from Python").model_max_length


def test_a_tokenizer_is_said_in_the_names_of_transformers_4(salt, tmp_path):
    """Which knows no TokenizersBackend, and takes extra_special_tokens for a mapping."""
    tokenizer = AutoTokenizer.from_pretrained(salt / "tokenizer")
    marks = tokenizer.convert_ids_to_tokens([7, 8])
    tokenizer.add_special_tokens({"extra_special_tokens": marks})
    tokenizer.save_pretrained(tmp_path / "marked")
    export(checkpoints(salt)[-1], tmp_path / "out", tokenizer=str(tmp_path / "marked"))
    said = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert said["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert said["model_input_names"] == ["input_ids", "attention_mask"]  # a gpt2 takes token_type_ids for tokens
    assert said["additional_special_tokens"] == marks
    assert not {"extra_special_tokens", "is_local", "local_files_only"} & set(said)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").all_special_tokens == tokenizer.all_special_tokens


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_2_s_tokenizer_stays_the_same(legacy, tmp_path):
    """Version 5 does not save `legacy`, which decides about the word after a special token."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "\u2581a": 5}
    own = LlamaTokenizer(vocab=words, merges=[("\u2581", "a")], legacy=legacy)
    expected = own("<s>a")["input_ids"]
    assert expected == ([1, 5] if legacy else [1, 4])
    _keep_tokenizer(own, tmp_path / "made", tmp_path / "run")
    _write_tokenizer(own, tmp_path / "out")
    for folder in (tmp_path / "run/tokenizer", tmp_path / "out"):
        assert AutoTokenizer.from_pretrained(folder)("<s>a")["input_ids"] == expected


@pytest.mark.parametrize(("bos", "eos"), [(True, False), (False, False), (False, True), (True, True)])
def test_whether_texts_begin_and_end_with_marks_is_said_where_version_4_would_not_know(bos, eos, tmp_path):
    """Its Llama and Gemma tokenizers begin with a BOS unless these settings say otherwise."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "a": 4, "\u2581a": 5}
    own = LlamaTokenizer(vocab=words, merges=[("\u2581", "a")], add_bos_token=bos, add_eos_token=eos)
    expected = [1] * bos + [5] + [2] * eos
    assert own("a")["input_ids"] == expected
    _write_tokenizer(own, tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == expected
    said = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (said.get("add_bos_token", True), said.get("add_eos_token", False)) == (bos, eos)


def test_a_checkpoint_in_the_working_directory_has_its_run_s_tokenizer(salt, tmp_path, monkeypatch):
    monkeypatch.chdir(checkpoints(salt)[-1].parent)
    assert cli.main(["export", checkpoints(salt)[-1].name, str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/tokenizer.json").exists()


def test_marks_that_only_a_generation_config_names_go_on_to_end_a_generation(salt, settings, tmp_path):
    """As in Phi-3 and gpt-oss: the config has one of them."""
    start, out = tmp_path / "start", tmp_path / "out"
    shutil.copytree(salt / "out", start)
    found = json.loads((start / "generation_config.json").read_text())
    stops = [found["eos_token_id"], 7]
    (start / "generation_config.json").write_text(json.dumps({**found, "eos_token_id": stops}))
    own = {"run": str(tmp_path / "run"), "model.student.path": str(start), "data.tokenizer": str(start),
           "kd.weight": 0.0, "trainer.max_steps": 2, "checkpoint.export": str(out)}  # fmt: skip
    plain = {key: value for key, value in settings.items() if not key.startswith(("model.student", "data.vocab_size"))}
    assert cli.main(["fit", *arguments(plain, own)]) == 0
    assert GenerationConfig.from_pretrained(out).eos_token_id == stops
    with pytest.raises(ConfigError, match=r"--to .*: its name is longer than 210 bytes; choose a shorter one"):
        check_target(tmp_path / ("\u00e9" * 106), "--to")


@pytest.mark.parametrize(("stops", "generation"), [([0, 7], [0, 7]), ([7, 9], 0)])
def test_a_chats_marks_go_on_to_end_a_generation(salt, tmp_path, stops, generation):
    """Several end ids that include the tokenizer's EOS; without it they are those of another tokenizer."""
    checkpoint = torch.load(checkpoints(salt)[-1], weights_only=True)
    checkpoint["hyper_parameters"]["student"]["config"] |= {"eos_token_id": stops}
    torch.save(checkpoint, tmp_path / "x.ckpt")
    export(tmp_path / "x.ckpt", tmp_path / "out", tokenizer=str(salt / "tokenizer"))
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == generation
    assert AutoConfig.from_pretrained(tmp_path / "out").eos_token_id == generation


def test_config_json_has_the_tokenizer_s_tokens(salt, tmp_path):
    """Some loaders read no generation_config.json. A fresh model has EOS for all; EOS goes on to be its padding."""
    tokenizer = AutoTokenizer.from_pretrained(salt / "tokenizer")
    tokenizer.bos_token, tokenizer.pad_token = tokenizer.convert_ids_to_tokens([7, 8])
    tokenizer.save_pretrained(tmp_path / "marked")
    export(checkpoints(salt)[-1], tmp_path / "out", tokenizer=str(tmp_path / "marked"))
    config, generation = (
        AutoConfig.from_pretrained(tmp_path / "out"),
        GenerationConfig.from_pretrained(tmp_path / "out"),
    )
    end = tokenizer.eos_token_id
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (7, end, end)
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (7, end, 8)


def test_a_composite_config_keeps_the_ids_of_its_text(tmp_path):
    """The part for text has them, and the whole does not."""
    config = AutoConfig.for_model("gemma3")
    config.eos_token_id = config.bos_token_id = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    ids = model.config.text_config.bos_token_id, model.config.text_config.eos_token_id
    _write_settings(model, None, tmp_path)
    written, generation = AutoConfig.from_pretrained(tmp_path), GenerationConfig.from_pretrained(tmp_path)
    assert (written.text_config.bos_token_id, written.text_config.eos_token_id) == ids != (None, None)
    assert (generation.bos_token_id, generation.eos_token_id) == ids


def test_the_verb_exports_any_checkpoint(salt, tmp_path, capsys):
    middle = checkpoints(salt)[1]
    assert middle.name == "step-00000006.ckpt"
    assert cli.main(["export", str(middle), str(tmp_path / "new" / "six"), "--dtype", "bfloat16"]) == 0
    out = capsys.readouterr().out
    assert (
        out == f"written: {tmp_path}/new/six: 30,880 parameters in bfloat16, 1 file of weights, model card, tokenizer\n"
    )
    own = load_pretrained(ModelSpec(path=str(middle)), "student", torch.bfloat16).eval()
    model = load(tmp_path / "new" / "six")
    assert model.dtype == torch.bfloat16
    assert torch.equal(model(IDS).logits, own(IDS).logits)


def test_the_card_says_what_was_trained_on_what(salt, teacher, corpus):
    text = (salt / "out" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front == {"library_name": "transformers", "pipeline_tag": "text-generation",
                     "tags": ["salt-lightning", "knowledge-distillation"]}  # fmt: skip
    logged = scalars(salt)
    student, taught = (logged[f"train/flops_{who}_total"] for who in ("student", "teacher"))
    lines = text.splitlines()
    for line in (
        "# out",
        "- student: llama, 30,880 parameters",
        "- weights: float32",
        "- method: SALT step",
        f"- teacher: {teacher}",
        "- KD: weight 0.667 in the first 4 steps, then 0; teacher temperature 1",
        f"- training text: {corpus}",
        "- text size: 108 documents, 10,126 tokens",
        "- rows: 8 of 32 tokens per step",
        "- steps: 12 of 12, 4 of them with the teacher",
        "- tokens: 3,072 (0.30 times the text)",
        f"- FLOPs of the student: {student[12] / 1e6:.4g} MFLOP",
        f"- FLOPs of the teacher: {taught[4] / 1e6:.4g} MFLOP, without its own training",
        "- FLOPs of scoring: 0 FLOP",
        "## Validation after step 12",
        f"- ce: {logged['val/ce'][12]:.4f}",
        "License: not stated.",
    ):
        assert line in lines, line
    # compare reads this if the model is a teacher
    taught_by = Run("x", salt, {"model.teacher.path": str(salt / "out")}, {})
    assert lineage.training(taught_by, lineage.teacher_runs(taught_by, []))[0] == pytest.approx(
        student[12] + taught[4], rel=1e-3
    )


def test_the_card_of_a_step_in_the_middle(salt, tmp_path):
    export(checkpoints(salt)[0], tmp_path / "four")
    lines = (tmp_path / "four" / "README.md").read_text().splitlines()
    assert "- steps: 4 of 12, 4 of them with the teacher" in lines
    assert "## Validation after step" not in "".join(lines)  # the first one was after step 6


def test_a_checkpoint_without_its_run(salt, tmp_path, capsys):
    bare = Path(shutil.copy(checkpoints(salt)[-1], tmp_path / "a.ckpt"))
    assert "no tokenizer (none in" in export(bare, tmp_path / "bare")
    assert not list((tmp_path / "bare").glob("token*"))
    card = (tmp_path / "bare" / "README.md").read_text()
    assert "AutoTokenizer" not in card
    assert "- method: SALT step" in card
    assert "- steps: 12, 4 of them with the teacher" in card
    export(bare, tmp_path / "with", tokenizer=str(salt / "tokenizer"))
    assert (tmp_path / "with" / "tokenizer.json").read_bytes() == (salt / "out" / "tokenizer.json").read_bytes()


def card_lines(salt: Path, config: dict[str, object], **changed: object) -> list[str]:
    """The card of salt's last checkpoint and run with some entries changed."""
    run = read_run(salt, "salt")
    checkpoint = torch.load(checkpoints(salt)[-1], weights_only=True) | changed
    model = AutoModelForCausalLM.from_pretrained(salt / "out")
    return model_card("x", checkpoint, model, replace(run, config=run.config | config), None).splitlines()


@pytest.mark.parametrize(
    ("schedule", "taught_steps", "lines"),
    [
        ({"weight": 0.0}, 0, ["- method: BASELINE", "- steps: 12 of 12", "- FLOPs of the teacher: 0 FLOP"]),
        ({"steps": None}, 12, ["- method: RKD", "- steps: 12 of 12, 12 of them with the teacher",
                           "- KD: weight 0.667 in every step; teacher temperature 1"]),
        ({"anneal_steps": 2, "shape": "linear"}, 4,
         ["- method: SALT linear", "- KD: weight 0.667 in the first 4 steps, falling (linear) in the last 2 of them, "
          "then 0; teacher temperature 1"]),
    ],
)  # fmt: skip
def test_the_card_names_the_method(schedule, taught_steps, lines, salt):
    found = card_lines(
        salt,
        {},
        kd_schedule={"weight": 0.667, "steps": 4, "anneal_steps": 0, "shape": "step"} | schedule,
        totals={"step": 12, "taught_steps": taught_steps},
    )
    assert [line for line in lines if line not in found] == []
    assert any("teacher" in line for line in found[:20]) == (schedule != {"weight": 0.0})


def test_the_card_says_where_it_went_on_under_other_settings(salt):
    run, now = read_run(salt, "salt"), read_run(salt, "salt").config["data.source"]
    other = {"data.source": "old/*.jsonl", "model.teacher.path": "old.ckpt"}
    starts = [(2, {**run.config, **other}), (12, {**run.config, "trainer.max_steps": 99}),
              (20, {**run.config, "trainer.max_steps": 50})]  # fmt: skip
    checkpoint = torch.load(checkpoints(salt)[-1], weights_only=True)
    model = AutoModelForCausalLM.from_pretrained(salt / "out")
    lines = model_card("x", checkpoint, model, replace(run, earlier=tuple(starts)), None).splitlines()
    own = run.config["model.teacher.path"]
    found = f"data.source {now} (before old/*.jsonl), model.teacher.path {own} (before old.ckpt), trainer.max_steps 99"
    assert f"- resumed: at step 2 under other settings: {found} (before 12)" in lines  # not what holds from step 12 on
    assert f"- teacher: old.ckpt, then {own}" in lines
    checkpoint["hyper_parameters"]["teacher"]["revision"] = "v1"
    checkpoint["trainer"]["--model.teacher.weights"] = "0123456789" * 4  # of a hub
    lines = model_card("x", checkpoint, model, replace(run, earlier=tuple(starts)), None).splitlines()
    assert f"- teacher: old.ckpt, then {own} at revision v1, commit {'0123456789' * 4}" in lines
    assert "- tokens: 3,072" in lines  # on unknown text


@pytest.mark.parametrize("step", [3, 4])
def test_the_card_names_a_selection_only_if_its_rows_were_read(salt, step):
    run, model = read_run(salt, "salt"), AutoModelForCausalLM.from_pretrained(salt / "out")
    # of phase 1, which has 4 steps
    selecting = run.config | {"data.selection": "scores", "data.keep.unread_first": False}
    went_on = replace(run, config=selecting, earlier=((step, run.config),))
    card = model_card("x", torch.load(checkpoints(salt)[-1], weights_only=True), model, went_on, None)
    assert ("- selected by: scores" in card) == (step < 4)


def test_the_card_of_a_run_that_went_on_without_its_teacher(salt):
    lines = card_lines(salt, {}, kd_schedule={"weight": 0.0, "steps": None, "anneal_steps": 0, "shape": "step"},
                       totals={"step": 12, "taught_steps": 3, "teacher_flops": 5e6})  # fmt: skip
    assert "- method: BASELINE, after steps with a teacher" in lines
    assert "- steps: 12 of 12, 3 of them with the teacher" in lines
    assert any(line.startswith("- teacher: ") for line in lines)


def test_the_card_says_what_a_margin_did_and_that_a_schedule_was_changed(salt):
    planned = {"weight": 0.667, "steps": 4, "anneal_steps": 0, "shape": "step", "stop_margin": 0.2}
    for stop_step, said in ((3, "ended by a validation within a"), (None, "with no validation within a")):
        changed = {"kd_schedule": planned, "kd_stop_step": stop_step}
        taught = {"totals": {"step": 12, "taught_steps": stop_step or 4}}
        (line,) = [line for line in card_lines(salt, {}, **changed, **taught) if line.startswith("- KD: ")]
        assert f", {said} margin of 0.2 nats" in line
        assert "earlier start" not in line
    (line,) = [line for line in card_lines(salt, {}, totals={"step": 12, "taught_steps": 9}) if "- KD: " in line]
    assert "; an earlier start of the run followed another schedule" in line


def test_only_names_of_the_hub_are_given_to_the_hub(salt, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--owner--small"
    for name, text in (("refs/main", "a" * 40), (f"snapshots/{'a' * 40}/config.json", "{}")):
        (repository / name).parent.mkdir(parents=True)
        (repository / name).write_text(text)
    for path, found in (("owner/small", "owner/small"), ("my/folder", None), ("/no/such/folder", None), (None, None)):
        text = {"source": ["owner/texts", "my/texts"], "hub": ["owner/texts"]}
        lines = card_lines(salt, {"model.student.path": path}, text=text)
        front = yaml.safe_load("\n".join(lines).split("---")[1])
        assert front.get("base_model") == found
        assert front["datasets"] == ["owner/texts"]
    monkeypatch.chdir(tmp_path)
    Path("owner/small").mkdir(parents=True)
    Path("owner/small/config.json").write_text("{}")  # a folder of the same name
    assert not any("base_model" in line for line in card_lines(salt, {"model.student.path": "owner/small"}))


@pytest.mark.parametrize(
    ("manifest", "said"),
    [
        (None, "not known"),
        ("{", "not known"),
        ("{}", "not known"),
        ("[]", "not known"),
        ('{"scoring_flops": 2.5e12}', "2.5 TFLOP"),
    ],
)
def test_scoring_is_counted_where_its_manifest_says_so(manifest, said, salt, tmp_path):
    if manifest:
        (tmp_path / "scores.json").write_text(manifest)
    lines = card_lines(salt, {"data.selection": str(tmp_path)})
    assert "- method: SALT_DS step" in lines
    rule = "fraction 0.5, order highest, k 10, masked zero, drop_top 0.0, unread_first True"
    assert f"- selected by: {tmp_path}, {rule}" in lines
    assert f"- FLOPs of scoring: {said}" in lines


def test_a_student_is_the_next_teacher_and_the_next_start(salt, settings, tmp_path):
    """Two generations later: the exported model teaches a third model, and a fourth one starts from it."""
    out = str(salt / "out")
    grown = {**settings["model.student.config"], "hidden_size": 48}
    third = {"run": str(tmp_path / "third"), "model.teacher.path": out, "kd.steps": 3, "trainer.max_steps": 4,
             "model.student.config": grown, "data.tokenizer": out, "trainer.val_check_interval": 4,
             "checkpoint.export": str(tmp_path / "third" / "out")}  # fmt: skip
    assert cli.main(["fit", *arguments(settings, third)]) == 0
    assert load(tmp_path / "third" / "out").config.hidden_size == 48
    assert f"- teacher: {out}" in (tmp_path / "third" / "out" / "README.md").read_text()

    cut, plain = str(tmp_path / "cut"), load(Path(out))  # a student's softmax includes its padding
    plain.resize_token_embeddings(settings["data.vocab_size"])
    plain.save_pretrained(cut)
    start = {"model.student.path": out, "model.student.config": {}, "kd.weight": 0.0, "data.tokenizer": out}
    fourth = {
        **start,
        "model.student.path": cut,
        "run": str(tmp_path / "fourth"),
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
    }
    assert cli.main(["fit", *arguments(settings, fourth)]) == 0
    export(checkpoints(tmp_path / "fourth")[-1], tmp_path / "fourth" / "out")
    assert f"- started from: {cut}" in (tmp_path / "fourth" / "out" / "README.md").read_text()

    # The third's teacher and the fourth's initial model are the same: equal loss on the same first rows,
    teaches, starts = scalars(tmp_path / "third")["train/teacher_ce"][1], scalars(tmp_path / "fourth")["train/ce"][1]
    assert teaches == starts
    # and it is the one that was trained.
    assert cli.main(["validate", *arguments(settings, start, {"run": str(tmp_path / "fifth")})]) == 0
    assert set(scalars(tmp_path / "fifth" / "validate")["val/ce"].values()) == {scalars(salt)["val/ce"][12]}


def test_an_interrupted_run_is_not_exported(fit_with, tmp_path):
    code = fit_with(tmp_path / "run", StopAt(3), **{"checkpoint.export": str(tmp_path / "out")})
    assert code == 128 + signal.SIGTERM
    assert not (tmp_path / "out").exists()


def test_what_dies_between_the_last_save_and_the_export_is_exported_by_the_next_start(fit_with, tmp_path, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt(signal.SIGTERM)

    own = {"checkpoint.export": str(tmp_path / "out"), "ckpt_path": "last"}
    handler = signal.getsignal(signal.SIGINT)  # Lightning ignores Ctrl-C from here on
    try:
        with monkeypatch.context() as patch:
            patch.setattr("salt_lightning.checkpoint.export", killed)
            assert fit_with(tmp_path / "run", **own) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGINT, handler)
    assert not (tmp_path / "out").exists()
    assert fit_with(tmp_path / "run", **own) == 0
    assert (tmp_path / "out/model.safetensors").exists()


class EndsEarly(Callback):
    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == 7


def test_a_run_that_ends_early_is_exported_unless_it_is_to_go_on(fit_with, tmp_path):
    assert fit_with(tmp_path / "run", EndsEarly(), **{"checkpoint.export": str(tmp_path / "out")}) == 0
    assert (tmp_path / "out/model.safetensors").exists()
    timed = {"checkpoint.export": str(tmp_path / "timed"), "trainer.max_time": "00:00:00:01", "trainer.max_steps": 9999}
    assert fit_with(tmp_path / "longer", **timed) == 0
    assert not (tmp_path / "timed").exists()


class MakesFolder(Callback):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, *args):
        self.folder.mkdir()
        (self.folder / "config.json").touch()


def test_what_another_run_has_exported_meanwhile_is_not_ours(fit_with, tmp_path, capsys):
    own = {"checkpoint.export": str(tmp_path / "out")}
    assert fit_with(tmp_path / "run", MakesFolder(tmp_path / "out"), **own) == 2
    assert f"{tmp_path}/out exists already" in capsys.readouterr().err


def test_a_finished_run_of_another_folder_is_exported_from_there(fit_with, tmp_path):
    assert fit_with(tmp_path / "run") == 0
    last = tmp_path / "run/checkpoints/step-00000012.ckpt"
    assert fit_with(tmp_path / "new", ckpt_path=str(last), **{"checkpoint.export": str(tmp_path / "out")}) == 0
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_signal_in_the_last_step_changes_nothing(fit_with, tmp_path, capsys, slurm):
    requeued = slurm()
    own = {"checkpoint.export": str(tmp_path / "out"), "ckpt_path": "last"}
    assert fit_with(tmp_path / "run", StopAt(12, signal.SIGUSR1), **own) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("done: step 12")
    written = (tmp_path / "out/model.safetensors").stat().st_mtime_ns
    assert requeued() == []
    assert fit_with(tmp_path / "run", **own) == 0  # the same command again
    assert (tmp_path / "out/model.safetensors").stat().st_mtime_ns == written
    assert fit_with(tmp_path / "run", **own, **{"trainer.max_steps": 14}) == 2  # another end: another student


# --- memory ---

MEMORY = """
import sys, threading, time
from pathlib import Path
import torch
from salt_lightning.export import export

def resident_mb():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024

folder = Path(sys.argv[1])
export(folder / "tiny.ckpt", folder / "tiny")  # loads what is loaded once
for name, dtype in (("one.ckpt", None), ("one.ckpt", torch.bfloat16), ("sharded.ckpt", None)):
    peak, done = [resident_mb()] * 2, threading.Event()
    def watch():
        while not done.is_set():
            peak[1] = max(peak[1], resident_mb())
            time.sleep(0.0005)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    export(folder / name, folder / f"{name}.{dtype}", dtype, max_file_bytes=20 << 20)
    done.set()
    watcher.join()
    print(peak[1] - peak[0])
"""


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # saved by one process, as is wanted here
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_does_not_grow_with_the_model(tmp_path):
    """150 MB of weights in files of 20 MB."""
    import torch.distributed.checkpoint as dcp

    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 7, "num_attention_heads": 8}
    config = AutoConfig.for_model("llama", **sizes, vocab_size=8192, max_position_embeddings=64)
    model = AutoModelForCausalLM.from_config(config)
    save(model, tmp_path / "one.ckpt")
    assert (tmp_path / "one.ckpt").stat().st_size > 150e6
    whole = torch.load(tmp_path / "one.ckpt", weights_only=True, mmap=True)
    dcp.save({"state_dict": whole.pop("state_dict")}, checkpoint_id=tmp_path / "sharded.ckpt", no_dist=True)
    add_table(tmp_path / "sharded.ckpt")
    torch.save(whole, tmp_path / "sharded.ckpt" / "meta.pt")
    save(tiny("llama").model, tmp_path / "tiny.ckpt")
    done = forked.run([sys.executable, "-c", MEMORY, tmp_path])
    assert done.returncode == 0, done.stderr
    one, cast, sharded = map(float, done.stdout.split())
    # A file's worth of the mapped checkpoint; to cast it, twice that and the file's worth of copies; a sharded one is
    # put together, with a tensor (17 MB) thrice. The 20 are for Python's own.
    assert one < 20 + 21
    assert cast < 20 + 3 * 21
    assert sharded < 20 + 21 + 3 * 17
    index = json.loads((tmp_path / "one.ckpt.None" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    for name in ("one.ckpt.None", "sharded.ckpt.None"):
        sizes = [path.stat().st_size for path in (tmp_path / name).glob("*.safetensors")]
        assert len(sizes) > 7
        assert max(sizes) < (20 << 20) + 100_000
        loaded = load(tmp_path / name).state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in model.state_dict().items())


# --- what is refused ---


def refused(capsys, *args: object) -> str:
    """The one line that `export` ends with."""
    assert cli.main(["export", *map(str, args)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 1
    assert lines[0].startswith("error: export: ")
    return lines[0]


def test_a_target_that_exists_is_refused(salt, settings, capsys, tmp_path):
    before = {path: path.read_bytes() for path in (salt / "out").iterdir()}
    said = refused(capsys, checkpoints(salt)[-1], salt / "out")
    assert f"export: DIR {salt}/out exists already; choose another name or remove it" in said
    assert {path: path.read_bytes() for path in (salt / "out").iterdir()} == before
    own = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "checkpoint.export": str(salt / "out")}
    assert cli.main(["fit", *arguments(settings, own)]) == 2  # before anything is trained
    assert f"--checkpoint.export {salt}/out exists already" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_of_another_model_is_refused(salt, tmp_path, capsys):
    whole = torch.load(checkpoints(salt)[-1], weights_only=True)
    state, norm = whole["state_dict"], "student.model.model.norm.weight"
    cases = {
        "norm.weight 32 (checkpoint: none)": {k: v for k, v in state.items() if k != norm},
        "norm.weight 32 (checkpoint: 31)": {**state, norm: state[norm][1:]},
        "extra.weight none (checkpoint: 32)": {**state, "student.model.extra.weight": state[norm]},
    }
    for message, changed in cases.items():
        torch.save({**whole, "state_dict": changed}, tmp_path / "x.ckpt")
        said = refused(capsys, tmp_path / "x.ckpt", tmp_path / "out")
        assert (
            f"export: CKPT {tmp_path}/x.ckpt contains another model than its settings say (1 of its weights differ: "
            in said
        )
        assert message in said
    whole["hyper_parameters"]["student"]["family"] = "nope"
    torch.save(whole, tmp_path / "x.ckpt")
    said = refused(capsys, tmp_path / "x.ckpt", tmp_path / "out")
    assert "transformers cannot build its nope" in said
    assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]


def test_a_tokenizer_of_another_vocabulary_is_refused(salt, tmp_path, capsys):
    shutil.copytree(salt / "tokenizer", tmp_path / "other")
    rules = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    vocab = rules["model"]["vocab"]
    a, b = list(vocab)[-2:]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(rules))
    said = refused(capsys, checkpoints(salt)[-1], tmp_path / "out", "--tokenizer", tmp_path / "other")
    assert f"--tokenizer {tmp_path}/other is not the one that this student was trained with" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["gone.ckpt", "out"], "CKPT gone.ckpt does not exist; give one of RUN/checkpoints/step-*.ckpt"),
        (["{run}", "out"], "is the folder of a run; give one of"),
        (["{run}/config.yaml", "out"], "is not a whole checkpoint of this project"),
        (["{last}", "out", "--dtype", "int4"], "--dtype: invalid choice: 'int4'"),
        (["{last}", "out", "--tokenizer", "./none"], "export: --tokenizer: the folder './none' does not exist"),
        (["{last}", "out", "--tokenizer", ""], "export: --tokenizer: cannot load ''"),
        (["{last}"], "the following arguments are required: DIR"),
    ],
)
def test_what_is_typed_wrong_is_named(salt, args, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [arg.format(run=salt, last=checkpoints(salt)[-1]) for arg in args]
    assert message in refused(capsys, *args)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(salt, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # the weights take 125 KB
    try:
        assert cli.main(["export", str(checkpoints(salt)[-1]), str(tmp_path / "out")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    err = capsys.readouterr().err
    said = f"{tmp_path}/out cannot be written (File too large); fix that and try again"
    assert err.strip().splitlines()[-1] == f"error: {said}"
    assert not list(tmp_path.iterdir())


def test_two_exports_at_once_leave_each_others_files_alone(salt, tmp_path, monkeypatch, capsys):
    """They have the same process ID, as the first processes of two containers do."""
    module, again = sys.modules["salt_lightning.export"], ["export", str(checkpoints(salt)[-1]), str(tmp_path / "out")]
    verify, codes = module.verify, []

    def verify_late(folder: Path) -> None:
        monkeypatch.undo()
        codes.append(cli.main(again))
        verify(folder)

    monkeypatch.setattr(module, "verify", verify_late)
    assert (cli.main(again), codes) == (1, [0])
    assert f"error: {tmp_path}/out cannot be written (Directory not empty)" in capsys.readouterr().err
    load(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_export_left_is_deleted_by_the_next(salt, tmp_path, caplog):
    left, others = (tmp_path / f".{name}.{'3f' * 16}.tmp" for name in ("out", "others"))
    notes = tmp_path / ".out.notes.tmp"  # of no export
    for folder in (left, others, notes):  # nobody holds them
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(bytes(9))
    assert cli.main(["export", str(checkpoints(salt)[-1]), str(tmp_path / "out")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [others.name, notes.name, "out"]
    assert f"export: deleted {left}, which an export that was killed had left" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(salt, capsys):
    assert cli.main(["export", str(checkpoints(salt)[-1]), "/proc/none/out"]) == 1
    said = "cannot be written (No such file or directory); was its folder removed? Otherwise choose another folder"
    assert capsys.readouterr().err.strip().splitlines()[-1] == f"error: /proc/none/out {said}"
