"""The model card of an exported student: what was trained, on which text, for how long, and at which cost."""

import math
import re
from contextlib import suppress
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, get_args

import yaml
from transformers import PreTrainedModel
from transformers.utils import cached_file

from salt_lightning.comparison import lineage, report
from salt_lightning.errors import printable
from salt_lightning.fit.meter import Totals
from salt_lightning.flops import active_parameters, num_parameters
from salt_lightning.run.run_folder import same_setting
from salt_lightning.run.runlog import Run, changes_said
from salt_lightning.schedule import KDSchedule, Shape, trained_schedule

_SIZES = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size"),
    *("moe_intermediate_size", "num_experts", "num_experts_per_tok"),
    *("vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)
_PACKAGES = ("salt-lightning", "torch", "lightning", "transformers", "tokenizers")


def model_card(
    name: str, checkpoint: dict[str, Any], model: PreTrainedModel, run: Run | None, tokenizer: str | None
) -> str:
    """README.md of an exported folder: front matter for the hub, then what is known about the training.

    `name`: of the folder. `run`: None if not known. `tokenizer`: its subfolder, "" beside the card; None without one.
    """
    run = _as_trained(checkpoint, run)
    taught = _is_taught(checkpoint, run)
    text = checkpoint["text"]
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["salt-lightning", *(["knowledge-distillation"] if taught else [])],
    }
    if text.get("hub"):
        front["datasets"] = text["hub"]
    if started := _hub_name(run.config.get("model.student.path")):
        front["base_model"] = started
    rows = {**_student(model, run), **_training(checkpoint, run), **_cost(checkpoint, run)}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---",
        f"# {name}",
        f"A causal language model {'fine-tuned on responses' if _examples(run.config) else 'pretrained'} "
        f"{'with the help of a teacher ' if taught else ''}by salt_lightning"
        + (" (SALT: [arXiv 2410.18779](https://arxiv.org/abs/2410.18779))." if taught else "."),
        _how_to_load(name, tokenizer),
        "## Training",
        _list(rows),
        _figures("Validation", "val/", checkpoint["global_step"], run),
        _figures("Test", "test/", checkpoint["global_step"], run),
        "License: not stated.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _is_taught(checkpoint: dict[str, Any], run: Run) -> bool:
    """Whether a teacher took part, even if a later start of the run left it out."""
    return run.kd_steps > 0 or checkpoint.get("totals", {}).get("taught_steps", 0) > 0


def _how_to_load(name: str, tokenizer: str | None) -> str:
    classes, lines = "AutoModelForCausalLM", [f'model = AutoModelForCausalLM.from_pretrained("{name}")']
    if tokenizer is not None:
        rest = f', subfolder="{tokenizer}")  # transformers would misread it beside the model' if tokenizer else ")"
        classes += ", AutoTokenizer"
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}"{rest}')
    where = f"# {name}: this folder's path, or its name on the hub"
    return "\n".join(["```python", f"from transformers import {classes}", "", where, *lines, "```"])


def _as_trained(checkpoint: dict[str, Any], run: Run | None) -> Run:
    """The run with the settings in the checkpoint: config.yaml may be from a later start."""
    spec = checkpoint["hyper_parameters"]
    schedule = trained_schedule(checkpoint) or KDSchedule(weight=0.0)
    known = {"model.teacher.path": (spec.get("teacher") or {}).get("path")}
    known |= {f"kd.{key}": value for key, value in asdict(schedule).items()}
    known["kd.stop_margin"] = (checkpoint.get("kd_schedule") or {}).get("stop_margin")
    if run is None:
        return Run("", Path(), known, {})
    config, earlier = run.settings_until(checkpoint["global_step"])
    return replace(run, config=config | known, earlier=earlier, lost="")  # its own totals know of a teacher


def _student(model: PreTrainedModel, run: Run) -> dict[str, str]:
    config = model.config
    sizes = {size: getattr(config, size, None) for size in _SIZES}
    others = (getattr(config, name, None) for name in ("num_local_experts", "n_routed_experts"))
    sizes["num_experts"] = sizes["num_experts"] or next(filter(None, others), None)
    count, active = num_parameters(model), active_parameters(model)
    return {
        "student": f"{config.model_type}, {count:,} parameters"
        + (f", {active:,.0f} active per token" * (active < count)),
        "sizes": ", ".join(f"{size} {value}" for size, value in sizes.items() if value is not None),
        "started from": run.config.get("model.student.path") or "",
        "weights": str(config.dtype).removeprefix("torch."),
    }


