"""Fine-tuning data: rows -> prompts and responses -> tokens, masks and packed rows; the masked loss."""

import itertools
import json
import logging
import math
import re
import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import StopAt, arguments, error_of, scalars, weights
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from ranks import Spy, run
from test_prepare import byte_tokenizer, contents, small_steps, stop_after
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from salt_lightning import cli
from salt_lightning.batches.example_rows import ExampleRows, open_examples, pack
from salt_lightning.batches.rows import IGNORE, NO_ROW
from salt_lightning.errors import ConfigError
from salt_lightning.preflight import marks_as_text, seen_in_training
from salt_lightning.text.documents import Corpus
from salt_lightning.text.encoder import make_encoder
from salt_lightning.text.examples import Conversation, Examples, segments
from salt_lightning.text.prepare import prepare_tokens, token_folder
from salt_lightning.text.sources import Hub, resolve
from salt_lightning.text.token_files import TokenFiles
from salt_lightning.text.tokenizer import _cut, kept_text, load_tokenizer, train_tokenizer

PLAIN = Examples(prompt="Q: {question}\nA:", response=" {answer}")
CHAT = Examples(messages="messages")
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["red", "green", "blue", "seven", "a long word or two", "no"]


def prepared(tmp_path, rows, examples=PLAIN, tokenizer=None, val_fraction=1.0, **corpus):
    file = tmp_path / "rows.jsonl"
    if not file.exists():  # if written again, the cache would treat it as another corpus
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = resolve("--data.source", [str(file)], Hub())
    tokenizer = tokenizer or byte_tokenizer()
    folder = prepare_tokens(
        Corpus("--data.source", groups, examples=examples, **corpus), tokenizer, val_fraction, tmp_path / "cache", 1
    )
    return TokenFiles(folder, "val" if val_fraction else "train"), tokenizer


def add_marks(tokenizer, named: bool = True):
    """`named`: among the tokenizer's additional special tokens, where those of Llama 3 and Mistral are not."""
    marks = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    if named:
        tokenizer.add_special_tokens({"additional_special_tokens": marks})
    else:
        tokenizer.add_tokens(marks, special_tokens=True)
        assert tokenizer.convert_tokens_to_ids("<|end|>") not in tokenizer.all_special_ids
    return tokenizer


def chat_tokenizer(eos: str = "<|endoftext|>", named: bool = True):
    tokenizer = add_marks(byte_tokenizer(), named)
    tokenizer.eos_token = eos
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


# --- examples on disk ---


def test_a_plain_example_by_hand(tmp_path):
    files, tokenizer = prepared(tmp_path, [{"question": "é?", "answer": 7}])
    assert tokenizer.decode(files.tokens.tolist()) == "Q: é?\nA: 7<|endoftext|>"
    assert files.learned.tolist() == [0] * 9 + [1, 1, 1]  # " ", "7", EOS
    assert files.token_bytes.sum() == len("Q: é?\nA: 7".encode())
    assert files.token_bytes[-1] == 0
    assert files.tokens[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize(
    "column",
    ["two words", "a-b", "\u0633\u0648\u0627\u0644\u200c\u0647\u0627", "\u092a\u094d\u0930\u0936\u094d\u0928", "q-1"],
)
def test_a_column_has_any_name_of_words(tmp_path, column):
    plain = Examples(prompt=f"{{{column}}}:", response=" {answer}")
    files, tokenizer = prepared(tmp_path, [{column: "why", "answer": "so"}], plain)
    assert tokenizer.decode(files.tokens.tolist()) == "why: so<|endoftext|>"


def character_tokenizer(rule: str) -> PreTrainedTokenizerFast:
    """One token per character, so that parts stay parts; `rule` says how a space is put before a text."""
    chars = sorted(set("▁Q: wa?\nA7é"))
    backend = Tokenizer(models.BPE({char: i for i, char in enumerate(["<s>", "</s>", *chars])}, []))
    if rule == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif rule in ("no line breaks", "one space"):  # XLM-R, T5, XGLM: white space becomes one space
        words = [(char, -1.0) for char in ["<s>", "</s>", *chars]]
        backend = Tokenizer(models.Unigram(words, unk_id=0))
        strips = [normalizers.Strip()] if rule == "no line breaks" else []  # none is left at the ends
        backend.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\s+"), " "), *strips])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    elif rule == "metaspace":
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("rule", ["prepend", "metaspace", "no line breaks", "one space", "none"])
def test_parts_are_what_they_are_in_the_whole_text(tmp_path, bos, rule):
    """As the tokenizer itself encodes a text: with BOS if it has one, and at most one added space at the start."""
    tokenizer = character_tokenizer(rule)
    if bos:
        mark = [("<s>", 0)]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=mark)
    files, _ = prepared(tmp_path, [{"question": "wé?", "answer": 7}], tokenizer=tokenizer)
    assert files.tokens.tolist() == [*tokenizer("Q: wé?\nA: 7").input_ids, 1]
    assert files.learned.tolist() == [0] * (len(files.tokens) - 3) + [1, 1, 1]
    assert files.token_bytes.sum() == len("Q: wé?\nA: 7".encode())
    for between in ("", " ", "\n", ":\n"):  # joined, as in Chinese, and apart
        examples = Examples(prompt=f"{{question}}{between}", response="{answer}")
        files, _ = prepared(tmp_path, [], examples, tokenizer=tokenizer)
        assert files.tokens.tolist() == [*tokenizer(f"wé?{between}7").input_ids, 1]


CALLS = TEMPLATE.replace(
    "{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.name }}</call>{% endfor %}"
)


@pytest.mark.parametrize("content", ["Let me look.", "", None])
def test_tool_calls_are_learned_where_the_template_writes_them(tmp_path, content):
    calling = {**turn("assistant", content), "tool_calls": [{"name": "weather"}]}
    rows = [{"messages": [{**turn("user", "rain?"), "tool_calls": None}, calling]}]
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CALLS
    files, _ = prepared(tmp_path, rows, CHAT, tokenizer)
    learned = tokenizer.decode(files.tokens[files.learned.astype(bool)].tolist())
    assert learned == f"{content or ''}<call>weather</call><|end|><|endoftext|>"
    tokenizer.chat_template = TEMPLATE
    with pytest.raises(
        ConfigError, match=r"template does not write tool_calls; .*; \S+rows.jsonl: line 1; use --data.bad_lines"
    ):
        prepared(tmp_path, rows, CHAT, tokenizer)


def test_a_template_that_writes_the_first_of_several_calls_is_refused(tmp_path):
    """gpt-oss's; the second would be answered all the same."""
    asks = [turn("user", "rain?"), {**turn("assistant", ""), "tool_calls": [{"name": "w"}, {"name": "w"}]}]
    rows = [{"messages": [*asks, turn("tool", "no"), turn("tool", "no"), turn("assistant", "No.")]}]
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CALLS
    files, _ = prepared(tmp_path, rows, CHAT, tokenizer)
    assert "<call>w</call><call>w</call><|end|>" in tokenizer.decode(files.tokens[files.learned == 1].tolist())
    tokenizer.chat_template = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(
        ConfigError, match="chat template does not write all tool_calls; give .*: line 1; use --data.bad"
    ):
        prepared(tmp_path, rows, CHAT, tokenizer)


@pytest.mark.parametrize("said", ["42", "Four, and a day of rain."])
@pytest.mark.parametrize("role", ["tool", "assistant"])
def test_a_template_that_drops_what_a_role_says_is_refused(tmp_path, role, said):
    """Zephyr's drops tools; those of pictures read a list of parts, and would have empty answers learned."""
    tokenizer = chat_tokenizer()
    content = f"{{% if m.role != '{role}' %}}{{{{ m.content }}}}{{% endif %}}"
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", content)
    asked = [turn("user", "rain?"), turn("assistant", said)]
    rows = [{"messages": asked}, {"messages": [*asked, turn("tool", said), turn("assistant", "yes")]}]
    line = 2 if role == "tool" else 1
    with pytest.raises(
        ConfigError, match=f"does not write what the role {role} says; give .*: line {line}; use --data"
    ):
        prepared(tmp_path, rows, CHAT, tokenizer)


