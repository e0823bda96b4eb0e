"""Checks that a pretrained model and the data agree on the meaning of every token id."""

import json
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from transformers import PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import is_offline_mode

from salt_lightning.errors import ConfigError, raised, refuse
from salt_lightning.hugging_face import folders
from salt_lightning.hugging_face.spec import ModelSpec, as_config_error, check_positions
from salt_lightning.models import loading, read_checkpoint, read_config
from salt_lightning.schedule import kd_callbacks
from salt_lightning.text.tokenizer import SUBFOLDER, beginning, open_tokenizer, special_ids

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", f"{SUBFOLDER}/tokenizer.json")


def check_fit(spec: ModelSpec, name: str, data: Any, config: PreTrainedConfig | None = None) -> tuple[bool, str]:
    """Whether the pretrained model at `spec.path` is known to use the same token ids as the data, and an explanation.

    Does not read its weights, and reads its `config` only if that is not given. `data`: a SALTDataModule.

    A checkpoint's tokenizer is identified by its fingerprint, that of a folder or hub name by the files beside the
    model. Only ids that the text can contain are compared: all except special tokens other than BOS and EOS.

    Raises:
        ConfigError: it cannot read the data's rows, or uses other ids; the message shows the first of these.
    """
    config = config or read_config(spec, name)
    check_positions(config, f"--model.{name}.path {spec.path}: its max_position_embeddings", data)
    config = config.get_text_config()
    if config.vocab_size < data.vocab_size:
        raise ConfigError(
            f"--model.{name}.path {spec.path} has a vocabulary of {config.vocab_size}, --data.tokenizer "
            f"{data.vocab_size}: use the tokenizer that this {name} was trained with; only if it is that one with "
            "tokens added, first add rows to the model (resize_token_embeddings in transformers) and save it"
        )
    size = f"{data.vocab_size} tokens, {config.vocab_size} rows in the head"
    own = _own_tokenizer(spec, name)
    vocabulary = {} if own is None else own.get_vocab()
    emitted = emitted_ids(data.tokenizer, bool(data.examples.messages))
    differing = [(i, token) for i, token in emitted.items() if vocabulary.get(token) != i]
    same = f"same map of all {len(emitted)} tokens that the text can contain"
    if spec.is_checkpoint:
        saved = read_checkpoint(str(spec.path), f"--model.{name}.path").get("tokenizer")
        if saved is None:
            return False, f"{size}: not checked, the checkpoint does not record its tokenizer"
        if saved == data.tokenizer_fingerprint:
            differing, same = [], "same map"
    elif own is None:
        return False, f"{size}: not checked, {spec.path} has no tokenizer files{' here' if is_offline_mode() else ''}"
    if not differing:
        if own is not None and _rules(own) != _rules(data.tokenizer):
            return False, f"{size}: {same}, but --data.tokenizer splits text by other rules than that of {spec.path}"
        return True, f"{size}: {same}"
    names = {i: token for token, i in vocabulary.items()}
    shown = ", ".join(f"id {i} is {token!r} here and {names.get(i)!r} there" for i, token in differing[:5])
    if not spec.is_checkpoint:
        at = f"{spec.path}@{spec.revision}" if spec.revision else spec.path
        raise ConfigError(
            f"--model.{name}.path {spec.path} and --data.tokenizer name {len(differing)} token ids differently: {shown}"
            f"; use the tokenizer that this {name} was trained with, --data.tokenizer {at}"
        )
    known = f" ({len(differing)} of them: {shown})" if vocabulary else ""
    raise ConfigError(
        f"--model.{name}.path {spec.path} was trained with another tokenizer than --data.tokenizer: its token "
        f"ids mean something else{known}; set --data.tokenizer to that run's own, RUN/tokenizer"
    )


def require_same_tokenizer(checkpoint: dict[str, Any], data: Any, what: str = "checkpoint") -> None:
    """Raises ConfigError if a run's checkpoint was trained with another tokenizer than that of `data`, if known."""
    tokenizer = getattr(data, "tokenizer_fingerprint", None)
    if tokenizer is not None and checkpoint.get("tokenizer") not in (None, tokenizer):
        raise ConfigError(
            f"the {what} was trained with another tokenizer than --data.tokenizer gives: its token ids mean "
            "something else (a tokenizer trained on the text changes with it); set --data.tokenizer to the run's own, "
            "RUN/tokenizer"
        )


