"""What `test` measures besides the loss: generation, choices, and figures from them."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import arguments, error_of, weights
from families import tiny
from ranks import launch
from test_examples import TEMPLATE, chat_tokenizer, turn
from test_parallel import DDP, FSDP2
from test_prepare import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from salt_lightning import cli
from salt_lightning.answers import (
    AnswerTest,
    extracted,
    figures,
    generate,
    normalized,
    response_nll,
    summary,
    turn_ends,
    wilson,
)
from salt_lightning.errors import ConfigError

ROOT = Path(__file__).parents[1]
PROMPTS = [[5, 9, 3], [7], [11, 2, 6, 30, 4]]
EOS = 0


# --- of a model ---


def packed_logits(lm, prompts):
    """The last logits of each prompt by the training forward: all in one row, isolated by their positions."""
    ids = torch.tensor([[token for prompt in prompts for token in prompt]])
    positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts])[None]
    logits = lm(ids, positions, then=torch.nn.functional.linear)
    return logits[torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "opt"])
@torch.no_grad()
def test_generation_begins_where_the_packed_forward_ends(family):
    lm = tiny(family).eval()
    lm.check()
    expected = packed_logits(lm, PROMPTS)
    seen = []
    original = lm.model.generate

    def spy(*args, **kwargs):
        out = original(*args, **kwargs, output_logits=True, return_dict_in_generate=True)
        seen.append(out.logits[0])
        return out.sequences

    lm.model.generate = spy
    generate(lm.model, PROMPTS, 3, [EOS], torch.device("cpu"))
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_generation_is_greedy_and_ends_at_the_first_mark_of_an_end(family):
    """Compared with a loop without cache, padding or batch."""
    lm = tiny(family).eval()
    longest = {}
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(8):
            ids.append(int(lm.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        longest[tuple(prompt)] = ids[len(prompt) :]
    stops = [longest[tuple(PROMPTS[0])][4], longest[tuple(PROMPTS[1])][2]]  # so that two of them end early
    ends = ([place for place, token in enumerate(answer) if token in stops] for answer in longest.values())
    expected = [answer[: min(found, default=8)] for answer, found in zip(longest.values(), ends, strict=True)]
    lm.model.generation_config.update(repetition_penalty=9.0, temperature=0.1, do_sample=True)  # as in a hub model
    before = torch.get_rng_state()
    assert generate(lm.model, PROMPTS, 8, stops, torch.device("cpu")) == expected
    assert torch.equal(before, torch.get_rng_state())
    assert lm.model.generation_config.repetition_penalty == 9.0
    assert len(expected[0]) <= 4
    assert len(expected[1]) <= 2


@torch.no_grad()
def test_the_likelihood_of_a_response():
    lm = tiny("llama").eval()
    pairs = [([5, 9, 3], [8, 0]), ([7], [1, 2, 3, 0])]
    found = response_nll(lm, pairs, torch.device("cpu"), 2.0)
    for (prompt, response), nll in zip(pairs, found.tolist(), strict=True):
        log_p = lm.model(torch.tensor([prompt + response])).logits[0].double().log_softmax(-1)
        by_hand = -sum(log_p[len(prompt) - 1 + i, token].item() for i, token in enumerate(response))
        assert nll == pytest.approx(by_hand, abs=1e-5)


# --- of texts and numbers ---


@pytest.mark.parametrize(
    ("response", "ends"),
    [
        (["4", "<turn>", "<eos>"], {"<turn>"}),  # Gemma
        (["4", "<turn>", "\n", "<eos>"], {"<turn>"}),  # Phi-3
        (["4", "<eos>"], set()),  # a turn that ends with EOS: Qwen, Llama 3, plain text
        (["<message>", "4", "<eos>"], set()),  # gpt-oss: it would end each answer before its first word
        (["<eos>"], set()),
    ],
)
def test_marks_that_end_a_turn(response, ends):
    words = ["4", "\n", "<turn>", "<message>", "<eos>"]
    found = turn_ends([[words.index(word) for word in response]], {2, 3, 4}, lambda ids: words[ids[0]])
    assert {words[i] for i in found} == ends


@pytest.mark.parametrize(
    ("text", "pattern", "part"),
    [
        ("so 3 + 4 = 7.\n#### 7", "#### *(.+)", "7"),
        ("#### 1 no\n#### 2", "#### *(.+)", "2"),
        ("9 apples of 12", r"\d+", "12"),
        ("Monday", r"\d+", "Monday"),
        (" 9 apples", None, " 9 apples"),
        ("", r"\d+", ""),
        ("12 apples", r"\d*", "12"),  # matches nothing at each other place, too
        ("no number", r"\d*", "no number"),
        ("so it is no", "(it is )?(yes|no)", "it is "),
        ("well, no", "(it is )?(yes|no)", "no"),
        ("a: b:", "[ab]:(.*)", " b:"),
    ],
)
def test_the_part_that_counts(text, pattern, part):
    assert extracted(text, re.compile(pattern) if pattern else None) == part


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (" 9 apples", "9"),
        (" 9, because", "9"),
        (" 12:", "12"),
        (" $-1,250.50 in all", "-1,250.50"),
        (" 3/4 of it", "3/4"),
        (" 17 years old; 12 years old", "17 years old; 12"),
        (" 11:55 p.m. on 24 December 2014.", "11:55 p.m. on 24 December 2014"),
        (" Purple", " Purple"),
    ],
)
def test_the_part_of_an_asdiv_answer_that_counts(text, part):
    overlay = yaml.safe_load((ROOT / "configs" / "tasks" / "asdiv.yaml").read_text())
    assert extracted(text, re.compile(overlay["answers"]["extract"])) == part


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (" Yes.\n", "yes", True),
        ("1,234,567", "1234567", True),
        ("1,23", "123", False),
        ("9  apples", "9\napples", True),
        ("x²", "x^2", True),
        ("5²", "52", False),
        ("x¹²", "x^12", True),
        ("10⁻⁵", "10^-5", True),
        ("Acme™", "acmetm", True),
        ("...", "", False),
        (".", "", False),
        ("\xbd", "1/2", True),
        ("1\xbd", "1 1/2", True),
        ("1\xbd", "11/2", False),
        ("\U0001f3f4\U000e0065\U000e007f", "\U0001f3f4\U000e0073\U000e007f", False),  # flags of two countries
        ("\uff11\uff0c\uff10\uff10\uff10", "1000", True),
        ("\uff11\uff12 ﬁsh", "12 fish", True),
        ("東京。", "東京", True),
        ("नई दिल्ली।", "नई दिल्ली", True),
        ("لاہور\u06d4", "لاہور", True),
        ("٤٢", "42", True),
        ("४२", "42", True),
        ("\u200f42\u200f", "42\u200b", True),
        ("\u845b\U000e0100", "\u845b", True),  # as Japanese input methods write a name
        ("\u2764\ufe0f", "\u2764", True),
        ("1,00,000", "100000", True),
        ("1٬000", "1000", True),
        ("1\xa0000", "1000", True),
        ("1\u202f000", "1000", True),
        ("1\u2009000", "1000", True),
        ("1 000", "1000", False),
        ("12,34", "1234", False),
        ("42 .", "42", True),
        ("3,1415", "31415", False),
        ("Straße", "STRASSE", True),
        ("7.5", "75", False),
        ("no", "yes", False),
    ],
)
def test_what_is_the_same_answer(one, other, same):
    assert (normalized(one) == normalized(other)) == same


def test_wilson_by_hand():
    # Brown, Cai, DasGupta 2001: the roots p of (p - x/n)^2 = z^2 p (1 - p) / n
    for hits, trials in ((0, 10), (3, 10), (10, 10), (500, 1000)):
        for p in wilson(hits, trials):
            assert (p - hits / trials) ** 2 == pytest.approx(1.959964**2 * p * (1 - p) / trials, abs=1e-12)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)  # the usual table
    assert (wilson(0, 3)[0], wilson(20, 20)[1]) == (0, 1)  # not -0.0% or above 1 by rounding


def test_figures_by_hand():
    records = [
        {"response": " yes", "right": True, "exact": False, "expected": "1"},
        {"response": " yes", "right": False, "exact": False, "expected": "2"},
        {"response": " yes", "right": True, "exact": True, "expected": "2"},
        {"response": " no", "right": True, "exact": False, "expected": "3"},
    ]
    values = figures(records, 2)
    assert values["examples"] == 4
    assert (values["choice_accuracy"], values["choice_accuracy_majority"], values["choice_accuracy_chance"]) == (
        0.75, 0.75, 0.5,
    )  # fmt: skip
    assert (values["exact_match"], values["exact_match_majority"]) == (0.25, 0.5)
    assert (values["exact_match_low"], values["exact_match_high"]) == wilson(1, 4)
    assert "choice accuracy 75.0% (95%: 30.1% to 95.4%; always the most frequent answer: 75.0%, chance 50.0%)" in (
        summary(values)
    )


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"max_new_tokens": -1}, "--answers.max_new_tokens -1 must be 0 or more"),
        ({"max_examples": 0}, "--answers.max_examples 0 must be 1 or more, or null"),
        ({"choices": ["a"]}, "must be two or more responses, all different"),
        ({"choices": ["a", "a"]}, "must be two or more responses, all different"),
        ({"choices": ["a", " "]}, r"--answers.choices \['a', ' '\] must be two or more responses, .*, none blank"),
        ({"extract": "(", "max_new_tokens": 1}, r"--answers.extract '\(' is not a regular expression"),
    ],
)
def test_settings_out_of_range(own, message):
    with pytest.raises(ConfigError, match=message):
        AnswerTest(**own)


# --- fit, then test, by the command line ---

CAPITALS = {"France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo"}


@pytest.fixture(scope="module")
def learned(settings, tmp_path_factory) -> dict[str, object]:
    """A run that has memorized four answers, and the settings to test it."""
    folder = tmp_path_factory.mktemp("answers")
    byte_tokenizer().save_pretrained(folder / "tokenizer")
    rows = [{"q": country, "a": city} for country, city in CAPITALS.items()] * 3
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "data.source": str(folder / "rows.jsonl"), "data.val_source": str(folder / "rows.jsonl"),
        "data.tokenizer": str(folder / "tokenizer"), "data.examples.prompt": "Capital of {q}:",
        "data.examples.response": " {a}", "data.block_size": 48, "kd.weight": 0.0, "run": str(folder / "run"),
        "answers.max_new_tokens": 9, "answers.choices": [f" {city}" for city in CAPITALS.values()],
    }  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own, {"trainer.max_steps": 60, "trainer.val_check_interval": 60,
                                                       "model.optim.lr": 1e-2})]) == 0  # fmt: skip
    kept = ("data.", "run", "answers.", "trainer.accelerator", "trainer.enable")
    merged = {key: value for key, value in {**settings, **own}.items() if key.startswith(kept)}
    return {**merged, "ckpt_path": "last", "data.micro_batch_size": 2, "data.global_batch_size": 2}


def answers(run: object) -> list[dict]:
    with open(f"{run}/test/answers.jsonl") as file:
        return [json.loads(line) for line in file]


def test_learned_answers_are_found(learned, capsys, caplog):
    checkpoint = f"{learned['run']}/checkpoints/step-00000060.ckpt"
    before = weights(checkpoint)
    assert cli.main(["test", *arguments(learned)]) == 0
    table = capsys.readouterr().out
    for name in ("ce", "exact_match", "exact_match_low", "choice_accuracy", "choice_accuracy_majority", "examples"):
        assert f"test/{name} " in table
    assert "12 examples, choice accuracy 100.0% (95%: 75.8% to 100.0%; always the most frequent answer: 25.0%" in (
        caplog.text
    )
    found = answers(learned["run"])
    assert [record["example"] for record in found] == list(range(12))
    assert found[0]["prompt"] == "Capital of France:"
    assert (found[0]["generated"], found[0]["answer"], found[0]["exact"]) == (" Paris", "paris", True)
    assert found[0]["log_likelihood"][" Paris"] > math.log(0.5)
    after = weights(checkpoint)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert cli.main(["export", checkpoint, f"{learned['run']}/out"]) == 0
    card = Path(f"{learned['run']}/out/README.md").read_text()
    assert "A causal language model fine-tuned on responses by salt_lightning" in card
    assert "times the text" not in card  # of rows that examples do not fill
    shown = card.partition("## Test after step 60\n")[2]
    assert "- choice_accuracy: 1.0000\n" in shown
    assert "- examples: 12\n" in shown


def test_answers_that_cannot_be_written_are_one_line(learned, tmp_path, capsys):
    (tmp_path / "run" / "test" / "answers.jsonl").mkdir(parents=True)
    own = {"run": str(tmp_path / "run"), "answers.max_new_tokens": 0}
    checkpoint = f"{learned['run']}/checkpoints/step-00000060.ckpt"
    assert cli.main(["test", *arguments(learned, own, {"ckpt_path": checkpoint})]) == 1
    said = f"error: {tmp_path}/run/test/answers.jsonl cannot be written (Is a directory); fix that and try again"
    assert capsys.readouterr().err.strip().splitlines()[-1] == said


def test_it_is_told_how_often_the_part_to_compare_is_found(learned, caplog):
    """A pattern for another task's answers finds nothing, and all would be compared whole in silence."""
    own = {"answers.choices": "null", "answers.extract": "#+ *(.+)|(?:Rome|Oslo)"}
    assert cli.main(["test", *arguments(learned, own)]) == 0
    said = "--answers.extract '#+ *(.+)|(?:Rome|Oslo)' matches 6 responses and 6 generated texts of 12; the others"
    assert f"{said} are compared whole" in caplog.text


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"answers.choices": [" Paris", " Rome", " Madrid"]}, r"--answers.choices .*: none .* example 3, ' Oslo'"),
        (
            {"data.examples.prompt": "", "data.examples.response": "", "data.text_column": "q"},
            "--answers needs examples; define them with --data.examples",
        ),
    ],
)
def test_what_cannot_be_tested_is_refused(own, message, learned, capsys):
    assert cli.main(["test", *arguments(learned, own)]) == 2
    assert re.search(message, error_of(capsys))


