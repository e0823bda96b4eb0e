"""Thirds of the held-out text: by definition, through the real command, and what is refused."""

import json
import os
import re
import shutil
from dataclasses import asdict, replace

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import arguments, scalars, write_corpus
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from salt_lightning import SALTDataModule, SALTModule, cli
from salt_lightning.errors import ConfigError
from salt_lightning.teacher.difficulty import DocumentLossWriter, HeldOut, find_files, read_thirds, thirds
from salt_lightning.teacher.scores import write_table


def reference(nll, tokens):
    """The third of each document, in integers: twice the tokens before its middle, by loss, over twice all tokens."""
    place = []
    for i, n in enumerate(tokens):
        easier = [j for j, m in enumerate(tokens) if m and n and (nll[j] / m, j) < (nll[i] / n, i)]
        middle = sum(2 * tokens[j] for j in easier) + n
        place.append(-1 if n == 0 else 0 if 3 * middle < 2 * sum(tokens) else 1 if 3 * middle < 4 * sum(tokens) else 2)
    return place


# few different values, so that most examples have ties and documents on a cut
@hypothesis_settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(st.sampled_from([1.0, 2.0, 3.5]), st.sampled_from([0, 1, 2, 6])), min_size=1, max_size=12))
def test_equals_the_definition(documents):
    tokens = [n for _, n in documents]
    nll = [loss * n for loss, n in documents]
    if sum(tokens):
        assert thirds(np.array(nll), np.array(tokens)).tolist() == reference(nll, tokens)


def test_by_hand():
    # losses 3, 1, 1, 2 in documents of 2, 1, 3, 3 tokens, and one document without: 9 tokens, cuts at 3 and 6
    nll, tokens = np.array([6.0, 1.0, 0.0, 3.0, 6.0]), np.array([2, 1, 0, 3, 3])
    # in order: no. 1 (middle 0.5), no. 3 (2.5), no. 4 (5.5), no. 0 (8): equal ones are ordered by number
    assert thirds(nll, tokens).tolist() == [2, 0, -1, 0, 1]
    assert thirds(np.full(6, 1.0), np.full(6, 1)).tolist() == [0, 0, 1, 1, 2, 2]


HELD_OUT = HeldOut("text", "tokenizer", block_size=32, isolate_documents=True, num_rows=4)


def write_losses(folder, nll, tokens, held_out=HELD_OUT):
    folder.mkdir(parents=True)
    about = {"held_out": asdict(held_out), "model": "teacher"}
    columns = {"document": np.arange(len(nll)), "nll": np.array(nll, float), "tokens": np.array(tokens)}
    table = pa.table(columns).replace_schema_metadata({"documents": json.dumps(about)})
    write_table(folder / "documents.parquet", table)


def test_each_verb_reads_the_losses_of_its_own_text(tmp_path):
    """`validate` and `test` of one run; where both read the same text, that of the verb goes first."""
    write_losses(tmp_path / "validate", [1, 2, 3], [1, 1, 1])
    write_losses(tmp_path / "test", [3, 2, 1], [1, 1, 1])
    found = [read_thirds(tmp_path, HELD_OUT, verb).tolist() for verb in ("fit", "validate", "test")]
    assert found == [[0, 1, 2], [0, 1, 2], [2, 1, 0]]
    apart = replace(HELD_OUT, tokens="other")
    write_losses(tmp_path / "run/validate", [1, 2, 3], [1, 1, 1])
    write_losses(tmp_path / "run/test", [3, 2, 1], [1, 1, 1], apart)
    found = [read_thirds(tmp_path / "run", held_out, "validate").tolist() for held_out in (HELD_OUT, apart)]
    assert found == [[0, 1, 2], [2, 1, 0]]
    with pytest.raises(ConfigError, match=r"/run/validate/documents.parquet was made with other held-out text"):
        read_thirds(tmp_path / "run", replace(HELD_OUT, tokens="third"), "fit")