THOUGHT = TEMPLATE.replace(
    "{{ m.content }}", "{% if m.thinking and loop.last %}<think>{{ m.thinking }}</think>{% endif %}{{ m.content }}"
)


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_thinking_that_a_template_drops_is_refused(tmp_path, key):
    """The student would learn to answer without a thought."""
    thinks = {**turn("assistant", "no"), key: "It is dry."}
    unlearned = [{**turn("user", "rain?"), key: None}, {**thinks, "weight": 0}]
    rows = [{"messages": [*unlearned, *RAIN]}, {"messages": [*RAIN, RAIN[0], thinks]}]
    with pytest.raises(ConfigError, match=f"chat template does not write {key}; give .*: line 2; use --data.bad_lines"):
        prepared(tmp_path, rows, CHAT, chat_tokenizer())


def test_thinking_is_learned_where_the_template_writes_it(tmp_path):
    """In its own turn; later on it is dropped. Of several names for it a template reads one."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = THOUGHT
    thinks = {**turn("assistant", "no"), "thinking": "dry", "reasoning_content": "dry"}
    files, _ = prepared(tmp_path, [{"messages": [RAIN[0], thinks, RAIN[0], thinks]}], CHAT, tokenizer)
    learned = tokenizer.decode(files.tokens[files.learned == 1].tolist())
    assert learned == "<think>dry</think>no<|end|><|endoftext|>" * 2


def test_what_a_template_writes_in_its_own_way_is_written(tmp_path):
    """As Qwen3's, which drops the thinking of earlier turns, or one that writes an answer of a tool as JSON."""
    tokenizer = chat_tokenizer()
    own = "{{ m.content.split('</think>')[-1] | trim }}"
    tokenizer.chat_template = TEMPLATE.replace("{{ m.content }}", own)
    rows = [{"messages": [turn("user", " rain? "), turn("assistant", "<think>a long thought</think>\n\nyes")]}]
    files, _ = prepared(tmp_path, rows, CHAT, tokenizer)
    assert tokenizer.decode(files.tokens[files.learned == 1].tolist()) == "yes<|end|><|endoftext|>"


TOOLS = "{% for t in tools or [] %}<tool>{{ t.name }}</tool>{% endfor %}" + CALLS
RAIN = [turn("user", "rain?"), turn("assistant", "no")]


@pytest.mark.parametrize("as_json", [False, True])
def test_tools_are_a_part_of_the_prompt(tmp_path, as_json):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TOOLS
    tools = [{"name": "weather"}, {"name": "search"}]
    rows = [{"messages": RAIN, "tools": json.dumps(tools) if as_json else tools}, {"messages": RAIN},
            {"messages": RAIN, "tools": "" if as_json else None}]  # fmt: skip
    files, _ = prepared(tmp_path, rows, Examples(messages="messages", tools="tools"), tokenizer)
    examples = ExampleRows(files, 128, True)
    prompts = [tokenizer.decode(examples.prompt_and_response(i)[0]) for i in range(3)]
    asked = "<|user|>rain?<|end|>\n<|assistant|>"
    assert prompts == [f"<tool>weather</tool><tool>search</tool>{asked}", asked, asked]


