"""Tokenizers: loaded or trained here, and what their tokens are."""

import json
import os
import re
import time
import unicodedata
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from itertools import chain, takewhile
from typing import Any

import numpy as np
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import is_offline_mode

from salt_lightning.errors import ConfigError, counted, first_line
from salt_lightning.text.documents import Corpus, read_raw, utf8
from salt_lightning.text.parse import Skipped, documents, empty_error, lots
from salt_lightning.text.progress import Done, Progress
from salt_lightning.text.token_files import TokenFiles, digest

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
    """Load a tokenizer from a folder or the hub (owner/name, owner/name@revision); none of their code is run.

    Raises:
        ConfigError: it is not found, or has no end-of-text token, or not the fast implementation that gives
            offsets.
    """
    folder = os.path.expanduser(name)  # from Python, no shell does it
    allowed = "a folder, hub name or train" if setting == "--data.tokenizer" else "a folder or hub name"
    if not os.path.isdir(folder) and (folder.startswith((".", "/")) or folder.count("/") > 1):  # not a hub name
        raise ConfigError(f"{setting}: the folder {name!r} does not exist; give {allowed}")
    where, at, revision = (folder, "", "") if os.path.isdir(folder) else folder.partition("@")
    if at and not (where and revision):
        raise ConfigError(f"{setting}: {name!r} lacks a name before the @ or a revision after it; give {allowed}")
    try:
        tokenizer = open_tokenizer(where, revision=revision or "main", trust_remote_code=False)
    except Exception as error:
        files = os.listdir(folder) if os.path.isdir(folder) else []
        if "tokenizer.json" not in files and {"tokenizer.model", "tekken.json"}.intersection(files):
            allowed = "what AutoTokenizer's save_pretrained makes of it with the packages that it needs"
        if os.path.isdir(os.path.join(folder, "tokenizer")):  # the folder of a run
            allowed = os.path.join(name, "tokenizer")
        why = first_line(error).partition(" from one of:")[0]  # a list that is not about this folder follows
        if why.startswith("Couldn't instantiate the backend tokenizer") and "tokenizer.json" not in files:
            why = "it has no tokenizer.json"
        if is_offline_mode() and "couldn't connect" in why:
            here = f"the hub is offline (HF_HUB_OFFLINE), and its cache here has no tokenizer of {where}"
            why = f"no such folder here; {here} at {revision or 'main'}"
        raise ConfigError(f"{setting}: cannot load {name!r} ({why}); give {allowed}") from error
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(f"{setting}: {name!r} has no tokenizer.json; save it as a fast tokenizer first")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"{setting}: {name!r} has no eos_token, which ends every document; give it one")
    tokenizer.backend_tokenizer.no_padding()  # a word could be padded to any length
    tokenizer.backend_tokenizer.no_truncation()
    return tokenizer


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of the token -> id map: models whose tokenizers share it understand each other's ids."""
    return _vocabulary(tokenizer, len(tokenizer))[0]


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """All ids are below this number. It may exceed the number of tokens: some vocabularies have gaps."""
    return _vocabulary(tokenizer, len(tokenizer))[1]


@lru_cache(maxsize=2)  # every save asks, and 256,000 tokens take most of a second
def _vocabulary(tokenizer: PreTrainedTokenizerBase, num_tokens: int) -> tuple[str, int]:
    vocabulary = tokenizer.get_vocab()
    return digest(sorted(vocabulary.items())), max(num_tokens, *(i + 1 for i in vocabulary.values()))


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


# A capital letter, accents, vowel signs of Devanagari, Thai and Arabic, a wide character, a line break and a tab.
_WORDS = ("Paris", "été", "में", "ที่", "عربيّ", "東京", "a\n\tb")


def changed_words(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, str]]:
    """(word, what its tokens decode to) where a tokenizer knows a word but changes it, beyond its Unicode form."""
    changed, foreign = [], {*special_ids(tokenizer), *unknown_ids(tokenizer)}
    backend = tokenizer.backend_tokenizer
    known = [word for word in _WORDS if keeps(backend, word)] if backend.decoder is not None else []
    for word in known:  # without a decoder, it has no text to compare
        ids = backend.encode(word, add_special_tokens=False).ids
        back = unicodedata.normalize("NFC", decode(tokenizer, ids))
        if not set(ids) & foreign and back.replace(" ", "") != unicodedata.normalize("NFC", word):
            changed.append((word, back.strip()))
    return changed


