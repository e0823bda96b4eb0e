"""Encoders: documents and examples -> token ids, and the bytes of text that each id stands for."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import Any

import numpy as np
from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer, decoders
from transformers import PreTrainedTokenizerBase

from salt_lightning.errors import ConfigError, few, one_line
from salt_lightning.text.documents import Corpus, Raw, utf8
from salt_lightning.text.examples import Conversation, Message, Segment, segments
from salt_lightning.text.parse import Skipped, documents, lots
from salt_lightning.text.token_files import Block
from salt_lightning.text.tokenizer import (
    beginning,
    in_pieces,
    keeps,
    num_ids,
    of_text,
    special_ids,
    unknown_ids,
)

_GPT2_EOS = "<|endoftext|>"  # it separates documents in many files of text
# Templates that write a date write this one (Llama 3's without a clock), so that ids do not depend on the day.
_DAY = datetime(2024, 7, 26)
_CODES = [f"%{code}" for code in (*"aAbBcdDefFGHIjklmMnpRSTuUVwWxXyY", "-d", "-m", "-H", "-I", "-M", "-S", "-y", "%")]
_WRITES_DAY = "".join(f".replace('{code}', '{_DAY.strftime(code)}')" for code in _CODES)
_MACRO = f"{{% macro strftime_now(format) %}}{{{{ format{_WRITES_DAY} }}}}{{% endmacro %}}{{{{ '' }}}}"


@dataclass
class Encoder:
    """Turns raw rows into their hash and blocks of ids by split; sent to the worker processes."""

    tokenizer: Tokenizer
    eos_id: int
    dtype: str
    corpus: Corpus
    val_fraction: float
    begins: list[int]  # the ids before each document
    ends: tuple[str, ...]  # texts that may have been meant as the end of a document

    def __call__(self, raw: Raw) -> tuple[bytes, dict[str, Block], Skipped]:
        splits: dict[str, list[tuple[Any, float, str]]] = {"train": [], "val": []}
        found, skipped = documents(raw, self.corpus, self._take)
        for (item, drawn_by), source in found:
            lot = lots(drawn_by)[0]
            splits["val" if lot < self.val_fraction else "train"].append((item, lot, source))
        blocks = {split: self._block(items, split == "val") for split, items in splits.items() if items}
        return raw.digest(), blocks, skipped

    def _take(self, content: Any) -> tuple[Any, bytes] | None:
        """What `_block` needs of a document, and the bytes that draw its split; None: it is left out."""
        data = utf8(content)
        return data, data

    def _block(self, docs: list[tuple[Any, float, str]], with_bytes: bool) -> Block:
        # Pickling loses this flag. A special token spelled out in a text is still text.
        self.tokenizer.encode_special_tokens = True
        ids, counts, lengths = [np.zeros(0, self.dtype)], [np.zeros(0, np.int32)], np.zeros(len(docs), np.int64)
        by_bytes = isinstance(self.tokenizer.decoder, decoders.ByteLevel)
        # Offsets cost time: only where bytes per token are needed.
        encode = self.tokenizer.encode_batch if with_bytes else self.tokenizer.encode_batch_fast
        for batch in in_pieces(docs):
            batch_ids: list[int] = []
            try:
                encodings = encode([part for _, part in batch], add_special_tokens=False)
            except Exception as error:  # a word that is not in a model without an unknown token
                raise ConfigError(
                    f"--data.tokenizer: cannot encode the text of {self.corpus.setting} ({one_line(error)}); give "
                    "it an unknown token, or use a byte-level tokenizer"
                ) from error
            for (number, part), encoding in zip(batch, encodings, strict=True):
                lengths[number] += len(encoding)
                batch_ids += encoding.ids
                if with_bytes and len(encoding):
                    counts.append(token_bytes(part, encoding.offsets, encoding.tokens if by_bytes else []))
            ids.append(np.array(batch_ids, self.dtype))
        kept = lengths > 0  # a normalizer may drop all text
        marks = [*self.begins, self.eos_id]
        ends = np.cumsum(lengths[kept])
        starts = ends - lengths[kept]
        places = np.stack([*(starts for _ in self.begins), ends], 1).ravel()
        return Block(
            np.insert(np.concatenate(ids), places, np.tile(marks, len(ends))),
            lengths[kept] + len(marks),
            [source for (_, _, source), is_kept in zip(docs, kept, strict=True) if is_kept],
            np.array([lot for _, lot, _ in docs])[kept],
            np.insert(np.concatenate(counts), places, 0) if with_bytes else None,
            sum(len(data) for (data, _, _), is_kept in zip(docs, kept, strict=True) if is_kept),
            spelled={end: sum(data.count(utf8(end)) for data, _, _ in docs) for end in self.ends},
        )


_ANCHORS = "\n."  # a normalizer may drop a line break
_Example = tuple[np.ndarray, np.ndarray, np.ndarray]  # ids up to EOS, whether each is learned, its bytes of text


@dataclass
class ExampleEncoder(Encoder):
    """The encoder for rows of fine-tuning examples.

    Each segment is tokenized on its own, so that the ids of a prompt do not depend on the answer: training and
    generation see the same prompt. A conversation, with all its examples, goes to a split by the hash of what comes
    before its first answer.
    """

    chat: PreTrainedTokenizerBase | None  # applies its chat template; None: plain text
    marks: list[int]  # of a chat template, and EOS: not text, so no bytes

    def _plain(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _continued(self, text: str, before: list[int], ends_in_space: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The same for text after the ids `before`: tokenized behind a similar anchor, whose ids are cut off again."""
        if self._begins_with_a_space:
            is_mark = self.chat is not None and before[-1] in self.marks
            anchor = str(self.tokenizer.id_to_token(before[-1])) if is_mark else self._anchor
            anchor += " " if anchor == _ANCHORS[1] and ends_in_space else ""
            cut, (ids, offsets) = self._plain(anchor)[0], self._plain(anchor + text)
            if ids[: len(cut)] == cut:
                return ids[len(cut) :], [(a - len(anchor), b - len(anchor)) for a, b in offsets[len(cut) :]]
        return self._plain(text)

    @cached_property
    def _begins_with_a_space(self) -> bool:
        """Whether the tokenizer puts a space before each text it encodes (SentencePiece)."""
        return self._plain(self._anchor + "a")[0] != self._plain(self._anchor)[0] + self._plain("a")[0]

    @cached_property
    def _anchor(self) -> str:
        kept = [text for text in _ANCHORS if keeps(self.tokenizer, text)]
        # a normalizer may make a space of a line break, and one space of two: then none is seen after it
        apart = (text for text in kept if self._plain(f"{text} a")[0] != self._plain(f"{text}a")[0])
        return next(apart, next(iter(kept), ""))

    def _take(self, content: Conversation) -> tuple[tuple[list[_Example], bool], bytes] | None:
        examples = self._encode(content)
        if not examples or examples[0][1][0]:  # after an empty prompt, nothing predicts the response
            return None
        return (examples, content.tools is not None), utf8(content.asked())

    def response(self, text: str) -> list[int]:
        """The ids of a response, with its EOS."""
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]
        ((ids, learned, _),) = self._encode(Conversation(messages))
        return ids[learned].tolist()

    def template_marks(self) -> set[int]:
        """The special tokens that the chat template writes itself."""
        if self.chat is None:
            return set()
        source, name = str(self.chat.chat_template), self.chat.convert_ids_to_tokens
        written = {i for i in self.marks if str(name(i)) in source}
        try:
            return (written | {*self.response("!")}) & {*self.marks}
        except ConfigError:  # of a template that does not accept this conversation
            return {*self.marks}

    def _block(self, docs: list[tuple[tuple[list[_Example], bool], float, str]], with_bytes: bool) -> Block:
        examples = [example for (of_row, _), _, _ in docs for example in of_row]
        ids, learned, counts = (np.concatenate(column) for column in zip(*examples, strict=True))
        return Block(
            ids.astype(self.dtype),
            np.array([len(ids) for ids, _, _ in examples], np.int64),
            [source for (of_row, _), _, source in docs for _ in of_row],
            np.array([lot for (of_row, _), lot, _ in docs for _ in of_row]),
            counts.astype(np.int32) if with_bytes else None,
            int(counts.sum()),
            learned.astype(np.uint8),
            sum(len(of_row) > 1 for (of_row, _), _, _ in docs),
            len(examples) - len(docs),
            sum(has_tools for (_, has_tools), _, _ in docs),
        )

    def _encode(self, conversation: Conversation) -> list[_Example]:
        # A template's marks are special tokens. Elsewhere, one spelled out in a text is still text.
        self.tokenizer.encode_special_tokens = self.chat is None
        render = self._written if self.chat is not None else None
        return [self._tokenized(example) for example in segments(conversation, render)]

    def _written(self, messages: list[Message], **how: Any) -> str:
        assert self.chat is not None
        template = self.chat.get_chat_template(tools=how.get("tools"))
        if "strftime_now" in template:
            how["chat_template"] = _MACRO + template
        return str(self.chat.apply_chat_template([messages], tokenize=False, **how)[0])  # in a list: it may be empty

    def _tokenized(self, example: list[Segment]) -> _Example:
        ids = [] if self.chat is not None else list(self.begins)  # a template writes its own
        learned, counts = [False] * len(ids), [0] * len(ids)
        start, ends_in_space = len(ids), False
        for text, is_learned in example:
            text = utf8(text).decode()
            new, offsets = self._continued(text, ids, ends_in_space) if len(ids) > start else self._plain(text)
            ends_in_space = text[-1:].isspace()
            if new:
                ids += new
                learned += [is_learned] * len(new)
                counts += token_bytes(text, offsets).tolist()
        if ids[-1:] != [self.eos_id]:  # the mark at the end of a turn may be EOS already
            ids, learned, counts = [*ids, self.eos_id], [*learned, True], [*counts, 0]
        found = np.array(ids)
        return found, np.array(learned), np.where(np.isin(found, self.marks), 0, counts)