def _training(checkpoint: dict[str, Any], run: Run) -> dict[str, str]:
    settings, spec, text = run.config, checkpoint["hyper_parameters"], checkpoint["text"]
    taught = _is_taught(checkpoint, run)
    by = own_class(checkpoint)
    counts = [(text.get(unit), unit) for unit in ("documents", "tokens")]
    return {
        "resumed": "; ".join(changes_said(run)),
        "trained by": f"the class {by}; what it does otherwise than SALTModule is not known" if by else "",
        "method": run.method + ("" if taught == (run.kd_steps > 0) else ", after steps with a teacher"),
        "teacher": ", then ".join(_teachers(checkpoint, run)) if taught else "",
        "KD": f"{_schedule(checkpoint, run)}; teacher temperature {spec.get('teacher_temperature', 1.0):g}"
        if taught
        else "",
        "training text": _sources(text),
        "prompt and response": _examples(settings),
        "text size": ", ".join(f"{count:,} {unit}" for count, unit in counts if count),
        "selected by": _selection(run.selecting),
        "rows": f"{_data(checkpoint, 'global_batch_size')} of {_data(checkpoint, 'block_size')} tokens per step",
        _optimizer(checkpoint): ", ".join(
            f"{key} {v}" for key, v in (spec.get("optim") or {}).items() if v is not None
        ),
        "weights averaged by": _averaged_by(checkpoint),
        "precision": str(settings.get("trainer.precision") or ""),
        "seed": str(spec.get("seed", "")),
    }


def _teachers(checkpoint: dict[str, Any], run: Run) -> list[str]:
    """The teachers that a run has learned from, in order; revision and commit are known of the newest."""
    newest = checkpoint["hyper_parameters"].get("teacher") or {}
    weights = str(checkpoint["trainer"].get("--model.teacher.weights", ""))
    known = {"revision": newest.get("revision"), "commit": weights if len(weights) == 40 else None}
    said = ", ".join(f"{name} {value}" for name, value in known.items() if value)
    path = str(newest.get("path") or "")
    return [f"{one} at {said}" if said and same_setting(one, path) else one for one in run.teachers]


def _selection(settings: dict[str, Any]) -> str:
    """The scores and the rule by which phase 1's rows were chosen."""
    if not (scores := settings.get("data.selection")):
        return ""
    rule = {key.removeprefix("data.keep."): v for key, v in settings.items() if key.startswith("data.keep.")}
    rule.pop("max_repeats", None)  # only a limit
    return ", ".join([str(scores), *(f"{key} {value}" for key, value in rule.items() if value is not None)])


def _averaged_by(checkpoint: dict[str, Any]) -> str:
    """The callback that averaged the weights, by the name under which it saves its state."""
    if "current_model_state" not in checkpoint:
        return ""
    names = [re.split(r"[{(]", key)[0] for key in checkpoint.get("callbacks", {})]
    return next((name for name in names if name.endswith("Averaging")), "a WeightAveraging callback")


def _sources(text: dict[str, Any]) -> str:
    names, weights = text.get("source") or [], text.get("weights") or []
    if not weights:
        return ", ".join(names)
    return ", ".join(f"{name} {weight / sum(weights):.1%}" for name, weight in zip(names, weights, strict=True))


def _examples(settings: dict[str, Any]) -> str:
    """How prompts were written if the text was examples: users of the model must write them in the same way."""
    prompt, response = (settings.get(f"data.examples.{name}") for name in ("prompt", "response"))
    if prompt:
        return f"{prompt!r}, {response!r}"
    chats = any(key.startswith("data.examples.messages") and v for key, v in settings.items())
    return "by the tokenizer's chat template" if chats else ""


