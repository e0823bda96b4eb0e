"""A small share of benchmarks/fuzz.py's cases, always the same, and the defects that the campaign found."""

import json
import logging
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import fuzz
from test_prepare import byte_tokenizer, corpus_of, stored

from salt_lightning.data import SALTDataModule
from salt_lightning.errors import ConfigError
from salt_lightning.fit.cadence import accumulation
from salt_lightning.fit.optim import OptimSpec
from salt_lightning.hugging_face.spec import ModelSpec
from salt_lightning.module import SALTModule
from salt_lightning.text import documents
from salt_lightning.text.prepare import prepare_tokens

CASES = {"documents": 15, "broken": 15, "killed": 3, "settings": 200, "commands": 5, "steps": 3}


@pytest.mark.parametrize("part", CASES)
def test_a_share_of_the_campaign(part, caplog):
    caplog.set_level(logging.ERROR)
    try_all, tried = fuzz.property_of(part, CASES[part], None, shrink=True)
    try_all()
    assert len(tried) >= CASES[part] * 0.5


# --- what the campaign has found, in its smallest form ---


def prepared(tmp_path: Path, name: str, content: bytes) -> list[tuple[str, str]]:
    (tmp_path / name).write_bytes(content)
    folder = prepare_tokens(corpus_of(tmp_path / name), byte_tokenizer(), 0.0, tmp_path / "cache", 1)
    return stored(folder, "train", byte_tokenizer())


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl"])
def test_the_byte_order_mark_of_a_file_is_no_text(name, tmp_path):
    text = "a\ufeffb"  # elsewhere it is a character
    content = text if name == "x.txt" else json.dumps({"text": text})
    assert prepared(tmp_path, name, ("\ufeff" + content).encode()) == [(text, "x")]


def test_a_file_of_nothing_but_a_byte_order_mark_is_empty(tmp_path):
    with pytest.raises(ConfigError, match="no document with text"):
        prepared(tmp_path, "x.jsonl", "\ufeff".encode())


def test_a_file_whose_name_has_brackets_gives_its_own_name_to_its_source(tmp_path):
    assert prepared(tmp_path, "a[1]*.txt", b"text") == [("text", "a[1]*")]


def test_half_a_surrogate_pair_in_the_name_of_a_source(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a", "kind": "\\ud800"}\n')
    corpus = corpus_of(tmp_path / "x.jsonl", source_column="kind")
    folder = prepare_tokens(corpus, byte_tokenizer(), 0.0, tmp_path / "cache", 1)
    assert stored(folder, "train", byte_tokenizer()) == [("a", "?")]  # tags in logs must be UTF-8


def test_an_error_is_one_line_whatever_a_file_is_called(tmp_path):
    with pytest.raises(ConfigError) as caught:
        prepared(tmp_path, "a\nb\x1b[2J.jsonl", b"{")
    assert "\\n" in str(caught.value)
    assert str(caught.value).isprintable()  # no escape sequence reaches the terminal


def test_a_zip_archive_is_not_taken_for_the_text_in_it(tmp_path):
    import zipfile

    with zipfile.ZipFile(tmp_path / "x.jsonl.zip", "w") as archive:
        archive.writestr("../../x.jsonl", '{"text": "a"}')
    with pytest.raises(ConfigError, match=r"x.jsonl.zip is an archive of files, which is not read; unpack it"):
        prepared(tmp_path, "x.jsonl.zip", (tmp_path / "x.jsonl.zip").read_bytes())


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt"])
def test_a_document_that_no_memory_can_hold_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "_MAX_BYTES", 1 << 20)
    monkeypatch.setattr(documents, "_RAW_CHARS", 100)
    assert prepared(tmp_path, name, b'{"text": "a"}')
    line = r"line 11" if name == "x.jsonl" else "line 1"
    with pytest.raises(
        ConfigError,
        match=rf"^--data.source: .*{name}: the document from {line} is longer than 1 MiB; split it",
    ):
        prepared(tmp_path, name, b'{"text": "a"}\n' * 10 + b'{"text": "' + b"a" * (1 << 20) + b'"}')


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: OptimSpec(lr=float("inf"), eps=float("inf")),
            r"--model.optim.lr inf must .*--model.optim.eps inf must",
        ),
        (
            lambda: OptimSpec(weight_decay=float("inf")),
            r"--model.optim.weight_decay inf must be 0 or more, and finite",
        ),
        (
            lambda: SALTModule(ModelSpec(), teacher_temperature=float("nan"), logits_budget_gib=float("inf")),
            r"--model.teacher_temperature nan must be .*--model.logits_budget_gib inf must be",
        ),
        (lambda: SALTModule(ModelSpec(), accuracy="other"), r"--model.accuracy 'other' must be accurate or fast"),
        (lambda: SALTDataModule("x", seed=2**63), r"--data.seed: 9223372036854775808 must be .* below 2\*\*63"),
        (lambda: SALTDataModule("x", global_batch_size=10**12), r"--data.global_batch_size: 10+ must be"),
        (lambda: SALTDataModule("x", vocab_size=2**31), r"--data.vocab_size: 2147483648 must be"),
    ],
)
def test_values_that_are_no_numbers_to_work_with(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


CONFIGS = {
    'run: x\ndata: "\\0"': r"line 2: a value contains a zero byte",
    "model: &a {student: *a}": r"settings contain themselves, or are nested too deeply",
    "model: " + "[" * 3000: r"settings contain themselves, or are nested too deeply",
}


@pytest.mark.parametrize("text", CONFIGS, ids=["zero", "loop", "deep"])
def test_yaml_that_parsers_stumble_over_is_one_line(text, tmp_path, capsys):
    (tmp_path / "x.yaml").write_text(text)
    assert fuzz.cli.main(["fit", f"--config={tmp_path / 'x.yaml'}"]) == 2
    fuzz.assert_one_error(err := capsys.readouterr().err)
    assert re.search(CONFIGS[text], err)


@pytest.mark.parametrize(
    ("name", "value"),
    [("trainer.logger", "&a [*a]"), ("model.student.config", "&a {x: *a}"), ("data.source", "[" * 3000)],
)
def test_a_setting_that_contains_itself_is_one_line(name, value, capsys):
    assert fuzz.cli.main(["fit", f"--{name}={value}", "--run=x"]) == 2
    fuzz.assert_one_error(err := capsys.readouterr().err)
    assert f"error: --{name} {value}: settings contain themselves, or are nested too deeply" in err


def test_batch_sizes_of_billions_are_refused_at_once():
    with pytest.raises(ConfigError, match=r"--data.micro_batch_size 1 or 2147483629"):
        accumulation(2**31 - 19, 2, 1)  # a prime


def test_a_mark_within_a_file_is_not_dropped(tmp_path):
    with pytest.raises(ConfigError, match="x.jsonl: line 2 is not JSON"):
        prepared(tmp_path, "x.jsonl", '{"text": "a"}\n\ufeff{"text": "b"}\n'.encode())