def test_tools_draw_the_split_and_are_in_the_cache(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TOOLS
    rows = [{"messages": RAIN, "tools": [{"name": f"w{i}"}]} for i in range(40)]
    files, _ = prepared(tmp_path, rows, Examples(messages="messages", tools="tools"), tokenizer, val_fraction=0.5)
    assert 10 < files.num_documents < 30
    unread, _ = prepared(tmp_path, rows, Examples(messages="messages", tools=""), tokenizer, val_fraction=0.5)
    assert unread.folder != files.folder


@pytest.mark.parametrize(
    ("examples", "tools", "message"),
    [
        (
            CHAT,
            [{"name": "w"}],
            "rows.jsonl: line 1 has a column 'tools', .* set --data.examples.tools tools to read it",
        ),
        (Examples(messages="messages", tools="tolls"), [], "rows.jsonl: line 1 has a column 'tools'"),
        (
            Examples(messages="messages", tools="tools"),
            "[" * 9999,
            r"must hold a list of tools or JSON of one, not '\[\[",
        ),
        (
            Examples(messages="messages", tools="tools"),
            "no JSON",
            "must hold a list of tools or JSON of one, not 'no J",
        ),
        (Examples(messages="messages", tools="tools"), ["w"], r"must hold a list of tools or JSON of one, not \"\['w'"),
        (Examples(messages="messages", tools="tools"), [{"name": "w"}], "chat template does not write tools; give the"),
    ],
)
def test_tools_are_never_dropped_in_silence(tmp_path, examples, tools, message):
    with pytest.raises(ConfigError, match=message):
        prepared(tmp_path, [{"messages": RAIN, "tools": tools}], examples, chat_tokenizer())


def test_a_column_of_tools_that_no_line_has_is_told_at_each_start(tmp_path):
    """A line may go without it; a misspelt name would train without tools."""
    rows = [{"messages": RAIN, "functions": [{"name": "weather"}]}, {"messages": RAIN}]
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TOOLS
    for _ in range(2):
        with pytest.warns(
            UserWarning, match="examples.tools: no row of --data.source has tools in a column 'function'"
        ):
            prepared(tmp_path, rows, Examples(messages="messages", tools="function"), tokenizer)
    prepared(tmp_path, rows, Examples(messages="messages", tools="functions"), tokenizer)


def test_a_table_may_hold_tools(tmp_path):
    pq.write_table(pa.table({"messages": [RAIN], "tools": [[{"name": "weather"}]]}), tmp_path / "a.parquet")
    groups = resolve("--data.source", [str(tmp_path / "a.parquet")], Hub())
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TOOLS
    with pytest.raises(ConfigError, match="a.parquet has a column 'tools'"):
        prepare_tokens(Corpus("--data.source", groups, examples=CHAT), tokenizer, 1.0, tmp_path / "cache", 1)
    corpus = Corpus("--data.source", groups, examples=Examples(messages="messages", tools="tools"))
    files = TokenFiles(prepare_tokens(corpus, tokenizer, 1.0, tmp_path / "cache", 1), "val")
    assert tokenizer.decode(files.tokens.tolist()).startswith("<tool>weather</tool><|user|>rain?")


@pytest.mark.parametrize(
    ("date", "written"),
    [
        ("{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}", "26 Jul 2024"),
        ("\n{% set now, form = strftime_now, '%A, %-d.' ~ '%m' %}{{ now(format=form) }}", "\nFriday, 26.07"),
    ],
)
def test_the_date_of_a_chat_template_is_the_same_every_day(tmp_path, caplog, date, written):
    """As Llama 3.2's and gpt-oss's write today's: other days would give other ids under the same settings."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = date + TEMPLATE
    files, _ = prepared(tmp_path, [{"messages": [turn("user", "a"), turn("assistant", "b")]}], CHAT, tokenizer)
    assert tokenizer.decode(files.tokens.tolist()).startswith(f"{written}<|user|>a")
    assert "--data.source: the chat template writes a date; it is 26 July 2024 in all conversations" in caplog.text


CALL = "{% for m in messages %}{{ 'called<|user|>' if m.tool_calls }}{% endfor %}"
BUILT = TEMPLATE.replace("<|end|>", "{{ '<|' ~ 'end|>' }}")
PICKY = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}" + BUILT


@pytest.mark.parametrize(
    ("template", "marks"),
    [
        (TEMPLATE, {"<|end|>", "<|assistant|>"}),
        (
            CALL + BUILT,
            {"<|end|>", "<|assistant|>", "<|user|>"},
        ),  # built by the template; written in other answers only
        (PICKY, {"<|end|>", "<|assistant|>", "<|user|>", "<|system|>", "<|endoftext|>"}),  # no way to tell
    ],
)
def test_the_marks_that_a_template_writes(template, marks):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    encoder = make_encoder(Corpus("", (), examples=CHAT), tokenizer, 0.0)
    assert marks <= {tokenizer.convert_ids_to_tokens(i) for i in encoder.template_marks()}
    tokenizer.add_tokens("<|label|>", special_tokens=True)
    encoder = make_encoder(Corpus("", (), examples=CHAT), tokenizer, 0.0)
    assert (tokenizer.convert_tokens_to_ids("<|label|>") in encoder.template_marks()) == (template == PICKY)


@pytest.mark.parametrize("dated", [True, False])
def test_chats_of_another_date_have_another_place_in_the_cache(dated, tmp_path, monkeypatch):
    tokenizer, corpus = chat_tokenizer(), Corpus("", (), examples=CHAT)
    tokenizer.chat_template = TEMPLATE + "{{ strftime_now('%Y') }}" * dated
    before = token_folder(corpus, tokenizer, 0.0, tmp_path)
    monkeypatch.setattr("salt_lightning.text.encoder._DAY", datetime(2025, 1, 1))
    assert (token_folder(corpus, tokenizer, 0.0, tmp_path) != before) == dated


@pytest.mark.parametrize(("key", "value"), [("weight", "0"), ("weight", 0.5), ("train", "false")])
def test_a_weight_that_is_neither_0_nor_1_is_refused(tmp_path, key, value):
    messages = [{**turn("user", "a"), key: value}, {**turn("assistant", "b"), key: math.nan}]  # of pandas: a null
    files, _ = prepared(tmp_path, [{"messages": messages}], CHAT, chat_tokenizer())
    assert files.learned.any()
    (tmp_path / "rows.jsonl").unlink()
    messages[1][key] = value
    with pytest.raises(ConfigError, match=f"{key} {value!r} of an answer must be 0 or 1; leave it out"):
        prepared(tmp_path, [{"messages": messages}], CHAT, chat_tokenizer())


@pytest.mark.parametrize(
    ("examples", "writes"),
    [
        (Examples(prompt="<|user|>{q}<|assistant|>", response="{a}"), "--data.examples.prompt writes '<|user|>', --d"),
        (Examples(prompt="{q}", response="{a}<|end|>"), "--data.examples.response writes '<|end|>'"),
        (Examples(prompt="{q}<|x|>", response="{a:<s>=yes}"), ""),
        (Examples(messages=[turn("user", "{q}<|end|>"), turn("assistant", "{a}")]), ""),
    ],
)
def test_special_tokens_that_a_plain_template_spells_out_are_told(examples, writes):
    found = marks_as_text(examples.literals(), chat_tokenizer())
    assert bool(found) == bool(writes)
    if found:
        assert found.level == "warning"
        assert found.said.startswith(writes)
        assert found.said.endswith(": characters here, not a special token")


def test_nulls_of_a_table_are_none_and_those_of_a_line_are_said(tmp_path):
    """A table has all keys in every row, and those of all tools in every call."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ tools[0] | tojson if tools }}" + TEMPLATE.replace(
        "{{ m.content }}", "{{ m.content }}{{ m.tool_calls[0] | tojson if m.tool_calls }}"
    )
    calling = {**turn("assistant", "b"), "tool_calls": [{"name": "w", "arguments": {"city": "x", "day": None}}]}
    row = {"messages": [{**turn("user", "a"), "tool_calls": []}, calling], "tools": [{"name": "w", "default": None}]}
    examples = Examples(messages="messages", tools="tools")
    files, _ = prepared(tmp_path, [row], examples, tokenizer)
    said = tokenizer.decode(files.tokens.tolist())
    assert said.startswith('{"name": "w", "default": null}<|user|>')
    assert 'b{"name": "w", "arguments": {"city": "x", "day": null}}' in said
    other = {**row["tools"][0], "default": 1}, {**calling["tool_calls"][0], "arguments": {"city": "x", "day": "Sunday"}}
    another = {"messages": [row["messages"][0], {**calling, "tool_calls": [other[1]]}], "tools": [other[0]]}
    pq.write_table(pa.table({key: [row[key], another[key]] for key in row}), tmp_path / "a.parquet")
    groups = resolve("--data.source", [str(tmp_path / "a.parquet")], Hub())
    folder = prepare_tokens(Corpus("x", groups, examples=examples), tokenizer, 1.0, tmp_path / "cache", 1)
    said = tokenizer.decode(TokenFiles(folder, "val").tokens.tolist())
    assert said.startswith('{"name": "w"}<|user|>')
    assert 'b{"name": "w", "arguments": {"city": "x"}}' in said
    assert '"day": "Sunday"' in said


@pytest.mark.parametrize(
    ("arguments", "written"),
    [
        ("c.function.arguments | tojson", '{"city": "Köln"}'),  # Llama 3.1, Qwen2.5, Mistral, gpt-oss: a text in quotes
        ("c.function | tojson", '{"name": "w", "arguments": {"city": "Köln"}}'),
        ("c.function.arguments.items() | list", "[('city', 'Köln')]"),  # Qwen3.5, GLM: it fails on a text
        ("'args ' + c.function.arguments", 'args {"city":"Köln"}'),  # DeepSeek: on all else
    ],
)
@pytest.mark.parametrize("of_table", [True, False])
def test_arguments_that_are_json_are_written_once(tmp_path, arguments, written, of_table):
    """As OpenAI's format has them, and tables, where each tool has other ones. What is no object stays what it is."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CALLS.replace("c.name", arguments)
    call = {"type": "function", "function": {"name": "w", "arguments": '{"city":"Köln"}'}}
    rows = [{"messages": [turn("user", "rain?"), {"role": "assistant", "content": None, "tool_calls": [call]}]}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text(json.dumps(rows[0]))
    source = str(tmp_path / ("a.parquet" if of_table else "a.jsonl"))
    corpus = Corpus("x", resolve("--data.source", [source], Hub()), examples=CHAT)
    files = TokenFiles(prepare_tokens(corpus, tokenizer, 1.0, tmp_path / "cache", 1), "val")
    learned = tokenizer.decode(files.tokens[files.learned == 1].tolist())
    assert learned == f"<call>{written}</call><|end|><|endoftext|>"


@pytest.mark.parametrize("text", ['"a text"', "[1]", "{no JSON", "[" * 9999])
def test_arguments_that_are_json_of_no_object_stay_as_they_are(tmp_path, text):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = CALLS.replace("c.name", "c.arguments | tojson")
    rows = [{"messages": [turn("user", "a"), {**turn("assistant", ""), "tool_calls": [{"arguments": text}]}]}]
    files, _ = prepared(tmp_path, rows, CHAT, tokenizer)
    assert f"<call>{json.dumps(text)}</call>" in tokenizer.decode(files.tokens.tolist())


def test_no_calls_are_none(tmp_path):
    empty = {"messages": [turn("user", "a"), {**turn("assistant", "b"), "tool_calls": [], "refusal": None}]}
    assert prepared(tmp_path, [empty], CHAT, chat_tokenizer())[0].num_documents == 1


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("rule", ["prepend", "metaspace"])
def test_a_chat_has_the_ids_that_the_tokenizer_gives_its_template(tmp_path, rule, named):
    """The false space of SentencePiece stands behind some marks, by the tokenizer's rules."""
    tokenizer = add_marks(character_tokenizer(rule), named)
    tokenizer.chat_template = TEMPLATE
    messages = [turn("user", "wa?"), turn("assistant", "7A"), turn("user", "Q"), turn("assistant", "wa")]
    files, _ = prepared(tmp_path, [{"messages": messages}], CHAT, tokenizer)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    ours = files.tokens.tolist()
    assert ours == [*whole[: len(ours) - 1], tokenizer.eos_token_id]  # up to the mark that ends the last turn
    marks = {tokenizer.eos_token_id, *tokenizer.added_tokens_decoder}
    text = [int(i) for i, is_learned in zip(ours, files.learned, strict=True) if is_learned and i not in marks]
    assert "".join(tokenizer.convert_ids_to_tokens(text)).replace("▁", "") == "7Awa"


OTHER_FORMS = {
    ".conversations": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "u"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [turn("system", "s"), turn("user", "u"), turn("assistant", "a")],
    ),
    ".completion": (
        {"prompt": [turn("user", "u"), turn("assistant", "a")], "completion": [turn("assistant", "b")]},
        [{**turn("user", "u"), "train": False}, {**turn("assistant", "a"), "train": False}, turn("assistant", "b")],
    ),
    "fromjson": ({"messages": json.dumps([turn("user", "u")])}, [turn("user", "u")]),
    "[].content": (
        {
            "messages": [
                turn("user", [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]),
                turn("assistant", "a"),
            ]
        },
        [turn("user", "uv"), turn("assistant", "a")],
    ),
}


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_become_conversations_as_the_docs_say(form):
    docs = (Path(__file__).parents[1] / "docs/fine-tuning.md").read_text()
    (program,) = (line.split("'")[1] for line in docs.splitlines() if line.startswith("jq ") and form in line)
    row, messages = OTHER_FORMS[form]
    made = subprocess.run(["jq", "-c", program], input=json.dumps(row), capture_output=True, text=True, check=True)
    assert json.loads(made.stdout)["messages"] == messages