def test_what_needs_no_text_is_refused_before_it_is_prepared(learned, monkeypatch, capsys):
    """It took minutes of tokenizing first."""
    monkeypatch.setattr("salt_lightning.data.SALTDataModule.prepare_data", lambda _: pytest.fail("text is prepared"))
    plain = {"data.examples.prompt": "", "data.examples.response": "", "data.text_column": "q"}
    sharded = {"trainer.strategy": {"class_path": "salt_lightning.parallel.FSDP2"}}
    lost = {"ckpt_path": "null", "model.student.path": "none/x.ckpt"}
    for verb, own, message in (
        ("test", plain, "--answers needs examples; define them with --data.examples"),
        ("test", sharded, "shards the student, but each device generates"),
        ("test", lost, "--model.student.path none/x.ckpt does not exist"),
        ("validate", lost, "--model.student.path none/x.ckpt does not exist"),
        ("validate", {"data.block_size": 4096}, "max_position_embeddings 48 is smaller than --data.block_size 4096"),
    ):
        assert cli.main([verb, *arguments(learned, own)]) == 2
        assert message in error_of(capsys)


def test_a_prompt_near_the_end_of_a_row_gets_what_is_left(learned, monkeypatch):
    """Only some examples are tested, evenly spaced ones."""
    asked = []

    def spy(model, prompts, max_new_tokens, *others):
        asked.extend((len(prompt), max_new_tokens) for prompt in prompts)
        return generate(model, prompts, max_new_tokens, *others)

    monkeypatch.setattr("salt_lightning.answers.generate", spy)
    own = {"data.block_size": 26, "answers.max_examples": 2, "answers.choices": "null"}
    assert cli.main(["test", *arguments(learned, own)]) == 0
    found = answers(learned["run"])
    assert [record["example"] for record in found] == [0, 6]
    assert asked == [(18, 8), (17, 9)]
    assert "choice" not in found[0]