def test_one_long_document_may_leave_a_third_empty(tmp_path, caplog):
    """Its middle is past the first cut: none is easy."""
    write_losses(tmp_path / "validate", [100, 2, 3], [100, 1, 1])
    with caplog.at_level("INFO"):
        assert read_thirds(tmp_path, HELD_OUT, "fit").tolist() == [1, 2, 2]
    assert "difficulty by teacher: easy 0 documents; medium 1 documents with 100 tokens, CE 1.0000; " in caplog.text
    assert "; hard 2 documents with 2 tokens, CE 2.5000" in caplog.text


@pytest.mark.parametrize(
    "about", [None, b"[]", b"{}", b"no JSON", b'{"model": "", "held_out": 3}', "columns", "types", "nulls", "byte"]
)
def test_a_table_that_validate_has_not_written_is_refused(tmp_path, about):
    write_losses(tmp_path / "validate", [1, 2, 3], [1, 1, 1])
    file = tmp_path / "validate/documents.parquet"
    table = pq.read_table(file)
    if about == "byte":
        pq.write_table(table, file, compression="none", use_dictionary=False, write_page_checksum=True)
        content = bytearray(file.read_bytes())
        content[content.index(np.array([1.0, 2.0, 3.0]).tobytes())] ^= 1
        file.write_bytes(content)
    else:
        kept = about and {"documents": about}
        if isinstance(about, str):
            odd = {"columns": table["nll"], "types": table["nll"].cast("string"), "nulls": [1.0, None, 3.0]}[about]
            table, kept = table.set_column(1, "rank" if about == "columns" else "nll", [odd]), table.schema.metadata
        write_table(file, table.replace_schema_metadata(kept))
    with pytest.raises(ConfigError, match=rf"{file} is damaged or was not written by `cli.py validate` \(."):
        read_thirds(file, HELD_OUT, "fit")


@pytest.fixture(scope="module")
def looked_at(settings, teacher, tmp_path_factory):
    """The teacher's run after its `validate`."""
    run = tmp_path_factory.mktemp("judge") / "run"
    own = {k: v for k, v in settings.items() if not k.startswith(("checkpoint.", "model."))}
    assert cli.main(["validate", *arguments(own, {"run": str(run), "ckpt_path": teacher})]) == 0
    return run


def nll_by_document(checkpoint, settings):
    """Document -> nll of its labels, in float64. Documents are separated by the EOS before them."""
    module = SALTModule.load_from_checkpoint(checkpoint, weights_only=True).double()
    data = SALTDataModule(**{k.removeprefix("data."): v for k, v in settings.items() if k.startswith("data.")})
    data.prepare_data()
    data.setup("validate")
    eos, document, nll = data.tokenizer.eos_token_id, 0, {}
    for batch in data.val_dataloader():
        with torch.no_grad():
            hidden, head, _ = module.student.eval()(batch["input_ids"], batch["positions"])
        log_p = torch.log_softmax(hidden @ head.T, 1)
        inputs, labels = batch["input_ids"].flatten(), batch["labels"].flatten()
        for place in range(len(labels)):
            if labels[place] != -100:
                nll.setdefault(document, []).append(-log_p[place, labels[place]].item())
            document += int(inputs[place] == eos)
    return nll


