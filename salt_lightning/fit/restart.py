"""Resuming from a checkpoint: whether it fits this student and text, and what will differ from there on."""

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from salt_lightning.command.settings import as_yaml
from salt_lightning.errors import ConfigError, few, printable
from salt_lightning.fit import alike
from salt_lightning.fit.optim import OptimSpec
from salt_lightning.hugging_face import token_ids
from salt_lightning.hugging_face.spec import ModelSpec, check_positions, fresh_config, setting_of, shape_settings
from salt_lightning.models import CausalLM, check_path, own_parts, read_checkpoint
from salt_lightning.preflight import Finding
from salt_lightning.storage import shards
from salt_lightning.text.documents import Corpus
from salt_lightning.text.sources import Hub, resolve


def require_same(
    checkpoint: dict[str, Any], module: str, student: dict[str, Any], data: Any, weights: Callable[[], Container[str]]
) -> None:
    """Raises ConfigError unless a checkpoint holds that student, trained with the tokenizer of `data`, if known; says
    so if another class than `module` trained it.

    Parts that a subclass added to the student must be among the module's `weights`, which are requested only if there
    are such parts, or another class: under FSDP1 even their names would gather them.
    """
    state = checkpoint.get("state_dict", ())
    parts, trained_by = own_parts(state), printable(str(checkpoint.get("module_class", module)))[:80]
    there = weights() if parts or trained_by != module else ()
    of_transformers = checkpoint["hyper_parameters"]["student"]["config"]
    if of_transformers and (lost := [name for name in parts if name not in there]):
        raise ConfigError(
            f"the checkpoint holds parts that a subclass of SALTModule added ({few(lost)}); resume in Python with that "
            "class, or export the checkpoint, which leaves them out"
        )
    if trained_by != module:
        of_class = f"the checkpoint was trained by the class {trained_by}, not {module}"
        if lost := [name for name in state if name.startswith("student.") and name not in there]:
            raise ConfigError(f"{of_class}, and its student has other weights ({few(lost)}); use that class, in Python")
        missing = "the loss of its own, or what it changes in the student, is not here"
        rank_zero_info(of_class if trained_by == "SALTModule" else f"{of_class}: {missing}, if it has any")
    token_ids.require_same_tokenizer(checkpoint, data)
    saved, now = (shape_settings(spec) for spec in (checkpoint["hyper_parameters"]["student"], student))
    rows = None if (width := getattr(data, "block_size", 0)) == checkpoint["data"].get("--data.block_size") else width
    names = {key: setting_of(key, now.get(key), rows) for key in saved if saved[key] != now.get(key)}
    if names:
        changed = (f"{name} {as_yaml(now.get(key))} (checkpoint: {as_yaml(saved[key])})" for key, name in names.items())
        remedy = (
            "use the checkpoint's values, or start a new --run from its weights with --model.student.path CHECKPOINT"
        )
        if path := student["path"]:  # whose sizes no setting changes
            remedy = "leave that out (null), or choose another --run to train it"
        than = f" than --model.student.path {path}" if path else ""
        raise ConfigError(f"the checkpoint holds another student{than}: {', '.join(list(changed)[:5])}; {remedy}")


def replace_lost_start(module: Any, path: str | None) -> None:
    """Where the weights that the student started from are gone, a fit that resumes builds it from the checkpoint.

    For the command line: a Trainer tells the path of its checkpoint only after the models are built.
    """
    spec = module.student_spec
    if path and spec.path and not Path(spec.path).exists() and not _is_on_hub(spec):
        rank_zero_info(f"--model.student.path {spec.path} is gone: the student is built from the checkpoint, {path}")
        module.student_spec = replace(spec, path=str(path), revision=None)


def _is_on_hub(spec: ModelSpec) -> bool:
    """Whether the hub, or its cache, has a model that is not here."""
    folder = Path(spec.path or "").parent
    if spec.is_local or (folder.name != "" and folder.is_dir()):  # else an owner on the hub
        return False
    try:
        check_path(spec, "student")
    except ConfigError:  # removed, no longer allowed, or no network
        return False
    return True