def test_an_example_without_room_for_the_longest_choice_is_left_out(learned):
    """18 bytes of prompt and the 8 tokens of ' Madrid' and EOS are more than 25 tokens; 17 and 8 are not."""
    assert cli.main(["test", *arguments(learned, {"data.block_size": 25, "answers.max_new_tokens": 0})]) == 0
    assert [record["example"] for record in answers(learned["run"])] == [1, 2, 5, 6, 9, 10]


def test_the_same_answers_of_two_ranks(learned, tmp_path):
    """Five examples: the ranks have not equally many. FSDP chooses, and refuses to generate."""
    five = {**learned, "answers.max_examples": 5, "trainer.devices": 2, "data.global_batch_size": 4}
    assert cli.main(["test", *arguments(five, {"trainer.devices": 1})]) == 0
    expected = answers(learned["run"])
    jobs = {"ddp": DDP, "fsdp": {**FSDP2, "answers.max_new_tokens": 0}, "refused": FSDP2}
    checkpoint = f"{learned['run']}/checkpoints/step-00000060.ckpt"
    launch(
        [
            {"args": ["test", *arguments(five, own, {"run": str(tmp_path / name), "ckpt_path": checkpoint})],
             "code": 2 if name == "refused" else 0}
            for name, own in jobs.items()
        ],
        tmp_path,
    )  # fmt: skip
    assert "FSDP2 shards the student, but each device generates" in (tmp_path / "out.0").read_text()
    for name in ("ddp", "fsdp"):
        for one, other in zip(expected, answers(tmp_path / name), strict=True):
            likelihood = other.pop("log_likelihood")
            assert one["log_likelihood"] == pytest.approx(likelihood, abs=1e-4)
            assert other.items() <= one.items()