def make_encoder(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, val_fraction: float) -> Encoder:
    """The encoder that turns the rows of a corpus into tokens."""
    chats = bool(corpus.examples.messages)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()) if chats else of_text(tokenizer)
    backend.no_truncation()
    backend.no_padding()
    dtype = "uint16" if num_ids(tokenizer) <= 1 << 16 else "uint32"
    eos_id, begins = int(tokenizer.eos_token_id), beginning(tokenizer)
    if not corpus.examples.given:
        ends = tuple(dict.fromkeys([str(tokenizer.eos_token), _GPT2_EOS]))
        return Encoder(backend, eos_id, dtype, corpus, val_fraction, begins, ends)
    plain = [file for group in corpus.groups if group.kind == "text" for file in group.files]
    if plain:
        raise ConfigError(
            f"{corpus.setting}: {plain[0]} is plain text, but --data.examples reads columns; give jsonl, parquet or a "
            "hub data set"
        )
    chat = tokenizer if chats else None
    if chat is not None:
        _require_template(chat, bool(corpus.examples.tools))
    unknown = set(unknown_ids(tokenizer)) - {eos_id}  # unknown tokens stand for text
    marks = sorted(set(special_ids(tokenizer)) - unknown)
    return ExampleEncoder(backend, eos_id, dtype, corpus, val_fraction, begins, (), chat, marks)