def go_on_from(
    checkpoint: dict[str, Any], trainer: pl.Trainer, data: Any, optim: OptimSpec, hparams: Mapping[str, Any]
) -> None:
    """Makes a fit resume right after the checkpoint's optimizer step; reports if it will read other rows, or compute
    steps differently.

    A checkpoint may come from inside an accumulation window, from the end of a validation, or from a run with
    another accumulation; the position in a SALTDataModule depends only on the step, and so do Lightning's counters
    here. The position in a user's own loader (`data` None) is what Lightning saved, in micro-batches. `hparams`: of the
    module.

    Raises:
        ConfigError: the run would end before that step, or the checkpoint holds only weights.
    """
    shards.require_whole(checkpoint)
    step, max_steps = checkpoint["global_step"], trainer.max_steps
    # for the record of a run that needs the teacher no more
    of_teacher = {name: value for name, value in checkpoint["trainer"].items() if name in alike.TEACHER}
    trainer.lightning_module._teacher_weights = of_teacher  # type: ignore[assignment]
    if step > max_steps:
        raise ConfigError(f"--trainer.max_steps {max_steps}: the checkpoint is already at step {step}")
    if data is not None:
        done = step * trainer.accumulate_grad_batches
        counts = {"ready": done, "started": done, "processed": done, "completed": max(done - 1, 0)}
        loop = checkpoint["loops"]["fit_loop"]
        loop["epoch_loop.batch_progress"] |= {"total": dict(counts), "current": dict(counts), "is_last_batch": False}
        loop["epoch_loop.state_dict"]["_batches_that_stepped"] = max(step - 1, 0)
        data.go_on_from(checkpoint)
    now, key, texts = alike.identity(data), _SELECTION, (getattr(data, "text", {}), checkpoint["text"])
    if getattr(data, "_order", True) is None:  # check plans none
        now.pop(key)
    examples = [text.get("examples", {}) for text in texts]
    ours, theirs = examples if all(examples) else ({}, {})  # older checkpoints do not record them
    other = [f"other --data.examples.{name}" for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    weights, old_weights = (text.get("weights") for text in texts)
    if weights != old_weights and now.get(key) != checkpoint["data"].get(key):
        other.append(f"--data.source_weights {as_yaml(weights)} (checkpoint: {as_yaml(old_weights)})")
        if not getattr(data, "selection", None):  # nothing else is in the hash
            now.pop(key, None)
    other += [_other(key, now[key], was) for key, was in checkpoint["data"].items() if now.get(key, was) != was]
    if other:
        rank_zero_info(f"continuing with other data than the checkpoint's: {', '.join(other)}")
    if step > 0 and data is not None:
        _say_what_may_come_again(checkpoint["data"], now, data)
    for said in filter(None, (alike.other_steps(checkpoint, trainer, hparams), optim.jump(checkpoint, max_steps))):
        rank_zero_info(printable(said))  # with values from the checkpoint


def _say_what_may_come_again(saved: Mapping[str, Any], now: Mapping[str, Any], data: Any) -> None:
    """Reports rows that the run may read again. `saved`, `now`: `alike.identity` in the checkpoint and of `data`."""
    before = saved.get("--data.train_fingerprint")  # 0: of a loader of the user's own
    if before and saved.get("--data.seed", data.seed) != data.seed:
        rank_zero_info("data: with another --data.seed the rows are in another order, so they may be read again")
    if (was := saved.get(_SELECTION)) is None or now.get(_SELECTION, was) == was:
        return
    if now[_SELECTION] == "none":
        rank_zero_info("data: without --data.selection the rows are in another order, so they may be read again")
    elif data.selection and data.keep.unread_first:
        rank_zero_info(
            "selection: unread are the rows that phase 1 would not read under these settings; those that it has read "
            "under others may come again before them"
        )


def require_fitting(module: Any) -> None:
    """Compares a trained student with the data of this start, once all that is loaded is loaded: it may have been in
    memory, from `load_from_checkpoint` or an earlier fit.

    Raises:
        ConfigError: it was trained with another tokenizer, or has too few positions.
    """
    data, trained_on = module._data, module._trained_on
    if data is None or not trained_on:
        return
    if isinstance(module.student, CausalLM):
        check_positions(module.student.model.config, "the student's max_position_embeddings", data)
    token_ids.require_same_tokenizer(trained_on, data, "student")
    if module.trainer.state.fn != TrainerFn.FITTING:
        _say_other_share(trained_on, data)


def check_evaluated(module: Any, data: Any, path: str | None) -> None:
    """Raises ConfigError if the student of an evaluation is not there, or has too few positions for the data's rows.

    Needs no text, whose preparation takes minutes. `path`: of the checkpoint that it is from, if it is from one.
    """
    spec = module.student_spec
    if path is None:
        check_path(spec, "student")
    elif spec.config and spec.path is None:  # else not a model of transformers, or from weights elsewhere
        fresh_config(spec, data, before_text=True)


def about_training(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """What `require_fitting` compares."""
    return {name: checkpoint.get(name) for name in ("tokenizer", "data", "text")}


def about_start(spec: ModelSpec) -> dict[str, Any] | None:
    """The same for a student that starts from a run's checkpoint; the ids of its tokenizer are compared to build it."""
    if not spec.is_checkpoint:
        return None
    return about_training(read_checkpoint(str(spec.path), "--model.student.path")) | {"tokenizer": None}


def _say_other_share(checkpoint: Mapping[str, Any], data: Any) -> None:
    """Warns if an evaluation reads documents of the training text that the run did not hold out."""
    setting, text, said = data.held_out_by, checkpoint["text"], ""
    part = Hub(**text["part"]) if "part" in text else data.hub  # older checkpoints do not record it
    try:
        groups = resolve("--data.source of the run", text.get("source") or [], part)
    except ConfigError:  # some of it is no longer there
        return
    trained_on, read, now = (corpus.read() for corpus in (Corpus("", groups), *map(data._corpus, (setting, "source"))))
    share, common = data._val_share(setting), trained_on.keys() & read.keys()
    held_out = text.get("val_share", share)  # older checkpoints do not record it
    # the tokens tell of other settings that decide what is held out; those of files in another order are others
    same_text = share == held_out and [*trained_on] == [*read]
    other_tokens = same_text and data.held_out.tokens not in checkpoint["data"]["--data.held_out"]
    if setting == "source" and (other_tokens or (common and share > held_out)):  # a smaller share is a part of it
        said = "this share of --data.source is not the one that the run held out"
    elif seen := common - now.keys():  # what is in --data.source, too, is reported with that
        said = f"--data.{setting} has text of the run's own --data.source ({few(sorted(read[key] for key in seen))})"
    if said:
        other = "test_source" if setting == "test_source" else "val_source"
        remedy = f"use the run's own --data settings (its config.yaml), or other text with --data.{other}"
        Finding("warning", "held-out text", f"{said}, so the run has trained on it", remedy).require()


_SELECTION = "--data.selection_fingerprint"
# entries that are not settings, and the settings that determine them
_SAID_BY = {
    "--data.num_train_tokens": "tokens of --data.source",
    "--data.train_fingerprint": "training text (--data.source)",
    _SELECTION: "rows of phase 1, or shares (--data.selection, keep, source_weights, --kd.steps)",
    "--data.difficulty_fingerprint": "thirds (--data.difficulty)",
    "--data.held_out": "held-out text or rows",
}


def _other(key: str, now: Any, was: Any) -> str:
    name = _SAID_BY.get(key, key)
    return f"{name} {as_yaml(now)} (checkpoint: {as_yaml(was)})" if isinstance(now, int) else f"other {name}"