LABELS = {"France": "<|yes|>", "Italy": "<|no|>", "Spain": "<|yes|>", "Norway": "<|no|>"}


def test_answers_that_are_special_tokens_are_compared(settings, tmp_path, caplog, capsys):
    """Names of classes in a chat whose turns end with EOS: none is an end, and none is no text."""
    tokenizer = chat_tokenizer("<|end|>")
    tokenizer.add_tokens(["<|yes|>", "<|no|>"], special_tokens=True)
    tokenizer.unk_token = tokenizer.eos_token  # as GPT-2's
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [{"q": country, "a": label} for country, label in LABELS.items()] * 3
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "data.source": str(tmp_path / "rows.jsonl"), "data.val_source": str(tmp_path / "rows.jsonl"), "kd.weight": 0.0,
        "data.tokenizer": str(tmp_path / "chat"), "run": str(tmp_path / "run"), "data.block_size": 48,
        "data.examples.messages": [turn("user", "{q}"), turn("assistant", "{a}")], "answers.max_new_tokens": 3,
        "answers.choices": ["<|yes|>", "<|no|>"], "trainer.max_steps": 3, "trainer.val_check_interval": 3,
        "model.optim.warmup_steps": 1, "model.optim.lr": 1e-6,
    }  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    kept = ("data.", "run", "answers.", "trainer.accelerator", "trainer.enable")
    merged = {key: value for key, value in {**settings, **own}.items() if key.startswith(kept)}
    assert cli.main(["test", *arguments(merged, {"ckpt_path": "last"})]) == 0
    assert {record["expected"] for record in answers(tmp_path / "run")} == {"<|yes|>", "<|no|>"}
    assert not any(record["exact"] for record in answers(tmp_path / "run"))
    assert "always the most frequent answer: 50.0%, chance 50.0%); exact match 0.0%" in caplog.text
    assert "has no token for" not in caplog.text
    capsys.readouterr()
    same = {"ckpt_path": "last", "answers.choices": ["<|yes|>", "<|yes|> "]}
    tokenizer.chat_template = TEMPLATE.replace("m.content", "m.content | trim")
    tokenizer.save_pretrained(tmp_path / "chat")
    assert cli.main(["test", *arguments(merged, same)]) == 2
    assert "'<|yes|>' and '<|yes|> ' are the same tokens" in error_of(capsys)