@pytest.mark.skipif(not shutil.which("jq"), reason="needs jq")
@pytest.mark.parametrize(("text", "question"), [("", "do"), ("this", "do\n\nthis"), (None, "do")])
def test_alpaca_becomes_questions_and_answers_as_the_docs_say(text, question):
    docs = (Path(__file__).parents[1] / "docs/fine-tuning.md").read_text()
    (program,) = (line.split("'")[1] for line in docs.splitlines() if line.startswith("jq ") and ".instruction" in line)
    row = json.dumps({"instruction": "do", "input": text, "output": "done"})
    made = subprocess.run(["jq", "-c", program], input=row, capture_output=True, text=True, check=True)
    assert json.loads(made.stdout) == {"question": question, "answer": "done"}


def test_what_the_chat_template_refuses_is_named_by_its_line_or_left_out(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role != 'user' %}{{ 1 / 0 }}{% endif %}" + TEMPLATE
    good = {"messages": [turn("user", "a"), turn("assistant", "b")]}
    rows = [good, {"messages": [turn("system", "s"), turn("user", "a"), turn("assistant", "b")]}, good]
    with pytest.raises(
        ConfigError, match=r"the chat template fails \(.*\); \S+rows.jsonl: line 2; use --data.bad_lines skip"
    ):
        prepared(tmp_path, rows, CHAT, tokenizer)
    files, _ = prepared(tmp_path, rows, CHAT, tokenizer, skip_bad_lines=True)
    assert files.num_documents == 2
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    corpus = Corpus("x", resolve("--data.source", [str(tmp_path / "a.parquet")], Hub()), examples=CHAT)
    with pytest.raises(ConfigError, match=r"the chat template fails \(.*\); \S+a.parquet: row 2; use --data.bad_lines"):
        prepare_tokens(corpus, tokenizer, 1.0, tmp_path / "cache", 1)


@pytest.mark.parametrize("wrong", ["{% endfr %}", "{{ messages | nosuchfilter }}"])
def test_a_chat_template_that_is_not_jinja_is_blamed_itself_not_the_first_row(wrong, tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = TEMPLATE + "\n" + wrong
    row = {"messages": [turn("user", "a"), turn("assistant", "b")]}
    line = tokenizer.chat_template.count("\n") + 1
    for skips in (False, True):  # to skip lines helps nothing
        with pytest.raises(ConfigError, match=rf"--data.tokenizer: its .* is not valid Jinja, line {line}: \S.*; corr"):
            prepared(tmp_path, [row], CHAT, tokenizer, skip_bad_lines=skips)


def test_named_chat_templates_without_the_one_that_is_used_are_blamed_not_the_first_row(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = {"tool_use": TEMPLATE, "rag": TEMPLATE}
    row = {"messages": [turn("user", "a"), turn("assistant", "b")]}
    said = (
        r"^--data.tokenizer: none of its chat templates \(rag, tool_use\) is called default; .* as chat_template.jinja,"
    )
    for skips in (False, True):
        with pytest.raises(ConfigError, match=said):
            prepared(tmp_path, [row], CHAT, tokenizer, skip_bad_lines=skips)
    tokenizer.save_pretrained(folder := tmp_path / "tokenizer")
    shutil.copy(folder / "additional_chat_templates/tool_use.jinja", folder / "chat_template.jinja")
    prepared(tmp_path, [row], CHAT, load_tokenizer(str(folder)))
    tokenizer.chat_template = {"default": TEMPLATE, "tool_use": "{% endfr %}"}
    with pytest.raises(ConfigError, match="^--data.tokenizer: its chat template is not valid Jinja, line 1"):
        prepared(folder, [{**row, "tools": [{"name": "f"}]}], replace(CHAT, tools="tools"), tokenizer)


@pytest.mark.parametrize("calls", [json.dumps([{"function": {"name": "f"}}]), {"function": {"name": "f"}}, ["f"]])
def test_tool_calls_in_another_form_are_named_where_the_chat_template_fails(calls, tmp_path):
    tokenizer = chat_tokenizer()
    written = "{% for call in messages[-1].tool_calls or [] %}{{ call.function.name }}{% endfor %}"
    tokenizer.chat_template = TEMPLATE + written
    row = {"messages": [turn("user", "a"), {**turn("assistant", "b"), "tool_calls": calls}]}
    said = f"tool_calls should be a list of objects, not {str(calls)!r}; "
    with pytest.raises(ConfigError, match=re.escape(said) + r"\S+rows.jsonl: line 1"):
        prepared(tmp_path, [row], CHAT, tokenizer)


def test_rows_without_an_example_say_what_one_needs(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no document with text in \S+rows.jsonl; an example needs a response that is not"
    ):
        prepared(tmp_path, [{"messages": [turn("human", "a"), turn("gpt", "b")]}], CHAT, chat_tokenizer())


def test_a_message_without_a_role_is_named():
    wrong = Examples(messages=[{"content": "{question}"}, {"role": "assistant", "content": "{answer}"}])
    assert wrong.problems("x") == ["--data.examples.messages: message 1 has no role; give one, e.g. user"]


def test_a_key_that_a_message_of_templates_does_not_write_is_refused():
    """It was dropped: the thinking was not learned."""
    answer = {"role": "assistant", "content": "{answer}", "reasoning_content": "{why}"}
    (said,) = Examples(messages=[turn("user", "{question}"), answer]).problems("x")
    assert said == (
        "--data.examples.messages: message 2 has 'reasoning_content', but a message of templates has only role and "
        "content; put what else a chat template reads into a column of conversations"
    )


def test_prompt_and_response_are_tokenized_apart(tmp_path):
    """The ids that generation starts from depend only on the prompt, not on the response."""
    text = tmp_path / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"A: yes A: no {i}"}) for i in range(50)))
    corpus = Corpus("--data.source", resolve("--data.source", [str(text)], Hub()))
    train_tokenizer(corpus, 300, 0.0, str(tmp_path / "tokenizer"))
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer"))
    fused = Examples(prompt="A{question}", response="{answer}")  # no space between them: a BPE would merge across
    files, _ = prepared(tmp_path, [{"question": ":", "answer": " yes"}], fused, tokenizer)
    rows = ExampleRows(files, 32, True)
    prompt, response = rows.prompt_and_response(0)
    assert prompt == tokenizer.encode("A:", add_special_tokens=False)
    assert response == [*tokenizer.encode(" yes", add_special_tokens=False), tokenizer.eos_token_id]


def test_special_tokens_spelled_out_in_plain_text_are_text(tmp_path):
    files, tokenizer = prepared(tmp_path, [{"question": "<|endoftext|>", "answer": "x"}])
    assert (files.tokens == tokenizer.eos_token_id).sum() == 1


