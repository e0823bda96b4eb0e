"""Tokenizers: loaded or trained here; text -> ids, and the bytes of text that each id stands for."""

import json
import os
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, takewhile
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from salt_lightning.errors import ConfigError, first_line, one_line
from salt_lightning.text.documents import Corpus, Raw, read_raw, utf8
from salt_lightning.text.examples import Conversation, Message, Segment, segments
from salt_lightning.text.parse import Skipped, documents, empty_error, lots
from salt_lightning.text.progress import Done, Progress
from salt_lightning.text.token_files import Block, TokenFiles, digest

EOS = "<|endoftext|>"
# GPT-2's, except that vowel signs and other marks belong to their word: GPT-2's cuts words of Hindi or Thai at each.
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]+| ?\p{N}+| ?[^\s\p{L}\p{M}\p{N}]+|\s+(?!\S)|\s+"
_TRAINING_BYTES = 256 << 20  # read to train a tokenizer; larger corpora are sampled evenly
_PIECE_CHARS = 1 << 20  # encoded at once: an encoding takes about 100 bytes of memory per character
_WORD_END = re.compile(r"\S(?= [^\W\d_])")
SUBFOLDER = "tokenizer"  # of a model folder: beside the model, transformers would read it by other rules


def open_tokenizer(name: str, **source: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that transformers loads from a folder or hub name; an empty one if there are no files."""
    for place in ("", SUBFOLDER):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, subfolder=place, **source)
        if len(tokenizer) > len(tokenizer.added_tokens_decoder):
            break
    return tokenizer


def load_tokenizer(name: str, setting: str = "--data.tokenizer") -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the hub; none of their code is run.

    Raises:
        ConfigError: it is not found, or has no end-of-text token, or not the fast implementation that gives
            offsets.
    """
    folder = os.path.expanduser(name)  # from Python, no shell does it
    allowed = "a folder, hub name or train" if setting == "--data.tokenizer" else "a folder or hub name"
    if not os.path.isdir(folder) and (folder.startswith((".", "/")) or folder.count("/") > 1):  # not a hub name
        raise ConfigError(f"{setting}: the folder {name!r} does not exist; give {allowed}")
    try:
        tokenizer = open_tokenizer(folder, trust_remote_code=False)
    except Exception as error:
        files = os.listdir(folder) if os.path.isdir(folder) else []
        if "tokenizer.json" not in files and {"tokenizer.model", "tekken.json"}.intersection(files):
            allowed = "what AutoTokenizer's save_pretrained makes of it with the packages that it needs"
        raise ConfigError(f"{setting}: cannot load {name!r} ({first_line(error)}); give {allowed}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{setting}: {name!r} has no tokenizer.json; save it as a fast tokenizer first")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{setting}: {name!r} has no eos_token, which ends every document; give it one")
    tokenizer.backend_tokenizer.no_padding()  # a word could be padded to any length
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the token -> id map: models whose tokenizers share it understand each other's ids."""
    return digest(sorted(tokenizer.get_vocab().items()))


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """All ids are below this number. It may exceed the number of tokens: some vocabularies have gaps."""
    return max(len(tokenizer), *(i + 1 for i in tokenizer.get_vocab().values()))


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that stand for no text: named ones (BOS, EOS), and chat marks, which often have no name."""
    marks = (i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    return sorted({*tokenizer.all_special_ids, *marks})


_SAMPLE_TOKENS = 1 << 19  # in all


def beginnings(files: TokenFiles) -> Iterator[tuple[str, np.ndarray]]:
    """(name, positions of the first tokens of some documents, evenly spaced) of each source of held-out text."""
    ends, names = files.doc_ends, files.manifest["sources"]
    starts, by_source = np.append(0, ends[:-1]), np.argsort(files.doc_sources, kind="stable")
    borders = np.searchsorted(files.doc_sources[by_source], np.arange(len(names) + 1))
    documents = min(32, max(1, _SAMPLE_TOKENS // 64 // max(1, len(names))))  # of a source
    each = max(64, _SAMPLE_TOKENS // documents // max(1, len(names)))
    for name, first, last in zip(names, borders[:-1], borders[1:], strict=True):
        chosen = by_source[first : last : -(-(last - first) // documents) or 1]
        if len(chosen):
            spans = zip(starts[chosen], np.minimum(ends[chosen], starts[chosen] + each), strict=True)
            yield name, np.concatenate([np.arange(start, end) for start, end in spans])


def kept_text(tokenizer: PreTrainedTokenizerBase, files: TokenFiles) -> list[tuple[str, float, float]]:
    """(source, share of its bytes that the tokenizer has no token for, share that its tokens decode to) of each source,
    measured on `beginnings` of held-out documents."""
    unknown, found = unknown_ids(tokenizer), []
    for name, at in beginnings(files):
        tokens, counts = files.tokens[at], files.token_bytes[at]
        there = max(1, int(counts.sum()))
        # Count bytes: one unknown token may be a sentence. EOS may be the same token, and stands for no byte.
        no_token = int(counts[np.isin(tokens, unknown)].sum())
        found.append((name, no_token / there, len(utf8(decode(tokenizer, tokens.tolist()))) / there))
    return found


def unknown_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids for unknown text, according to the tokenizer and to its model."""
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    by_name = tokenizer.get_vocab().get(model.get("unk_token"))
    return sorted({tokenizer.unk_token_id, by_name, model.get("unk_id")} - {None})


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """The text of ids, without special ones."""
    backend, special = tokenizer.backend_tokenizer, set(special_ids(tokenizer))
    ids = [i for i in ids if i not in special]
    if backend.decoder is None and type(backend.model).__name__ in ("BPE", "Unigram"):  # decode would insert spaces
        return "".join(str(backend.id_to_token(i)) for i in ids)
    return str(backend.decode(ids))


# A capital letter, accents, vowel signs of Devanagari, Thai and Arabic, a wide character.
_WORDS = ("Paris", "été", "में", "ที่", "عربيّ", "東京")


def changed_words(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """(word, what its tokens decode to) where a tokenizer knows a word but changes it, beyond its Unicode form."""
    changed, foreign = [], {*special_ids(tokenizer), *unknown_ids(tokenizer)}
    for word in _WORDS if tokenizer.backend_tokenizer.decoder is not None else ():  # else it has no text to compare
        ids = tokenizer.backend_tokenizer.encode(word, add_special_tokens=False).ids
        back = unicodedata.normalize("NFC", "".join(decode(tokenizer, ids).split()))
        if not set(ids) & foreign and back != unicodedata.normalize("NFC", word):
            changed.append((word, back))
    return changed


def rules_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that determines the ids of a text, including merges, normalizer and pre-tokenizer."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest([{**rules, "truncation": None, "padding": None}, tokenizer.eos_token_id])


def of_text(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A tokenizer for plain text: with `encode_special_tokens` set, a spelled-out special token is text."""
    told = tokenizer.backend_tokenizer.to_str()
    if type(tokenizer.backend_tokenizer.model).__name__ != "Unigram":  # which has them in its vocabulary
        return Tokenizer.from_str(told)
    rules, special = json.loads(told), set(special_ids(tokenizer))
    words = enumerate(rules["model"]["vocab"])
    rules["model"]["vocab"] = [[_NO_TEXT.format(i) if i in special else word, p] for i, (word, p) in words]
    for token in rules["added_tokens"]:  # keep all tokens, so that no id changes
        if token["id"] in special:
            token["content"] = _NO_TEXT.format(token["id"])
    return Tokenizer.from_str(json.dumps(rules))


_NO_TEXT = "\ufffe{}\uffff"  # Unicode noncharacters, which texts do not contain


def beginning(tokenizer: Tokenizer) -> list[int]:
    """The ids that a tokenizer puts before every text: BOS, or none."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    found = zip(encoding.ids, encoding.special_tokens_mask, encoding.attention_mask, strict=True)
    special = [(i, is_special) for i, is_special, is_no_padding in found if is_no_padding]
    return [i for i, _ in takewhile(lambda pair: pair[1], special)]


_RUN = re.compile(r"\S{1000}|\s{1000}")


def _cut(text: str) -> Iterator[str]:
    """Cut text after 1,000 characters of one word: training time grows with its length squared (200,000: 34 s)."""
    start = 0
    for run in _RUN.finditer(text):
        yield text[start : run.end()]
        start = run.end()
    yield text[start:]


def train_tokenizer(corpus: Corpus, vocab_size: int, val_fraction: float, folder: str) -> None:
    """Train a byte-level BPE on the training documents of a corpus; save it in the format of transformers."""
    began = time.monotonic()
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,  # its bars have no total, and would overwrite ours
    )
    tokenizer.train_from_iterator(chain.from_iterable(map(_cut, _training_texts(corpus, val_fraction))), trainer)
    rank_zero_info(f"tokenizer: trained a BPE of {tokenizer.get_vocab_size()} in {time.monotonic() - began:.1f} s")
    try:
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS).save_pretrained(folder)
    except Exception as error:  # the Rust library has no special error for a full disk
        raise OSError(first_line(error)) from error


def _training_texts(corpus: Corpus, val_fraction: float) -> Iterator[str]:
    total_bytes = corpus.num_bytes()
    share = min(1.0, _TRAINING_BYTES / max(1, total_bytes))
    chars, num_documents, skipped = 0, 0, Skipped()
    progress = Progress(total_bytes, Done(time.monotonic(), 0, None, 0, 0), "reading for the tokenizer")
    for raw in read_raw(corpus):
        found, bad = documents(raw, corpus)
        num_documents += len(found)
        skipped.add(bad)
        for text, _ in found:
            split, sample = lots(utf8(text))
            if split >= val_fraction and sample < share:
                chars += len(text)
                yield from pieces(utf8(text).decode())
        progress.update(Done(time.monotonic(), num_documents, None, chars, raw.read_bytes))
        if chars > 4 * _TRAINING_BYTES:  # hub sizes are unknown, and files may be compressed
            break
    progress.close()
    if not num_documents:
        raise empty_error(corpus, skipped)
    if not chars:
        raise ConfigError(
            f"--data.val_fraction: {val_fraction} left none of {num_documents} documents for training; "
            f"{'lower it, ' * (num_documents > 1)}split the text into more documents (a text file is one, as is each "
            "line of a .jsonl), or give --data.val_source"
        )
    rank_zero_info(f"tokenizer: read {num_documents} documents; training on {chars / 1e6:.1f} M characters")


@dataclass
class Encoder:
    """Turns raw rows into their hash and blocks of ids by split; sent to the worker processes."""

    tokenizer: Tokenizer
    eos_id: int
    dtype: str
    corpus: Corpus
    val_fraction: float
    ends: tuple[str, ...]  # texts that may have been meant as the end of a document

    def __call__(self, raw: Raw) -> tuple[bytes, dict[str, Block], Skipped]:
        splits: dict[str, list[tuple[Any, float, str]]] = {"train": [], "val": []}
        found, skipped = documents(raw, self.corpus, self._take)
        for (item, drawn_by), source in found:
            lot = lots(drawn_by)[0]
            splits["val" if lot < self.val_fraction else "train"].append((item, lot, source))
        blocks = {split: self._block(items, split == "val") for split, items in splits.items() if items}
        return raw.digest(), blocks, skipped

    @cached_property
    def _beginning(self) -> list[int]:
        return beginning(self.tokenizer)

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
        for batch in _batches(docs):
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
        marks = [*self._beginning, self.eos_id]
        ends = np.cumsum(lengths[kept])
        starts = ends - lengths[kept]
        places = np.stack([*(starts for _ in self._beginning), ends], 1).ravel()
        return Block(
            np.insert(np.concatenate(ids), places, np.tile(marks, len(ends))),
            lengths[kept] + len(marks),
            [source for (_, _, source), is_kept in zip(docs, kept, strict=True) if is_kept],
            np.array([lot for _, lot, _ in docs])[kept],
            np.insert(np.concatenate(counts), places, 0) if with_bytes else None,
            sum(len(data) for (data, _, _), is_kept in zip(docs, kept, strict=True) if is_kept),
            spelled={end: sum(data.count(utf8(end)) for data, _, _ in docs) for end in self.ends},
        )


_ANCHOR = "\n"
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

    def _continued(self, text: str, before: list[int]) -> tuple[list[int], list[tuple[int, int]]]:
        """The same for text after the ids `before`: tokenized behind a similar anchor, whose ids are cut off again."""
        if self._begins_with_a_space:
            is_mark = self.chat is not None and before[-1] in self.marks
            anchor = str(self.tokenizer.id_to_token(before[-1])) if is_mark else _ANCHOR
            cut, (ids, offsets) = self._plain(anchor)[0], self._plain(anchor + text)
            if ids[: len(cut)] == cut:
                return ids[len(cut) :], [(a - len(anchor), b - len(anchor)) for a, b in offsets[len(cut) :]]
        return self._plain(text)

    @cached_property
    def _begins_with_a_space(self) -> bool:
        """Whether the tokenizer puts a space before each text it encodes (SentencePiece)."""
        return self._plain(_ANCHOR + "a")[0] != self._plain(_ANCHOR)[0] + self._plain("a")[0]

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
        return str(self.chat.apply_chat_template([messages], tokenize=False, **how)[0])  # in a list: it may be empty

    def _tokenized(self, example: list[Segment]) -> _Example:
        ids = [] if self.chat is not None else list(self._beginning)  # a template writes its own
        learned, counts = [False] * len(ids), [0] * len(ids)
        start = len(ids)
        for text, is_learned in example:
            text = utf8(text).decode()
            new, offsets = self._continued(text, ids) if len(ids) > start else self._plain(text)
            if new:
                ids += new
                learned += [is_learned] * len(new)
                counts += token_bytes(text, offsets).tolist()
        if ids[-1:] != [self.eos_id]:  # the mark at the end of a turn may be EOS already
            ids, learned, counts = [*ids, self.eos_id], [*learned, True], [*counts, 0]
        found = np.array(ids)
        return found, np.array(learned), np.where(np.isin(found, self.marks), 0, counts)


def _batches(docs: list[tuple[bytes, float, str]]) -> Iterator[list[tuple[int, str]]]:
    """(document's number, text) pairs, in batches small enough to encode in memory."""
    batch, chars = [], 0
    for number, (data, _, _) in enumerate(docs):
        for part in pieces(data.decode()):
            batch.append((number, part))
            chars += len(part)
            if chars >= _PIECE_CHARS:
                yield batch
                batch, chars = [], 0
    yield batch


def pieces(text: str) -> Iterator[str]:
    """The text itself, or the parts of a huge one, so that memory holds one part's encoding at a time.

    Cut before a space that follows a non-space and precedes a letter: the usual tokenizers begin a word there, so the
    ids are those of the whole text. Without such a place, it is cut anyway.
    """
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        places = [match.end() for match in _WORD_END.finditer(text, max(start, end - _PIECE_CHARS // 8), end)]
        end = places[-1] if places else end
        yield text[start:end]
        start = end
    yield text[start:]


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