def test_an_answer_that_the_tokenizer_does_not_know_is_never_exact(settings, tmp_path, caplog):
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "France", "Italy", ":", "Rome"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>").save_pretrained(
        tmp_path / "words"
    )
    rows = [{"q": "France", "a": "\u5df4\u9ece"}, {"q": "Italy", "a": "Rome"}] * 6
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {
        "data.source": str(tmp_path / "rows.jsonl"), "data.val_source": str(tmp_path / "rows.jsonl"), "kd.weight": 0.0,
        "data.tokenizer": str(tmp_path / "words"), "run": str(tmp_path / "run"), "data.block_size": 48,
        "data.examples.prompt": "{q} :", "data.examples.response": " {a}", "answers.max_new_tokens": 3,
        "trainer.max_steps": 40, "trainer.val_check_interval": 40, "model.optim.lr": 1e-2,
    }  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    kept = ("data.", "run", "answers.", "trainer.accelerator", "trainer.enable")
    merged = {key: value for key, value in {**settings, **own}.items() if key.startswith(kept)}
    assert cli.main(["test", *arguments(merged, {"ckpt_path": "last"})]) == 0
    assert "--data.tokenizer has no token for a part of 6 of 12 responses" in caplog.text
    assert [record["exact"] for record in answers(tmp_path / "run")] == [False, True] * 6
    part = {"ckpt_path": "last", "answers.extract": "^ ?[A-Z<]"}  # of "<unk>" the first character, which is no answer
    assert cli.main(["test", *arguments(merged, part)]) == 0
    assert all(record["exact"] for record in answers(tmp_path / "run"))


