"""The command `export`: writes the student of a checkpoint as a Hugging Face folder, with a model card.

Weights are read and written one file at a time, each of a few gigabytes at most, so the memory needed does not grow
with the model. Needs no GPU, no teacher and no process group.
"""

import fcntl
import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from lightning.pytorch.utilities import rank_zero_info
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from salt_lightning.command.settings import wrong_path
from salt_lightning.comparison import lineage
from salt_lightning.errors import ConfigError, VerbParser, failed_write, few, first_line, printable
from salt_lightning.hugging_face import old_names
from salt_lightning.hugging_face.card import model_card, own_class
from salt_lightning.hugging_face.spec import DTYPES, as_config_error, of_checkpoint
from salt_lightning.models import from_config, own_parts, read_checkpoint, require_undamaged
from salt_lightning.parallel import check_same_model
from salt_lightning.run.peers import writes_elsewhere
from salt_lightning.run.runlog import read_run
from salt_lightning.storage.shards import STUDENT, Tensors, UnansweredError, sync_folder
from salt_lightning.text.tokenizer import (
    SUBFOLDER,
    load_tokenizer,
    rules_fingerprint,
    special_ids,
    tokenizer_fingerprint,
)

MAX_FILE_BYTES = 2 << 30


def export(
    checkpoint: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    run: Path | None = None,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> str:
    """Writes the student of `checkpoint` into the new folder `target`; returns a line that says what was written.

    Args:
        checkpoint: of this project, a file or a folder.
        target: will be a complete export, or not exist.
        dtype: of the weights; None: as trained.
        tokenizer: folder or hub name, or the tokenizer itself; None: the run's own.
        run: the run's folder, for tokenizer and model card; None: the one that contains the checkpoint.
        max_file_bytes: size of a weight file. Takes up to three times that in memory, plus three times the largest
            tensor of a sharded checkpoint.

    Raises:
        ConfigError: the target exists, the checkpoint is damaged or contains another model than its settings say, or
            the tokenizer is not the one that it was trained with.
    """
    checkpoint, target = (Path(os.path.expanduser(path)) for path in (checkpoint, target))  # from Python: strings
    setting = f"export: CKPT {checkpoint}"
    check_target(target, "export: DIR")
    saved = read_checkpoint(str(checkpoint), "export: CKPT")
    require_undamaged(str(checkpoint), "export: CKPT")
    model = _on_meta(saved, setting)
    weights = _described(saved["state_dict"], dtype)
    check_same_model(model.state_dict(), weights, f"{setting} contains another model than its settings say")
    run = run or checkpoint.absolute().parent.parent
    own = run / "tokenizer" if (run / "tokenizer").is_dir() else None
    words = _tokenizer(saved, model, own if tokenizer is None else tokenizer)

    def read(names: list[str]) -> dict[str, Tensor]:
        state = read_checkpoint(str(checkpoint), "export: CKPT")["state_dict"]  # again: frees what was mapped before
        return {name: state[STUDENT + name].to(weights[name].dtype) for name in names}

    with _whole_folder(target) as folder:
        num_files = _write_weights(model, weights, read, folder, max_file_bytes)
        model.config.dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
        _write_settings(model, words, folder)
        place = None if words is None else _write_tokenizer(words, folder)
        logged = lineage.whole(read_run(run, run.name)) if any(run.glob("*tfevents*")) else None
        card = model_card(target.name, saved, model, logged, place)
        (folder / "README.md").write_text(card, encoding="utf-8")
        verify(folder)
    rest, by = own_parts(saved["state_dict"]), own_class(saved)
    num_parameters, kind = sum(p.numel() for p in model.parameters()), str(model.config.dtype).removeprefix("torch.")
    return (
        f"{target}: {num_parameters:,} parameters in {kind}, {num_files} file{'s' if num_files > 1 else ''} of "
        f"weights, model card, {'tokenizer' if words else f'no tokenizer (none in {run}; give one with --tokenizer)'}"
        + (f" in {target / place} (beside a {model.config.model_type} transformers would misread it)" if place else "")
        + (f"; left out, not part of the model: {few(rest)}" if rest else "")
        + (f"; what {by} changes inside the model is not exported" if by else "")
    )


_MOST_NAME_BYTES = 210  # while it is written, its name is 38 bytes longer; file systems take 255


def check_target(target: Path, setting: str) -> None:
    """Raises ConfigError if `target` exists, as nothing is ever overwritten, or if it cannot be a folder's name."""
    if wrong := wrong_path(target):
        raise ConfigError(f"{setting} {target} {wrong}")
    if target.exists() or target.is_symlink():
        raise ConfigError(f"{setting} {target} exists already; choose another name or remove it")
    if len(os.fsencode(target.name)) > _MOST_NAME_BYTES:
        raise ConfigError(f"{setting} {target}: its name is longer than {_MOST_NAME_BYTES} bytes; choose a shorter one")


# --- what is in a checkpoint ---


def _on_meta(saved: dict[str, Any], setting: str) -> PreTrainedModel:
    """The student without its weights."""
    spec = of_checkpoint(saved, setting)
    with as_config_error(f"{setting}: transformers cannot build its {spec.family}"), torch.device("meta"):
        model = from_config(AutoConfig.for_model(spec.family, **spec.config))
    model.config.architectures = [type(model).__name__]
    return model


def _described(state: Any, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Name -> tensor on the meta device, in the dtype to be written."""
    found = {}
    for name in state:
        if name.startswith(STUDENT):
            tensor = state.on_meta(name) if isinstance(state, Tensors) else state[name].to("meta")
            found[name.removeprefix(STUDENT)] = tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor
    return found


def _tokenizer(
    saved: dict[str, Any], model: PreTrainedModel, given: str | Path | PreTrainedTokenizerBase | None
) -> PreTrainedTokenizerBase | None:
    """The tokenizer, or that of a name, which must be the one that the student was trained with."""
    if given is None:
        return None
    if isinstance(given, str | Path):
        tokenizer, name = load_tokenizer(str(given), "export: --tokenizer"), f" {given}"
    else:
        tokenizer, name = deepcopy(given), ""  # its padding token may be set below
    trained_with = saved.get("tokenizer")
    if len(tokenizer) > model.config.vocab_size or trained_with not in (None, tokenizer_fingerprint(tokenizer)):
        raise ConfigError(
            f"export: --tokenizer{name} is not the one that this student was trained with: its "
            f"{len(tokenizer)} token ids mean something else; use the run's own, RUN/tokenizer"
        )
    return tokenizer


# --- what is written ---


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target`, renamed to it when all of its contents have reached the disk."""
    _delete_leftovers(target)
    partial, made, held = target.with_name(f".{target.name}.{uuid4().hex}.tmp"), False, None
    try:
        while not made:
            partial.mkdir(parents=True)
            with suppress(FileNotFoundError):  # until it is held, another export may take it for a leftover
                held = _hold(partial, wait=True)
                made = partial.exists()
                if held is not None and not made:
                    os.close(held)
                    held = None
        yield partial
        for path in (*partial.rglob("*"), partial):
            sync_folder(path)
        partial.rename(target)
        sync_folder(target.parent)
    except OSError as error:
        read_from = made and error.filename is not None and not str(error.filename).startswith(str(partial))
        if read_from or isinstance(error, UnansweredError):  # the checkpoint
            raise
        raise failed_write(target, error.strerror or first_line(error), error.errno) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if held is not None:
            os.close(held)


def _delete_leftovers(target: Path) -> None:
    """Deletes the unfinished copies of a model that killed exports to `target` have left."""
    for left in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 32}.tmp"):
        with suppress(OSError):
            if (held := _hold(left)) is not None:
                try:
                    shutil.rmtree(left)
                finally:
                    os.close(held)
                rank_zero_info(f"export: deleted {left}, which an export that was killed had left")


def _hold(folder: Path, wait: bool = False) -> int | None:
    """Locks a folder until the returned descriptor is closed or the process dies. None: it is locked, or cannot be."""
    held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(held)
        return None
    return held


def _write_weights(
    model: PreTrainedModel,
    weights: dict[str, Tensor],
    read: Callable[[list[str]], dict[str, Tensor]],
    folder: Path,
    max_file_bytes: int,
) -> int:
    """Writes safetensors files, with an index if there are several; returns their number. Tied weights appear once."""
    once = {name: tensor for name, tensor in weights.items() if name not in model.all_tied_weights_keys}
    plan = split_torch_state_dict_into_shards(once, max_shard_size=max_file_bytes)
    place: dict[str, str] = {}
    for file, names in plan.filename_to_tensors.items():
        place |= dict.fromkeys(_write_file(model, read(names), folder / file), file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": place}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True))
    return len(plan.filename_to_tensors)


def _write_file(model: PreTrainedModel, weights: dict[str, Tensor], path: Path) -> list[str]:
    """Writes weights under the hub's names, for some families split as on the hub; returns those names."""
    parts = {name: part.contiguous() for name, part in revert_weight_conversion(model, weights).items()}
    try:
        save_file(parts, path, metadata={"format": "pt"})
    except SafetensorError as error:  # e.g. a full disk
        found = re.search(r"\(os error (\d+)\)", str(error))
        raise OSError(*((int(found[1]), os.strerror(int(found[1]))) if found else (first_line(error),))) from error
    return list(parts)


_OF_CODE = ("auto_map", "custom_pipelines", "quantization_config")


def _write_settings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, folder: Path) -> None:
    """Writes config.json and generation_config.json with the tokenizer's special tokens, the padding token only into
    the latter: some families compute more with it than padding.

    Sets the padding token of a tokenizer that has none, and a maximum length that is not above the model's.
    """
    config = deepcopy(model.config)
    text = config.get_text_config()  # of a composite model, another
    if type(model).__module__.startswith("transformers.models."):  # whoever loads it needs nobody's code
        for part, name in product((config, text), _OF_CODE):
            part.__dict__.pop(name, None)
    special = {
        name: next((token for part in (config, text) if (token := getattr(part, name, None)) is not None), None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    if tokenizer is not None:
        named = {name: token for name in special if (token := getattr(tokenizer, name)) is not None}
        if isinstance(stops := special["eos_token_id"], list) and named.get("eos_token_id") in stops:
            del named["eos_token_id"]  # a chat model also stops at the end of a turn
        special |= named
        pad_id, length = special["pad_token_id"], getattr(model.config, "max_position_embeddings", None)
        if tokenizer.pad_token_id is None and pad_id in special_ids(tokenizer):  # an ordinary token also occurs in text
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_id)
        if length and tokenizer.model_max_length > length:
            tokenizer.model_max_length = length
    GenerationConfig(**special).save_pretrained(folder)
    for part in (config, text):
        for name in ("bos_token_id", "eos_token_id"):  # fresh models have EOS for both
            own, token = getattr(part, name, None), special[name]
            if token is not None and not (isinstance(own, list) and (tokenizer is None or token in (own, *own))):
                setattr(part, name, token)
    config.save_pretrained(folder)
    old_names.rewrite(folder / "config.json", lambda settings: settings | old_names.config_names(config))
    for path in folder.glob("*.safetensors"):  # safetensors writes them for their owner only
        with suppress(PermissionError):  # of a file system that has one mode for all
            path.chmod((folder / "config.json").stat().st_mode)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    """Writes it beside the model, or into a subfolder if transformers would ignore its files there; returns which."""
    apart = folder / SUBFOLDER
    tokenizer.init_kwargs.pop("auto_map", None)  # code that was not run here
    for place in (apart, folder):
        old_names.save_tokenizer(tokenizer, place)
    with suppress(Exception):  # the family's own tokenizer may lack files here
        if rules_fingerprint(AutoTokenizer.from_pretrained(folder)) == rules_fingerprint(tokenizer):
            shutil.rmtree(apart)
            return ""
    for path in apart.iterdir():
        (folder / path.name).unlink()
    return SUBFOLDER


def verify(folder: Path) -> None:
    """Asserts that the files contain exactly the weights, by name and shape, that config.json asks for."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    # all weights at once, as in save_pretrained: shows a family in which splitting needs several of them together
    once = {name: tensor for name, tensor in model.state_dict().items() if name not in model.all_tied_weights_keys}
    wanted = {name: tuple(tensor.shape) for name, tensor in revert_weight_conversion(model, once).items()}
    found: dict[str, tuple[int, ...]] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert found == wanted, f"{folder}: {sorted(found.items() ^ wanted.items())[:3]}"


def main(argv: list[str]) -> int:
    """`export CKPT DIR [--dtype D] [--tokenizer T]`: writes the folder, and prints what it contains."""
    parser = VerbParser("export", description="Write a checkpoint's student as a Hugging Face folder.")
    parser.add_argument("checkpoint", metavar="CKPT", type=Path, help="runs/NAME/checkpoints/step-XXXXXXXX.ckpt")
    parser.add_argument("target", metavar="DIR", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--dtype", choices=list(DTYPES), help="dtype of the weights (default: as trained)")
    parser.add_argument(
        "--tokenizer", metavar="T", help="folder or hub name (default: the run's own, runs/NAME/tokenizer)"
    )
    args = parser.parse_args(argv)
    if writes_elsewhere():
        print("export: skipped here, the first process writes it")
        return 0
    written = export(args.checkpoint, args.target, DTYPES.get(args.dtype), args.tokenizer)
    print(f"written: {printable(written)}")
    return 0