def test_a_baseline_is_split_by_the_teachers_loss(settings, teacher, looked_at, fit_with, tmp_path, capsys):
    by_teacher = nll_by_document(teacher, settings)
    table = pq.read_table(looked_at / "validate" / "documents.parquet")
    assert table["tokens"].to_pylist() == [len(by_teacher.get(d, [])) for d in range(len(table))]
    expected = [sum(by_teacher.get(d, [])) for d in range(len(table))]
    assert table["nll"].to_pylist() == pytest.approx(expected, rel=1e-5)

    run = tmp_path / "run"
    assert fit_with(run, **{"data.difficulty": str(looked_at)}) == 0
    third = reference(table["nll"].to_pylist(), table["tokens"].to_pylist())
    by_student = nll_by_document(run / "checkpoints/step-00000012.ckpt", settings)
    fewer = {k: v for k, v in settings.items() if not k.startswith(("checkpoint.", "model."))}
    own = {"run": str(run), "ckpt_path": "last", "data.difficulty": str(looked_at / "validate/documents.parquet")}
    assert cli.main(["test", *arguments(fewer, own)]) == 0
    assert [path.parent.name for path in run.glob("*/documents.parquet")] == ["test"]
    logged = {**scalars(run), **scalars(run / "test", ("test/",))}
    sizes = []
    for number, name in enumerate(("easy", "medium", "hard")):
        own_nll = [x for d, values in by_student.items() if third[d] == number for x in values]
        sizes.append(len(own_nll))
        for prefix in ("val", "test"):
            assert logged[f"{prefix}/ce/{name}"][12] == pytest.approx(sum(own_nll) / len(own_nll), rel=1e-5)
    whole = sum(n * logged[f"val/ce/{name}"][12] for n, name in zip(sizes, ("easy", "medium", "hard"), strict=True))
    assert whole / sum(sizes) == pytest.approx(logged["val/ce"][12], rel=1e-6)
    assert "test/ce/hard" in capsys.readouterr().out
    file = looked_at / "validate/documents.parquet"
    assert [find_files(place, "fit") for place in (looked_at, file.parent, file)] == [[file]] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.val_fraction": 0.2}, "was made with other held-out text (--data.source, val_source, test_source"),
        ({"data.val_rows": 5}, "was made with other --data.val_rows"),
        ({"data.block_size": 16}, "was made with other --data.block_size and --data.val_rows"),
        ({"data.isolate_documents": False}, "was made with other --data.isolate_documents"),
        ({"data.vocab_size": 290}, "and --data.tokenizer"),
        (
            {"data.difficulty": "/nowhere"},
            "--data.difficulty /nowhere: no validate/documents.parquet in it; to write it, run `cli.py va",
        ),
    ],
)
def test_a_split_of_something_else_is_refused(looked_at, fit_with, tmp_path, capsys, change, message):
    assert fit_with(tmp_path / "run", **{"data.difficulty": str(looked_at), **change}) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run/config.yaml").exists()


def test_a_part_of_the_text_makes_no_file(settings, teacher, tmp_path, caplog):
    """In Python; the command has --data.val_rows for it."""
    sizes = {name: settings[f"data.{name}"] for name in ("source", "vocab_size", "block_size", "cache_dir")}
    data = SALTDataModule(**sizes, micro_batch_size=2, val_fraction=0.1)
    for part in (2, 0.5):
        writer = DocumentLossWriter()
        trainer = pl.Trainer(limit_val_batches=part, default_root_dir=tmp_path, accelerator="cpu", logger=False,
                             callbacks=[writer],
                             enable_progress_bar=False)  # fmt: skip
        trainer.validate(SALTModule(teacher), data)
        assert writer._metric is None  # a fit would go on with it
    assert caplog.text.count("batches were read, so losses per document are not written") == 2
    assert not list(tmp_path.rglob("*.parquet"))


def test_a_damaged_file_is_named(looked_at, fit_with, tmp_path, capsys):
    file = tmp_path / "documents.parquet"
    for content in (b"", (looked_at / "validate/documents.parquet").read_bytes()[:-9]):
        file.write_bytes(content)
        assert fit_with(tmp_path / "run", **{"data.difficulty": str(file)}) == 2
        assert f"--data.difficulty {file} is damaged or was not written by `cli.py validate`" in capsys.readouterr().err