def test_nulls_and_blanks_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"question": "a", "answer": None}, {"question": "b", "answer": " "}, {"question": "c", "answer": "d"}]
    with caplog.at_level(logging.INFO):
        files, _ = prepared(tmp_path, rows)
        prepared(tmp_path, rows)  # the cache has it
    assert files.num_documents == 1
    assert caplog.text.count("2 rows left out (no response to learn, or a null)") == 2


def test_a_conversation_with_a_null_is_left_out_and_counted(tmp_path, caplog):
    says = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    rows = [{"messages": says}, {"messages": None}, {"messages": [says[0], {"role": "assistant", "content": None}]}]
    with caplog.at_level(logging.INFO):
        files, _ = prepared(tmp_path, rows, Examples(messages="messages"), chat_tokenizer())
    assert files.num_documents == 1
    assert "2 rows left out (no response to learn, or a null)" in caplog.text


def test_all_before_the_first_answer_to_a_question_draws_the_split():
    system, question, greeting = (
        {"role": role, "content": text} for role, text in (("system", "s"), ("user", "u"), ("assistant", "hi"))
    )
    assert Conversation([system, question, greeting, question, greeting]).asked() == "s\0u"
    assert Conversation([greeting, question, greeting]).asked() == "hi\0u"
    shown = {**greeting, "train": False}
    assert Conversation([question, shown, question, greeting]).asked() == "u\0hi\0u"


def test_a_prompt_is_never_in_both_splits(tmp_path):
    rows = [{"question": f"q{i % 40}", "answer": i} for i in range(400)]
    files, tokenizer = prepared(tmp_path, rows, val_fraction=0.5)
    texts = []
    for split in ("train", "val"):
        found = ExampleRows(TokenFiles(files.folder.parent, split), 64, True)
        texts.append({tokenizer.decode(found.prompt_and_response(i)[0]) for i in found.examples.tolist()})
    assert len(texts[0] | texts[1]) == 40
    assert min(map(len, texts)) > 5
    assert not texts[0] & texts[1]


def test_held_out_examples_with_a_prompt_of_training_are_counted(tmp_path):
    """Whatever their answers; with their tokens, EOS included."""
    for name in ("train", "val"):
        (tmp_path / name).mkdir()
    asked = [{"question": f"q{i}", "answer": "x"} for i in range(20)]
    train, _ = prepared(tmp_path / "train", [*asked[5:], *asked[5:]], val_fraction=0.0)
    again = [{"question": f"q{i}", "answer": "yes"} for i in (0, 3, 7, 12, 12)]
    held_out, tokenizer = prepared(tmp_path / "val", again)
    texts = ["Q: q7\nA: yes", "Q: q12\nA: yes", "Q: q12\nA: yes"]
    tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
    assert held_out.part_in(train) == (3, tokens / held_out.num_tokens)
    assert train.part_in(train) == (train.num_documents, 1)
    said = seen_in_training([], *held_out.part_in(train), are_examples=True).said
    assert said.startswith("3 held-out examples (")
    assert said.endswith("% of the tokens) have a prompt of the training text, perhaps with another response")