def tell_fit(spec: ModelSpec, name: str, data: Any) -> None:
    """`check_fit` if there is something to compare; logs what cannot be checked."""
    if spec.path is not None and data is not None:
        known, said = check_fit(spec, name, data)
        if not known:
            rank_zero_info(f"{name}: {said}")


def check_models(trainer: Any, student: ModelSpec, teacher: ModelSpec) -> None:
    """`check_fit` of all models that this run will load, and the download of those on the hub, before hours of work;
    likewise `require_same_tokenizer` of the checkpoint.

    The checkpoint is known by now if the command line was given it; `trainer.ckpt_path` may be that of an earlier call.
    """
    path = getattr(trainer, "command_ckpt_path", None)
    fits, predicts = (trainer.state.fn == fn for fn in (TrainerFn.FITTING, TrainerFn.PREDICTING))
    starts = not path  # a run resumed in phase 2 needs no teacher, which may be gone
    taught = predicts or (fits and starts and any(kd.schedule.weight > 0 for kd in kd_callbacks(trainer)))
    looks: list[Callable[[], object]] = []
    there = []
    if path:
        with suppress(ConfigError):
            looks.append(partial(require_same_tokenizer, read_checkpoint(path, "--ckpt_path"), trainer.datamodule))
    for spec, name, loaded in ((student, "student", fits or (starts and not predicts)), (teacher, "teacher", taught)):
        if loaded and spec.path is not None:
            with suppress(ConfigError):
                looks.append(partial(check_fit, spec, name, trainer.datamodule, read_config(spec, name)))
                there.append((spec, name))
    refuse(raised(looks))
    for spec, name in there:
        if spec.commit and not is_offline_mode():
            with loading(spec, name):
                folders.fetch(str(spec.path), f"--model.{name}.path", spec.commit)


def emitted_ids(tokenizer: Any, chats: bool = False) -> dict[int, str]:
    """The ids, in order, that a tokenized text (or chat) can contain, with their tokens."""
    written = {tokenizer.eos_token, *tokenizer.convert_ids_to_tokens(beginning(tokenizer))}
    special = set(tokenizer.convert_ids_to_tokens(special_ids(tokenizer))) - written
    if chats:
        special -= {token for token in special if token in str(tokenizer.chat_template)}
    return {i: token for token, i in sorted(tokenizer.get_vocab().items(), key=lambda e: e[1]) if token not in special}


def _rules(tokenizer: Any) -> list[Any]:
    """The rules that split text into tokens, without special tokens, which may have other names in other models, but
    with those before each text."""
    rules, special = json.loads(tokenizer.backend_tokenizer.to_str()), set(special_ids(tokenizer))
    vocab = rules["model"]["vocab"]
    words = vocab.items() if isinstance(vocab, dict) else ((tuple(word), i) for i, word in enumerate(vocab))
    rules["model"]["vocab"] = {word: i for word, i in words if i not in special}
    added = [token for token in rules["added_tokens"] if token["id"] not in special]
    return [added, beginning(tokenizer), *(rules[part] for part in ("normalizer", "pre_tokenizer", "model"))]


def _own_tokenizer(spec: ModelSpec, name: str) -> Any:
    """The tokenizer beside a model, or in the run's folder of a checkpoint; None if there is none."""
    path, revision = str(spec.path), spec.source["revision"]
    if spec.is_checkpoint:
        path = str(Path(path).parent.parent / "tokenizer")
        there = Path(path).is_dir()
    else:
        how = folders.MAY_LACK | {"_raise_exceptions_for_connection_errors": not is_offline_mode()}
        with as_config_error(f"--model.{name}.path {spec.path}: its tokenizer cannot be read"):
            there = any(cached_file(path, file, revision=revision, **how) for file in _TOKENIZER_FILES)
    if not there:
        return None
    with as_config_error(f"--model.{name}.path {spec.path}: its tokenizer cannot be loaded"):
        return open_tokenizer(path, **spec.source)