def _schedule(checkpoint: dict[str, Any], run: Run) -> str:
    weight, steps, anneal = (run.config.get(f"kd.{key}") for key in ("weight", "steps", "anneal_steps"))
    ramp = f", falling ({run.config['kd.shape']}) in the last {anneal} of them" if anneal else ""
    said = f"weight {weight} in " + ("every step" if steps is None else f"the first {steps} steps{ramp}, then 0")
    if (margin := run.config.get("kd.stop_margin")) is not None:
        found = checkpoint.get("kd_stop_step") is not None
        said += f", {'ended by a validation within' if found else 'with no validation within'} a margin of {margin} "
        said += "nats of the teacher's loss"
    schedule, shape = trained_schedule(checkpoint), (checkpoint.get("kd_schedule") or {}).get("shape")
    if schedule and shape not in get_args(Shape):
        said += f", by a custom schedule ({shape})"
    counted = checkpoint.get("totals")
    if schedule and counted and counted["taught_steps"] != schedule.kd_steps(checkpoint["global_step"]):
        said += "; an earlier start of the run followed another schedule"
    return said


def _cost(checkpoint: dict[str, Any], run: Run) -> dict[str, str]:
    step, text_tokens = checkpoint["global_step"], _data(checkpoint, "num_train_tokens")
    totals = Totals(**checkpoint.get("totals", {}))
    tokens, taught = totals.tokens, totals.taught_steps
    by_student = totals.student_flops or math.nan  # 0: not counted, trained without the command line's data
    by_teacher = (totals.teacher_flops or math.nan) if taught else 0.0
    planned = f" of {run.max_steps:,}" if run.max_steps else ""
    mixed = checkpoint["text"].get("weights") or any("data.source" in was for was in run.changes.values())
    of_one_text = text_tokens and not mixed and not _examples(run.config)  # rows of examples are not full
    passes = f" ({tokens / text_tokens:.2f} times the text)" if of_one_text else ""
    scoring = lineage.scoring(run)[0] if run.scores else 0.0
    return {
        "steps": f"{step:,}{planned}" + (f", {taught:,} of them with the teacher" if taught else ""),
        "tokens": f"{tokens:,}{passes}" if tokens else "",
        "FLOPs of the student": _flops(by_student),
        "FLOPs of the teacher": _flops(by_teacher) + (", without its own training" if taught else ""),
        "FLOPs of scoring": _flops(scoring),
        "exported with": _versions(),
    }


def own_class(checkpoint: dict[str, Any]) -> str:
    """The subclass of SALTModule that trained it; empty if there was none."""
    name = str(checkpoint.get("module_class", "SALTModule"))
    return "" if name == "SALTModule" else name


def _optimizer(checkpoint: dict[str, Any]) -> str:
    """OptimSpec builds AdamW; of a subclass only the name is known."""
    name = checkpoint.get("optim_class", "OptimSpec")
    return "AdamW" if name == "OptimSpec" else f"optimizer and schedule of {name}"


def _data(checkpoint: dict[str, Any], name: str) -> int:
    return checkpoint["data"].get(f"--data.{name}") or 0


def _flops(value: float) -> str:
    scale, unit = report.flop_unit(value)
    return "not known" if math.isnan(value) else f"{value / scale:.4g} {unit}"


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):  # run from its folder, not installed
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def _figures(of: str, prefix: str, step: int, run: Run) -> str:
    """The last figures up to the checkpoint's step."""
    curves = {tag.removeprefix(prefix): curve for tag, curve in run.curves.items() if tag.startswith(prefix)}
    at = max((int(s) for curve in curves.values() for s in curve.steps if s <= step), default=None)
    if at is None:
        return ""
    figures = {}
    for tag, curve in sorted(curves.items()):
        found = curve.values[curve.steps == at]
        if len(found):
            figures[tag] = format(found[0], ",.0f" if tag in ("tokens", "examples") else ".4f")
    return f"## {of} after step {at:,}\n\n" + _list(figures)


def _list(rows: dict[str, str]) -> str:
    """A list in which text from files and settings stays plain text: one line each, without HTML or links."""
    lines = (f"{name}: {value}" for name, value in rows.items() if value)
    return "\n".join("- " + printable(re.sub(r"[\\<\[`]", r"\\\g<0>", line)) for line in lines)


def _hub_name(path: str | None) -> str | None:
    """`path` if it is a hub name. The hub's cache on this machine tells it from a folder that is not here."""
    if path is None or path.endswith(".ckpt") or Path(path).exists():
        return None
    try:
        return path if cached_file(path, "config.json", local_files_only=True) else None
    except OSError:
        return None