def test_an_answer_of_a_chat_ends_with_its_turn(learned, settings, tmp_path, monkeypatch):
    """Gemma's EOS ends no turn: a student that goes on behind the turn has answered all the same."""
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "chat")
    own = {
        "data.source": learned["data.source"], "data.val_source": learned["data.source"], "kd.weight": 0.0,
        "data.tokenizer": str(tmp_path / "chat"), "run": str(tmp_path / "run"), "data.block_size": 48,
        "data.examples.messages": [turn("user", "{q}"), turn("assistant", "{a}")], "answers.max_new_tokens": 3,
        "answers.max_examples": 2, "trainer.max_steps": 3, "trainer.val_check_interval": 3,
    }  # fmt: skip
    assert cli.main(["fit", *arguments(settings, own)]) == 0
    asked = []

    def spy(model, prompts, max_new_tokens, stops, device):
        asked.append(stops)
        return generate(model, prompts, max_new_tokens, stops, device)

    monkeypatch.setattr("salt_lightning.answers.generate", spy)
    kept = ("data.", "run", "answers.", "trainer.accelerator", "trainer.enable")
    merged = {key: value for key, value in {**settings, **own}.items() if key.startswith(kept)}
    assert cli.main(["test", *arguments(merged, {"ckpt_path": "last"})]) == 0
    assert asked[0] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]