def test_parquet_with_values_inside_columns_and_words_for_values(tmp_path):
    table = {"question": ["x", "y"], "answers": [{"text": ["one", "two"]}, {"text": ["three"]}], "label": [True, False]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    examples = Examples(prompt="{question}", response=" {answers[text][0]} {label:True=yes|False=no}")
    corpus = Corpus("--data.source", resolve("--data.source", [str(tmp_path / "a.parquet")], Hub()), examples=examples)
    files = TokenFiles(prepare_tokens(corpus, byte_tokenizer(), 1.0, tmp_path / "cache", 1), "val")
    assert byte_tokenizer().decode(files.tokens.tolist()) == "x one yes<|endoftext|>y three no<|endoftext|>"


def test_stopped_preparation_goes_on_to_the_same_files(tmp_path, monkeypatch):
    rows = [{"question": f"q{i}" * 9, "answer": None if i % 7 == 0 else i} for i in range(200)]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole, _ = prepared(tmp_path / "a", rows, val_fraction=0.3)
    small_steps(monkeypatch)
    with monkeypatch.context() as patch:
        stop_after(9, patch)
        with pytest.raises(KeyboardInterrupt):
            prepared(tmp_path / "b", rows, val_fraction=0.3)
    resumed, _ = prepared(tmp_path / "b", rows, val_fraction=0.3)
    for name in ("tokens.bin", "learned.bin", "token_bytes.bin"):
        assert (whole.folder / name).read_bytes() == (resumed.folder / name).read_bytes()
    assert contents(whole.folder.parent).keys() == contents(resumed.folder.parent).keys()


def test_the_cache_knows_templates_and_chat_template(tmp_path):
    row = {"question": "a", "answer": "b", "messages": [turn("user", "a"), turn("assistant", "b")]}
    other = chat_tokenizer()
    other.chat_template = TEMPLATE.replace("\n", "")
    begins = chat_tokenizer()
    begins.bos_token = "<|user|>"  # which a template may write
    folders = {
        prepared(tmp_path, [row], *settings)[0].folder
        for settings in (
            (PLAIN,), (Examples(prompt="{question}", response=" {answer}"),), (CHAT, chat_tokenizer()), (CHAT, other),
            (CHAT, begins),
        )
    }  # fmt: skip
    assert len(folders) == 5


# --- chat templates ---


@pytest.mark.parametrize("named", [True, False])
def test_the_assistant_alone_is_learned_in_every_turn(tmp_path, named):
    conversation = [turn("system", "s"), turn("user", "u"), turn("assistant", "one"), turn("user", "v"),
                    turn("assistant", "two"), turn("user", "unanswered")]  # fmt: skip
    files, tokenizer = prepared(tmp_path, [{"messages": conversation}], CHAT, chat_tokenizer(named=named))
    ids, learned = files.tokens, files.learned.astype(bool)
    assert tokenizer.decode(ids.tolist()) == (
        "<|system|>s<|end|>\n<|user|>u<|end|>\n<|assistant|>one<|end|>\n<|user|>v<|end|>\n<|assistant|>two<|end|>"
        "<|endoftext|>"
    )
    assert tokenizer.decode(ids[learned].tolist()) == "one<|end|>two<|end|><|endoftext|>"
    prompt, response = ExampleRows(files, 64, True).prompt_and_response(0)
    assert tokenizer.decode(response) == "two<|end|><|endoftext|>"
    # what generation begins with is what transformers makes of the same conversation
    assert prompt == tokenizer.apply_chat_template(conversation[:4], add_generation_prompt=True)["input_ids"]
    assert files.token_bytes[learned].sum() == len("onetwo")  # marks are no text


def learned_of(tmp_path, messages, template=TEMPLATE):
    """The spans that are learned of a conversation; None where it is left out."""
    tokenizer = chat_tokenizer("<|end|>")
    tokenizer.chat_template = template
    rows = [{"messages": messages}, {"messages": [turn("user", "u"), turn("assistant", "last")]}]
    files, _ = prepared(tmp_path, rows, CHAT, tokenizer)
    if files.num_documents == 1:
        return None
    start, stop = 0, int(files.doc_ends[0])
    text = tokenizer.convert_ids_to_tokens(files.tokens[start:stop].tolist())
    marked = (token if learned else " " for token, learned in zip(text, files.learned[start:stop], strict=True))
    return "".join(marked).split()


CALL = {"role": "assistant", "tool_calls": [{"name": "w"}]}
GREETS = [turn("assistant", "Hi"), turn("user", "a"), turn("assistant", "b")]
ASKS_FIRST = "{% if messages[0].role == 'system' %}{% endif %}"
ALTERNATES = "{% if messages[0].role == 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif %}"


@pytest.mark.parametrize(
    ("messages", "template", "learned"),
    [
        ([turn("user", "a"), CALL], CALLS, ["<call>w</call><|end|>"]),
        (GREETS, TEMPLATE, ["Hi<|end|>", "b<|end|>"]),
        (GREETS, ASKS_FIRST + TEMPLATE, ["b<|end|>"]),
        (GREETS, ALTERNATES + TEMPLATE, None),
        (GREETS[:1], ASKS_FIRST + TEMPLATE, None),
        ([*GREETS[1:], turn("user", "c"), turn("assistant", " ")], TEMPLATE, ["b<|end|>"]),
        ([*GREETS[1:], turn("user", "c"), turn("assistant", None)], TEMPLATE, ["b<|end|>"]),
        ([turn("user", "a"), turn("assistant", ""), *GREETS[1:]], TEMPLATE, ["b<|end|>"]),
        ([turn("user", "a"), turn("assistant", None), *GREETS[1:]], TEMPLATE, ["b<|end|>"]),
        ([turn("user", None), *GREETS[1:]], TEMPLATE, None),
        ([turn("user", "z"), {**GREETS[0], "weight": 0}, *GREETS[1:]], TEMPLATE, ["b<|end|>"]),
        (
            [turn("user", "z"), {**GREETS[0], "weight": 1}, {**GREETS[1], "weight": 0}, {**GREETS[2], "train": True}],
            TEMPLATE,
            ["Hi<|end|>", "b<|end|>"],
        ),
        (
            [turn("user", "z"), {**GREETS[0], "train": None}, GREETS[1], {**GREETS[2], "train": False}],
            TEMPLATE,
            ["Hi<|end|>"],
        ),
        ([GREETS[1], {**GREETS[2], "weight": 0}], TEMPLATE, None),
    ],
)
def test_what_is_learned_of_conversations_with_gaps(tmp_path, messages, template, learned):
    assert learned_of(tmp_path, messages, template) == learned


def test_the_same_tokens_of_which_others_are_learned_are_another_text(tmp_path):
    prints = set()
    for weight in (0, 1):
        (tmp_path / str(weight)).mkdir()
        messages = [turn("user", "z"), {**GREETS[0], "weight": weight}, *GREETS[1:]]
        files, _ = prepared(tmp_path / str(weight), [{"messages": messages}], CHAT, chat_tokenizer())
        prints.add((files.tokens.tobytes(), files.fingerprint))
    assert len({tokens for tokens, _ in prints}) == 1
    assert len(prints) == 2


def test_what_a_tokenizer_does_not_know_of_a_response_is_text(tmp_path):
    """It counts in bits per byte, and is reported."""
    words = {word: i for i, word in enumerate(["<unk>", "</s>", *"Q: wa?\nA"])}
    backend = Tokenizer(models.BPE(words, [], unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")
    files, _ = prepared(tmp_path, [{"question": "wa", "answer": "東京"}], tokenizer=tokenizer)
    assert files.token_bytes[files.learned == 1].sum() == len(" 東京".encode())
    ((_, unknown, _),) = kept_text(tokenizer, files)
    assert unknown > 0.2


def test_a_mark_that_is_eos_already_ends_the_example_once(tmp_path):
    messages = [turn("user", "u"), turn("assistant", "one")]
    named = chat_tokenizer("<|end|>")
    named.unk_token = "<|end|>"  # one token for both, as in GPT-2
    files, tokenizer = prepared(tmp_path, [{"messages": messages}], CHAT, named)
    assert tokenizer.decode(files.tokens[files.learned == 1].tolist()) == "one<|end|>"
    assert files.token_bytes[files.learned == 1].sum() == len("one")


def test_messages_of_templates(tmp_path):
    examples = Examples(messages=[turn("system", "Be brief."), turn("user", "{q}"), turn("assistant", "{a}")])
    files, tokenizer = prepared(tmp_path, [{"q": "why", "a": "so"}], examples, chat_tokenizer())
    assert tokenizer.decode(files.tokens[files.learned == 0].tolist()) == (
        "<|system|>Be brief.<|end|>\n<|user|>why<|end|>\n<|assistant|>"
    )


# As Qwen3, which drops the thinking of turns before the last question; Phi-3, which ends all but a question with EOS;
# Mistral v0.3, which puts the system's text before the last question.
THINKS = TEMPLATE.replace("m.content", "m.content if loop.last else m.content.split('</think>')[-1]")
ENDS = TEMPLATE.replace("{% if add", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if add")
MOVES = (
    "{% for m in messages[1:] %}<|{{ m.role }}|>"
    "{% if loop.last and m.role == 'user' %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }}<|end|>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize("template", [THINKS, ENDS, MOVES])
def test_each_answer_is_learned_behind_what_generation_would_see(tmp_path, template, caplog):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    talk = [turn("system", "s"), turn("user", "u"), turn("assistant", "<think>1</think>one"), turn("user", "v"),
            turn("assistant", "<think>2</think>two"), turn("user", "w"), turn("assistant", "three")]  # fmt: skip
    rows = [{"messages": talk}, {"messages": talk[:3]}]
    with caplog.at_level(logging.INFO):
        files, _ = prepared(tmp_path, rows, CHAT, tokenizer)
    assert (
        "1 conversations became 3 examples, because the chat template writes earlier messages differently"
        in caplog.text
    )
    assert "left out" not in caplog.text
    examples = ExampleRows(files, 256, True)
    found = [examples.prompt_and_response(i) for i in range(files.num_documents)]
    told = [talk[:2], talk[:4], talk[:6], talk[:2]]
    prompts = [tokenizer.apply_chat_template(t, add_generation_prompt=True, tokenize=False) for t in told]
    assert [tokenizer.decode(prompt) for prompt, _ in found] == prompts
    says = [talk[2], talk[4], talk[6], talk[2]]
    ends = "<|end|>\n<|endoftext|>" if template == ENDS else "<|end|><|endoftext|>"
    assert [tokenizer.decode(response) for _, response in found] == [message["content"] + ends for message in says]


def test_the_examples_of_a_conversation_are_on_one_side(tmp_path):
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = ENDS
    rows = [
        {"messages": [turn("user", f"<{i}>"), turn("assistant", "a"), turn("user", "b"), turn("assistant", "c")]}
        for i in range(40)
    ]
    files, _ = prepared(tmp_path, rows, CHAT, tokenizer, val_fraction=0.5)
    texts = [tokenizer.decode(TokenFiles(files.folder.parent, split).tokens.tolist()) for split in ("train", "val")]
    train, val = ([int(i) for i in re.findall(r"<(\d+)>", text)] for text in texts)
    assert min(len(train), len(val)) > 10
    assert not {*train} & {*val}
    assert sorted(train + val) == sorted([*range(40), *range(40)])


def test_a_template_that_asks_for_an_answer_in_another_way_than_it_writes_one_is_refused():
    """DeepSeek V3.1's asks with <think>."""

    def thinking(messages, add_generation_prompt):
        return "".join(m["content"] for m in messages) + "<think>" * add_generation_prompt

    with pytest.raises(ConfigError, match=r"begins an answer differently from its generation prompt \('u<think>'\)"):
        segments(Conversation([turn("user", "u"), turn("assistant", "one")]), thinking)


LLAMA = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
MISTRAL = (
    "{% for m in messages %}{{ '[Q]' * (m.role == 'user') + m.content + '[/Q]' * (m.role == 'user') }}{% endfor %}"
)
ASKS = "<|assistant|>"
ASKED = "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}"
LAST = ASKED + " {{ m.content }}{% if loop.last %}</s>{% endif %}{% endif %}{% endfor %}"
THINKS = ASKED + "{% if loop.last %}<t></t>{% endif %}{{ m.content }}</s>{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "is_right"),
    [
        (LLAMA + ASKS, False),
        (LLAMA + f"{{% if add_generation_prompt %}}{ASKS}{{% endif %}}", True),
        *((MISTRAL, True), (LAST, True), (THINKS, True)),
    ],
    ids=["always", "if asked", "never", "turns written differently later", "thinking dropped later"],
)
def test_a_template_that_always_asks_for_an_answer_is_refused(template, is_right, tmp_path):
    """As the first of Llama 3 does, also after an answer: a student would learn to write that."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    says = [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("assistant", "d")]
    refused = pytest.raises(ConfigError, match="writes the beginning of an answer even where none is asked for")
    with nullcontext() if is_right else refused:
        prepared(tmp_path, [{"messages": [turn("user", str(i)), *says[1:]]} for i in range(4)], CHAT, tokenizer)


# --- rows ---


def test_packing_by_hand():
    # 9 is longer than a row; 5 opens row 0, 4 row 1, 3 fills row 0 to the brim, 2 goes to row 1
    packed, starts = pack(np.array([3, 5, 2, 4, 9]), 8)
    assert (packed.tolist(), starts.tolist()) == ([1, 0, 3, 2], [0, 2, 4])
    assert [part.tolist() for part in pack(np.array([9]), 8)] == [[], [0]]


@given(lengths=st.lists(st.integers(2, 12), max_size=60), size=st.integers(2, 12))
def test_every_example_that_fits_is_in_one_row(lengths, size):
    packed, starts = pack(np.array(lengths, np.int64), size)
    assert sorted(packed.tolist()) == [i for i, length in enumerate(lengths) if length <= size]
    used = [sum(lengths[i] for i in packed[a:b]) for a, b in itertools.pairwise(starts)]
    assert all(0 < tokens <= size for tokens in used)
    assert sum(tokens <= size / 2 for tokens in used) <= 1  # two such rows would have been one
    best: list[int] = []  # tokens left in each row, one example after the other
    for length in sorted((length for length in lengths if length <= size), reverse=True):
        space = min((space for space in best if space >= length), default=size)
        if space in best:
            best.remove(space)
        best.append(space - length)
    assert sorted(size - tokens for tokens in used) == sorted(best)


def test_rows_by_hand(tmp_path, caplog):
    rows = [{"question": "a", "answer": "b", "from": "x"}, {"question": "", "answer": "cd", "from": "y"},
            {"question": "too long" * 9, "answer": "e", "from": "x"}]  # fmt: skip
    examples = Examples(prompt="{question}:", response="{answer}")
    files, tokenizer = prepared(tmp_path, rows, examples, source_column="from")
    packed = ExampleRows(files, 10, True)
    a, b, c, d, colon = (tokenizer.encode(letter)[0] for letter in "abcd:")
    eos = tokenizer.eos_token_id
    assert (packed.num_rows, packed.num_left_out, packed.fill) == (1, 1, 0.8)
    assert packed.size == {"documents": 2, "tokens": 8}  # what a run can read of it
    batch = packed.build(np.array([0, NO_ROW]))
    _ = IGNORE
    assert batch["input_ids"].tolist() == [[a, colon, b, eos, colon, c, d, eos, eos, eos], [eos] * 10]
    assert batch["labels"].tolist() == [[_, b, eos, _, c, d, eos, _, _, _], [_] * 10]
    assert batch["positions"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1], list(range(10))]
    assert packed.label_counts(np.array([0])).tolist() == [5]
    origins = packed.origins(batch)
    assert origins["bytes"].tolist() == [[0, 1, 0, 0, 1, 1, 0, 0, 0, 0], [0] * 10]
    assert origins["documents"].tolist() == origins["sources"].tolist()  # one of each here
    assert origins["sources"].tolist() == [[-1, 0, 0, -1, 1, 1, 1, -1, -1, -1], [-1] * 10]
    with caplog.at_level(logging.INFO):
        together = open_examples("source", files, 10, False)
    assert together.build(np.array([0]))["positions"].tolist() == [list(range(10))]
    assert "2 examples in 1 rows, 80.0% filled; 1 are longer" in caplog.text


@hypothesis_settings(max_examples=15, deadline=None)
@given(data=st.data(), size=st.integers(8, 40))
def test_label_counts_are_those_of_the_rows(data, size, tmp_path_factory):
    texts = st.fixed_dictionaries(
        {"question": st.text("ab", max_size=9), "answer": st.text("cd", min_size=1, max_size=9)}
    )
    rows = data.draw(st.lists(texts, min_size=1, max_size=12))
    files, _ = prepared(tmp_path_factory.mktemp("rows"), rows, Examples(prompt="{question}:", response="{answer}"))
    packed = ExampleRows(files, size, True)
    every = np.arange(packed.num_rows)
    labels = packed.build(every)["labels"]
    for row in every:
        documents = packed.origins(packed.build(np.array([row])))["documents"]
        assert sorted(packed.documents(np.array([row])).tolist()) == np.unique(documents[documents >= 0]).tolist()
        assert packed.first_documents(np.array([row])) == documents[documents >= 0][0]
    assert (labels != IGNORE).sum(1).tolist() == packed.label_counts(every).tolist()
    kept = [len(row["answer"]) + 1 for row in rows if len(row["question"]) + len(row["answer"]) + 2 <= size]
    assert (labels != IGNORE).sum() == sum(kept)


# --- settings ---

ERRORS = {
    "no response": (
        {"prompt": "{q}"},
        r"--data.examples.response: '' is empty; give a template with at least one {column}",
    ),
    "both forms": ({"messages": "m", "prompt": "{q}"}, r"or messages \(.*\), not both; .* --data.examples.prompt ''"),
    "tools without a chat": ({"prompt": "{q}", "response": "{a}", "tools": "t"}, r"tools 't' needs a chat template"),
    "an open brace": (
        {"prompt": "{q", "response": "{a}"},
        r"--data.examples.prompt: '{q' is not a template \(.*\); write {column}",
    ),
    "no name": (
        {"prompt": "{}", "response": "{a}"},
        r"--data.examples.prompt: '{}': {} is not a column; write {column}",
    ),
    "no column": ({"prompt": "Say:", "response": "{a}"}, r"--data.examples.prompt: 'Say:': it names no column; write"),
    "an attribute": ({"prompt": "{q.x}", "response": "{a}"}, r"prompt: '{q.x}': {q.x} is not a column"),
    "a conversion": ({"prompt": "{q!r}", "response": "{a}"}, r"prompt: '{q!r}': {q!r} is not a column"),
    "a format": ({"prompt": "{q:>8}", "response": "{a}"}, r"prompt: '{q:>8}': '>8' after the colon has no =; write"),
    "the last role": ({"messages": [turn("user", "{q}")]}, r"the last of the roles \['user'\] must be assistant"),
    "a column that is not there": (
        {"prompt": "{q}", "response": "{b}"},
        r"--data.examples.response: no column 'b' in .*rows.jsonl: line 1; there are: q, a, n, l, m; "
        "use --data.bad_lines",
    ),
    "a conversation that is not there": ({"messages": "talk"}, r"--data.examples.messages: no column 'talk' in"),
    "no word": ({"prompt": "{q}", "response": "{a:1=one}"}, r"{a} holds 'b', but has words only for 1; .*: line 1"),
    "a list": ({"prompt": "{q}", "response": "{l}"}, r"{l} holds list, not text or a number; .* {l\[0\]}; .*: line 1"),
    "past the end": ({"prompt": "{q}", "response": "{l[7]}"}, r"{l\[7\]} is not in the row \(IndexError\)"),
    "no conversation": ({"messages": "m"}, r"with role and content as text, not 'x'; docs/fine-t.*: line 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_name_setting_and_column(case, settings, tokenizer_folder, tmp_path, capsys):
    examples, message = ERRORS[case]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "a", "a": "b", "n": 1, "l": ["x"], "m": "x"}))
    own = {f"data.examples.{key}": value for key, value in examples.items()}
    base = {"run": str(tmp_path / "run"), "kd.weight": 0.0, "data.source": str(tmp_path / "rows.jsonl"),
            "data.tokenizer": tokenizer_folder, "data.val_source": str(tmp_path / "rows.jsonl")}  # fmt: skip
    if "messages" in examples:
        base["data.tokenizer"] = str(tmp_path / "chat")
        chat_tokenizer().save_pretrained(tmp_path / "chat")
    assert cli.main(["fit", *arguments(settings, base, own)]) == 2
    line = error_of(capsys)
    assert re.search(message, line), line


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer") / "bytes"
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            {"data.tokenizer": "train"},
            "--data.tokenizer: 'train' makes a new tokenizer, but examples need the one that",
        ),
        ({"data.source": "a.txt"}, "a.txt is plain text, but --data.examples reads columns; give jsonl, parquet"),
        (
            {"data.val_fraction": 0.999999},
            "--data.val_fraction: none of the examples in --data.source is left for train",
        ),
        ({"data.block_size": 4}, "--data.block_size: none of the .* examples for train"),
        (
            {
                "data.examples.prompt": "",
                "data.examples.response": "",
                "data.examples.messages": "messages",
                "data.source": "a.jsonl",
            },
            "--data.examples.messages: the tokenizer of --data.tokenizer has no chat template",
        ),
    ],
)
def test_what_does_not_fit_examples_is_refused(own, message, sft, tmp_path, capsys):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant")]
    files = {"a.txt": "text", "a.jsonl": json.dumps({"messages": turns})}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    own = {key: str(tmp_path / value) if value in files else value for key, value in own.items()}
    assert cli.main(["fit", *arguments(sft, {"run": str(tmp_path / "run")}, own)]) == 2
    assert re.search(message, error_of(capsys))


# --- training on them ---


@pytest.fixture(scope="session")
def sft(settings, tokenizer_folder, tmp_path_factory) -> dict[str, object]:
    """Settings of a fine-tuning run that takes a few seconds, with examples of very different lengths."""
    file = tmp_path_factory.mktemp("sft") / "examples.jsonl"
    rows = [{"question": WORDS[i % 6] * (1 + i % 3), "answer": WORDS[(i + i // 6) % 6]} for i in range(120)]
    file.write_text(
        "".join(json.dumps({**row, "question": f"{row['question']} {i}"}) + "\n" for i, row in enumerate(rows))
    )
    own = {"data.source": str(file), "data.tokenizer": tokenizer_folder, "data.examples.prompt": PLAIN.prompt,
           "data.examples.response": PLAIN.response, "data.block_size": 64, "kd.weight": 0.0}  # fmt: skip
    return {**settings, **own}


class Batches(Callback):
    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.batches.append({key: value.clone() for key, value in batch.items()})


@pytest.mark.parametrize("micro_batch", [8, 2, 1])
def test_the_gradient_of_a_step_is_that_of_its_examples_one_by_one(micro_batch, sft, tmp_path):
    """By definition, in float64: each example alone, no packing or padding, one division."""
    seen, spy = Batches(), Spy(tmp_path / "spy")
    own = {"run": str(tmp_path / "run"), "data.micro_batch_size": micro_batch, "trainer.max_steps": 1,
           "trainer.gradient_clip_val": 0.0, "trainer.val_check_interval": 1, "model.optim.warmup_steps": 0,
           "checkpoint.keep": None, "model.optim.lr": 1e-30}  # fmt: skip
    assert run(["fit", *arguments(sft, own)], seen, spy) == 0
    assert len(seen.batches) == 8 // micro_batch
    checkpoint = torch.load(tmp_path / "run/checkpoints/step-00000001.ckpt", weights_only=True)
    student = checkpoint["hyper_parameters"]["student"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(student["family"], **student["config"])).double()
    prefix = "student.model."
    model.load_state_dict({k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items()})
    eos, losses, tokens = byte_tokenizer().eos_token_id, [], 0
    examples = [row for batch in seen.batches for ids in batch["input_ids"].tolist() for row in whole(ids, eos)]
    assert len(examples) > 8  # some rows contain several
    for ids in examples:
        asked = byte_tokenizer().decode(ids).index("A:") + 2  # one id per byte
        logits = model(torch.tensor([ids])).logits[0]
        losses.append(F.cross_entropy(logits[asked - 1 : -1], torch.tensor(ids[asked:]), reduction="sum"))
        tokens += len(ids) - asked
    (torch.stack(losses).sum() / tokens).backward()
    assert all(batch["step_tokens"] == tokens for batch in seen.batches)
    (found,) = torch.load(f"{spy.path}.0", weights_only=True)["gradients"]
    for name, parameter in model.named_parameters():
        largest = parameter.grad.abs().max()
        torch.testing.assert_close(found[prefix + name].double(), parameter.grad, rtol=0, atol=2e-5 * largest)


def whole(ids: list[int], eos: int) -> list[list[int]]:
    """The examples of a row; padding is EOS after EOS."""
    found, start = [], 0
    for i, token in enumerate(ids):
        if token == eos:
            if i > start:
                found.append(ids[start : i + 1])
            start = i + 1
    return found


def test_stopped_and_resumed_equals_never_stopped(sft, tmp_path, caplog):
    own = {"data.micro_batch_size": 4}
    for name, stop in (("a", ()), ("b", (StopAt(5),))):
        code = run(["fit", *arguments(sft, own, {"run": str(tmp_path / name)})], *stop)
        assert code == (143 if stop else 0)
    assert cli.main(["fit", *arguments(sft, own, {"run": str(tmp_path / "b"), "ckpt_path": "last"})]) == 0
    first, second = (weights(tmp_path / name / "checkpoints/step-00000012.ckpt") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "other data than" not in caplog.text
    more = {"run": str(tmp_path / "b"), "ckpt_path": "last", "trainer.max_steps": 13, "trainer.val_check_interval": 13}
    assert cli.main(["fit", *arguments(sft, own, more, {"data.examples.prompt": "So {question}:"})]) == 0
    said = "continuing with other data than the checkpoint's: other --data.examples.prompt, "
    assert said in caplog.text


def test_the_size_of_the_text_is_that_of_the_examples_in_the_rows(sft, tmp_path, caplog):
    own = {"run": str(tmp_path / "run"), "data.block_size": 24, "data.micro_batch_size": 4}
    assert cli.main(["fit", *arguments(sft, own)]) == 0
    taken, rows, left = re.search(
        r"\(training\): (\d+) examples in (\d+) rows, .*; (\d+) are longer", caplog.text
    ).groups()
    read, of_rows, tokens, documents = re.search(
        r"data: (\d+) rows of (\d+) tokens, from (\d+) tokens in (\d+) documents", caplog.text
    ).groups()
    assert int(left) > 10
    assert (documents, read, of_rows) == (taken, rows, "24")
    assert int(rows) * 12 < int(tokens) <= int(rows) * 24
    assert cli.main(["export", f"{own['run']}/checkpoints/step-00000012.ckpt", str(tmp_path / "out")]) == 0
    assert f"- text size: {documents} documents, {int(tokens):,} tokens" in (tmp_path / "out/README.md").read_text()


def test_starting_from_a_pretrained_student_lowers_the_loss_of_responses_alone(sft, tmp_path):
    long = {"trainer.max_steps": 30, "trainer.val_check_interval": 15, "model.optim.lr": 1e-2}
    assert cli.main(["fit", *arguments(sft, long, {"run": str(tmp_path / "a")})]) == 0
    start = {"run": str(tmp_path / "b"), "model.student.path": str(tmp_path / "a/checkpoints/step-00000030.ckpt")}
    fewer = {key: value for key, value in sft.items() if key != "model.student.config"}
    assert cli.main(["fit", *arguments(fewer, start)]) == 0
    first, second = (scalars(tmp_path / name)["train/ce"] for name in "ab")
    assert second[1] < first[1] - 1
    assert min(scalars(tmp_path / "b")["val/ce"].values()) < 3


def test_a_tokenizer_is_trained_on_words_that_end():
    """On 3 million letters without a space, training would take hours."""
    text = "a word " + "x" * 2500 + " " * 1500 + "end"
    assert "".join(_cut(text)) == text
    assert max(len(word) for piece in _cut(text) for word in piece.split()) <= 1000
    assert list(_cut("a word, and another")) == ["a word, and another"]