def rules_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of everything that determines the ids of a text, including merges, normalizer and pre-tokenizer."""
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    return digest([{**rules, "truncation": None, "padding": None}, tokenizer.eos_token_id])


def of_text(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """A tokenizer for plain text: with `encode_special_tokens` set, a spelled-out special token is text."""
    told, names = tokenizer.backend_tokenizer.to_str(), {i: _NO_TEXT.format(i) for i in spelled_ids(tokenizer)}
    if not names:
        return Tokenizer.from_str(told)
    rules = json.loads(told)
    if rules["model"]["type"] == "Unigram":
        rules["model"]["vocab"] = [[names.get(i, word), p] for i, (word, p) in enumerate(rules["model"]["vocab"])]
    else:
        rules["model"]["vocab"] = {names.get(i, word): i for word, i in rules["model"]["vocab"].items()}
    for token in rules["added_tokens"]:  # keep all tokens, so that no id changes
        token["content"] = names.get(token["id"], token["content"])
    return Tokenizer.from_str(json.dumps(rules))


def spelled_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that a text which spells them would get, since the model has them among its words.

    Not those of one or two characters, which may be ordinary text as well, and none that the model cannot write
    otherwise.
    """
    model: Any = tokenizer.backend_tokenizer.model
    kind, special = type(model).__name__, special_ids(tokenizer)
    if kind == "Unigram":
        return special
    if kind == "BPE" and not model.ignore_merges:
        return []  # only merges make words
    names = {i: str(tokenizer.convert_ids_to_tokens(i)) for i in special}
    named = {i: name for i, name in names.items() if len(name) > 2 and model.token_to_id(name) == i}
    named = {i: name for i, name in named.items() if _is_a_word(tokenizer.backend_tokenizer, name)}
    if not named or (kind != "BPE" and model.token_to_id(str(model.unk_token)) is None):
        return []
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"].get("merges", ())
    merged = {part for merge in merges for part in (*merge, "".join(merge))}
    return sorted({i for i, name in named.items() if name not in merged} - {*unknown_ids(tokenizer)})


def _is_a_word(tokenizer: Tokenizer, name: str) -> bool:
    """Whether it reaches the model in one part: BERT's own rules split [SEP]."""
    text = name if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(name)
    return tokenizer.pre_tokenizer is None or len(tokenizer.pre_tokenizer.pre_tokenize_str(text)) == 1


_NO_TEXT = "\ufffe{}\uffff"  # Unicode noncharacters, which texts do not contain


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids that a tokenizer puts before every text: BOS, or none."""
    backend = tokenizer.backend_tokenizer
    text = "a" if keeps(backend, "a") else tokenizer.eos_token or "a"  # not all know a letter
    encoding = backend.encode(text, add_special_tokens=True)
    found = zip(encoding.ids, encoding.special_tokens_mask, encoding.attention_mask, strict=True)
    special = [(i, is_special) for i, is_special, is_no_padding in found if is_no_padding]
    return [i for i, _ in takewhile(lambda pair: pair[1], special)]


def keeps(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the tokenizer has tokens for any of a text."""
    with suppress(Exception):  # of a model without an unknown token
        return bool(tokenizer.encode(text, add_special_tokens=False).ids)
    return False


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
    text_bytes, num_documents, skipped = 0, 0, Skipped()
    progress = Progress(total_bytes, Done(time.monotonic(), 0, None, 0, 0), "reading for the tokenizer")
    for raw in read_raw(corpus):
        found, bad = documents(raw, corpus)
        num_documents += len(found)
        skipped.add(bad)
        for text, _ in found:
            data = utf8(text)
            split, sample = lots(data)
            if split >= val_fraction and sample < share:
                text_bytes += len(data)
                yield from pieces(data.decode())
        progress.update(Done(time.monotonic(), num_documents, None, text_bytes, raw.read_bytes))
        if text_bytes > 4 * _TRAINING_BYTES:  # hub sizes are unknown, and files may be compressed
            break
    progress.close()
    if not num_documents:
        raise empty_error(corpus, skipped)
    if not text_bytes:
        raise ConfigError(
            f"--data.val_fraction: {val_fraction} left none of {num_documents} documents for training; "
            f"{'lower it, ' * (num_documents > 1)}split the text into more documents (a text file is one, as is each "
            "line of a .jsonl), or give --data.val_source"
        )
    rank_zero_info(f"tokenizer: read {counted(num_documents, 'document')}; training on {text_bytes / 1e6:.1f} MB")


def in_pieces(docs: list[tuple[bytes, float, str]]) -> Iterator[list[tuple[int, str]]]:
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
    ids are those of the whole text, except for the space that SentencePiece puts before each part. Without such a
    place, it is cut anyway.
    """
    start = 0
    while len(text) - start > _PIECE_CHARS:
        end = start + _PIECE_CHARS
        places = [match.end() for match in _WORD_END.finditer(text, max(start, end - _PIECE_CHARS // 8), end)]
        end = places[-1] if places else end
        yield text[start:end]
        start = end
    yield text[start:]