def _require_template(tokenizer: PreTrainedTokenizerBase, tools: bool) -> None:
    """Raises ConfigError unless the tokenizer has a chat template that is Jinja: no row is to blame for that."""
    template = tokenizer.chat_template
    if not template:
        raise ConfigError(
            "--data.examples.messages: the tokenizer of --data.tokenizer has no chat template; use "
            "--data.examples.prompt and --data.examples.response, or a tokenizer that has one"
        )
    if isinstance(template, dict) and "default" not in template and not (tools and "tool_use" in template):
        raise ConfigError(
            f"--data.tokenizer: none of its chat templates ({few(sorted(template))}) is called default; in its folder, "
            "save one as chat_template.jinja, or take another tokenizer"
        )
    offers: list[Any] = [None, [{}]] if tools else [None]  # with tools, another of its templates may be used
    for given in offers:
        try:
            tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tools=given, tokenize=False)
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"--data.tokenizer: its chat template is not valid Jinja, line {error.lineno}: {one_line(error)}; "
                "correct it (chat_template.jinja, or chat_template in tokenizer_config.json), or take another tokenizer"
            ) from error
        except Exception:  # it may refuse this conversation
            continue


def day_written(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The date that the chat template writes, if it asks for one."""
    named = tokenizer.chat_template
    templates = named.values() if isinstance(named, dict) else [named or ""]
    return [f"{_DAY:%d %B %Y}"] if any("strftime_now" in template for template in templates) else []


def token_bytes(text: str, offsets: list[tuple[int, int]], letters: Sequence[str] = ()) -> np.ndarray:
    """UTF-8 bytes of `text` that each token accounts for (int32); their sum is always the text's size.

    A token gets the bytes from the furthest end of earlier tokens to its own end; the last one gets the rest. The bytes
    of a character that several tokens share are divided among them: a document's first token has no label, and would
    otherwise take the bytes of others that have one.

    Args:
        text: as it was encoded.
        offsets: (start, end) in characters.
        letters: of each token of a byte-level tokenizer: one for each byte, unless a normalizer has changed the text.
    """
    sizes = np.array([len(each) for each in letters], np.int32)
    if letters and sizes.sum() == len(text.encode()):
        return sizes
    code_points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code_points >= 0x80) + (code_points >= 0x800) + (code_points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(widths)])
    start, end = np.array(offsets).T
    furthest = np.maximum.accumulate(end)
    ends = bytes_before[furthest]
    if not np.diff(furthest).all():
        last = np.diff(bytes_before, prepend=0)[furthest]  # bytes of the last character so far
        sharing = np.concatenate([[0], np.cumsum((end == furthest) & (start < end))])
        before, after = (sharing[np.searchsorted(furthest, furthest, side)] for side in ("left", "right"))
        ends -= last - last * (sharing[1:] - before) // np.maximum(after - before, 1)
    ends[-1] = bytes_before[-1]
    return np.diff(ends, prepend=0).astype(np.int32)