def test_a_source_with_the_name_of_a_third(settings, teacher, looked_at, fit_with, tmp_path, capsys):
    corpus = tmp_path / "easy.jsonl"
    shutil.copy(settings["data.source"], corpus)
    other = write_corpus(tmp_path / "b.jsonl", 40, seed=3)
    own = {"data.source": [str(corpus), str(other)], "data.val_source": [str(corpus), str(other)], "data.val_rows": 9}
    fewer = {k: v for k, v in settings.items() if not k.startswith(("checkpoint.", "model."))}
    run = str(tmp_path / "judge")
    assert fit_with(tmp_path / "fit", **own) == 0
    assert cli.main(["validate", *arguments(fewer, own, {"run": run, "ckpt_path": last(tmp_path / "fit")})]) == 0
    assert fit_with(tmp_path / "run", **own, **{"data.difficulty": run}) == 2
    assert "--data.difficulty: a source has the name of a third, 'easy'" in capsys.readouterr().err
    checked = {"model.teacher.path": last(tmp_path / "fit"), "run": str(tmp_path / "new"), "data.difficulty": run}
    assert cli.main(["check", *arguments(settings, own, checked)]) == 1
    assert re.search("ERROR +thirds +--data.difficulty: a source has the name of a third", capsys.readouterr().out)


def test_too_few_documents(settings, fit_with, tmp_path, capsys):
    """Of three documents two lie in the rows that are evaluated: the first, and that in the middle."""
    long = tmp_path / "three.jsonl"
    long.write_text(f"{json.dumps({'text': 'a small teacher ' * 40})}\n" * 3)
    own = {"data.val_source": str(long), "data.val_rows": 2}
    assert fit_with(tmp_path / "fit", **own) == 0
    fewer = {k: v for k, v in settings.items() if not k.startswith(("checkpoint.", "model."))}
    assert cli.main(["validate", *arguments(fewer, own, {"run": str(tmp_path / "fit"), "ckpt_path": "last"})]) == 0
    assert fit_with(tmp_path / "run", **own, **{"data.difficulty": str(tmp_path / "fit")}) == 2
    assert "has 2 documents with labels: too few for three thirds" in capsys.readouterr().err


def last(run):
    return str(run / "checkpoints/step-00000012.ckpt")


def test_files_whose_names_are_not_utf8_stay_apart(tmp_path, fit_with, capsys, settings):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number, name in enumerate((b"\xd0\xc2.jsonl", b"\xd6\xd0.jsonl")):
        write_corpus(folder / os.fsdecode(name), 60, seed=number)
    own = {"data.source": str(folder), "data.source_per_file": True, "data.val_fraction": 0.2}
    assert fit_with(tmp_path / "run", **own) == 0
    parts = {tag for tag in scalars(tmp_path / "run") if "ce/" in tag}
    assert parts == {r"val/ce/\udcd0\udcc2.jsonl", r"val/ce/\udcd6\udcd0.jsonl"}
    assert fit_with(tmp_path / "two", **{"data.source": str(folder / os.fsdecode(b"\xd0\xc2.jsonl"))}) == 2
    assert r"\udcd0\udcc2.jsonl is not UTF-8; rename it, or give its folder or a glob" in capsys.readouterr().err
    hidden = {"data.source": str(folder), "data.val_source": str(folder)}
    capsys.readouterr()
    assert cli.main(["check", *arguments(settings, own, hidden, {"run": str(tmp_path / "c"), "kd.weight": 0.0})]) == 0


def test_each_file_is_a_source_by_the_end_of_its_path(tmp_path, fit_with, capsys):
    folder = tmp_path / "texts"
    for number, name in enumerate(("a/one.jsonl", "b/one.jsonl", "b/two.jsonl")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_corpus(folder / name, 60, seed=number)
    own = {"data.source": str(folder / "*/*.jsonl"), "data.source_per_file": True, "data.val_fraction": 0.2}
    assert fit_with(tmp_path / "run", **own) == 0
    logged = scalars(tmp_path / "run")
    assert {tag for tag in logged if "ce/" in tag} == {"val/ce/a/one.jsonl", "val/ce/b/one.jsonl", "val/ce/b/two.jsonl"}
    lowest, highest = (f(v[12] for t, v in logged.items() if "ce/" in t) for f in (min, max))
    assert lowest < logged["val/ce"][12] < highest
    assert fit_with(tmp_path / "two", **own, **{"data.source_column": "text"}) == 2
    assert "--data.source_per_file: True and --data.source_column both define" in capsys.readouterr().err
