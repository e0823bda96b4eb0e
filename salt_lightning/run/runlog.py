"""Reads a run's folder: its settings and the logged curves that compare needs. NaN: not known."""

import json
import math
import os
import re
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from salt_lightning.errors import ConfigError
from salt_lightning.run.curves import Curve, read_curves
from salt_lightning.run.run_folder import (
    changed,
    earlier_configs,
    interval_steps,
    read_config,
    same_setting,
    step_named,
    without_watchers,
)

AXES = ("steps", "tokens", "FLOPs", "seconds")


@dataclass(frozen=True, eq=False)
class Run:
    """One run's folder: its settings with dotted names, what it logged, and which of its files are damaged."""

    name: str
    path: Path
    config: dict[str, Any]
    curves: dict[str, Curve]
    damaged: tuple[str, ...] = ()
    earlier: tuple[tuple[int, dict[str, Any]], ...] = ()  # (step, settings until that step) of earlier starts, in order
    lost: str = ""  # the checkpoint that it started from, if the run that wrote that is not found
    trunk: tuple[tuple[int, Path], ...] = ()  # (step, folder of the run that it continued until that step), in order

    @property
    def seed(self) -> int | None:
        return self.config.get("seed_everything")

    @property
    def seeds(self) -> dict[str, Any]:
        """The seeds of initial weights, dropout and data order: a run with other seeds is another sample."""
        own = {k: v for k, v in self.config.items() if k.endswith(".seed")}
        return own or ({} if self.seed is None else {"seed_everything": self.seed})

    @property
    def sample(self) -> str:
        """The seeds as text; one number if all are equal."""
        said = [f"{name} {seed}" for name, seed in sorted(self.seeds.items())]
        return ", ".join(said) if len(set(self.seeds.values())) > 1 else str(next(iter(self.seeds.values()), None))

    @property
    def max_steps(self) -> int | None:
        steps = self.config.get("trainer.max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None  # Lightning's -1 is "no limit"

    @property
    def _configs(self) -> list[dict[str, Any]]:
        """The settings of each start that changed them, in order."""
        return [*(config for _, config in self.earlier), self.config]

    @property
    def _starts(self) -> list[int]:
        """The step at which each of `_configs` began to apply, in order."""
        return [0, *(step for step, _ in self.earlier)]

    @property
    def _selections(self) -> list[dict[str, Any]]:
        """The settings of each start whose rows a selection chose, in order: those of phase 1, or, after it, which are
        left for phase 2."""
        ends = [config.get("kd.steps") for config in self._configs]
        return [
            config
            for start, end, config in zip(self._starts, ends, self._configs, strict=True)
            if config.get("data.selection")
            and (end is None or start < end or (end > 0 and config.get("data.keep.unread_first", True)))
        ]

    @property
    def selecting(self) -> dict[str, Any]:
        """The settings of the newest start that read selected rows; empty without one."""
        return next(reversed(self._selections), {})

    @property
    def selected(self) -> bool:
        return bool(self.selecting)

    @property
    def scores(self) -> list[str]:
        """The selections that it read rows of, in order, without random rows of all, which need no scores."""
        by_score = (c for c in self._selections if c.get("data.keep.order") != "random" or c.get("data.keep.drop_top"))
        return list(dict.fromkeys(str(config["data.selection"]) for config in by_score))

    @property
    def taught(self) -> list[tuple[float, dict[str, Any]]]:
        """(end of the steps with a teacher, settings) for each start that had such steps."""
        return [(end, config) for _, end, config in self._taught_from]

    @property
    def _taught_from(self) -> list[tuple[int, float, dict[str, Any]]]:
        """The same with the step from which on each had one; a teacher that has left may come back at a resume."""
        starts, found, stop = self._starts, [], None
        for start, end, config in zip(starts, [*starts[1:], math.inf], self._configs, strict=True):
            if any(key.startswith("kd.") for key in self.changed_at.get(start, ())):
                stop = None  # a margin's boundary holds until KD's settings change
            if (curve := self.curves.get("probe/stop_step")) is not None:
                stop = next((v for s, v in zip(curve.steps, curve.values, strict=True) if start < s <= end), stop)
            if config.get("model.teacher.path") and config.get("kd.weight"):
                steps = config.get("kd.steps")
                if config.get("kd.stop_margin") is not None and stop is not None:
                    steps = stop
                if (steps := min(end, math.inf if steps is None else steps)) > start:
                    found.append((start, steps, config))
        return found

    @property
    def teachers(self) -> list[str]:
        """Paths of the teachers that it used, in order; if none, of the one that its settings name, if any."""
        paths: list[str] = []
        for config in [config for _, config in self.taught] or [self.config]:
            path = str(config.get("model.teacher.path") or "")
            if path and not any(same_setting(path, other) for other in paths):
                paths.append(path)
        return paths

    @property
    def kd_steps(self) -> float:
        """n_KD over all starts: the end of the steps with a teacher, as set or as found by a margin.

        0 without a teacher, infinite if it never leaves, NaN if no start has one and what came before is not known.
        """
        return self.taught[-1][0] if self.taught else math.nan if self.lost else 0

    @property
    def method(self) -> str:
        """The name of the method with these settings, as in the README."""
        if not self.config or math.isnan(self.kd_steps):
            return "unknown"
        kd = self.taught[-1][1] if self.taught else {}
        shape = str(kd.get("kd.shape", "step")).replace("_", "-")
        order = self.selecting.get("data.keep.order", "highest")
        which = f", {order} rows" if self.selected and order != "highest" else ""
        if self.kd_steps == 0:
            plain = "CONTINUED" if self.config.get("model.student.path") else "BASELINE"
            return f"selection without KD{which}" if self.selected else plain
        if (margin := kd.get("kd.stop_margin")) is not None:
            shape += f", margin {margin:g}"
        elif self.kd_steps >= (self.max_steps or math.inf) and shape == "step":
            return f"RKD on selection{which}" if self.selected else "RKD"
        return f"SALT_DS {shape}{which}" if self.selected else f"SALT {shape}"

    @property
    def steps_done(self) -> int:
        return max((int(c.steps[-1]) for tag, c in self.curves.items() if not tag.startswith("test/")), default=0)

    @property
    def origin(self) -> str:
        """The checkpoint that its first start in this folder resumed from, if any; `last` is one of its own."""
        return str(self._configs[0].get("ckpt_path") or "")

    @property
    def began(self) -> int:
        """The step that it resumed from, if the log of the steps before is not in this folder; else 0."""
        step, first = step_named(self.origin), self.curves.get("train/tokens")
        if first is None:  # it may have been stopped before a logged step, but after a validation
            return step or 0
        if not self.origin or first.steps[0] <= 1:  # the first step is always logged
            return 0
        return int(min(curve.steps[0] for curve in self.curves.values())) - 1 if step is None else step

    def settings_until(self, step: int) -> tuple[dict[str, Any], tuple[tuple[int, dict[str, Any]], ...]]:
        """The settings that applied up to a step, and the entries of `earlier` before them."""
        before = tuple((until, config) for until, config in self.earlier if until < step)
        rest = self.earlier[len(before) :]
        return (rest[0][1] if rest else self.config), before

    @cached_property
    def changed_at(self) -> dict[int, dict[str, tuple[Any, Any]]]:
        """Step at which it was resumed with other settings -> setting -> (before, after)."""
        steps, configs = [step for step, _ in self.earlier], self._configs
        return dict(zip(steps, map(changed, configs, configs[1:]), strict=True))

    @cached_property
    def changes(self) -> dict[int, dict[str, tuple[Any, Any]]]:
        """`changed_at` without what had no effect any more: a teacher's path once the teacher has left."""
        found = {
            step: {k: v for k, v in settings.items() if k != "model.teacher.path" or step < self.kd_steps}
            for step, settings in self.changed_at.items()
        }
        return {step: settings for step, settings in found.items() if settings}

    @property
    def _validated_at_end(self) -> bool:
        """Whether, by the settings, the last step is followed by a validation."""
        every, steps = self.config.get("trainer.val_check_interval"), self.max_steps
        if every is None or steps is None or not isinstance(every, int | float) or every <= 0:
            return every is None
        interval = interval_steps(every, steps)
        return interval >= steps or steps % interval == 0

    @property
    def running(self) -> bool:
        """Whether steps are left, or the validation that its settings have after the last one."""
        if self.max_steps is None or self.steps_done == 0:
            return False
        return self.steps_done < self.max_steps or self.unvalidated

    @property
    def unvalidated(self) -> bool:
        """Whether the validation after its last step, which its settings ask for, is not in the log (yet)."""
        due = "trainer.val_check_interval" in self.config and self._validated_at_end
        ce = self.curves.get("val/ce")
        return due and ce is not None and bool(ce.steps[-1] < self.steps_done == self.max_steps)

    @property
    def finished(self) -> bool:
        """Whether it is at its last step, as far as is known, and was validated."""
        return not self.running and "val/ce" in self.curves

    @property
    def is_plain(self) -> bool:
        """Whether it is a BASELINE that never had a teacher, not even in an earlier start."""
        return self.method == "BASELINE" and not self.last("train/flops_teacher_total") > 0

    @cached_property
    def val_ce(self) -> Curve:
        """The validation losses from `measured_since` on: those before cannot be compared with them."""
        curve = self.curves.get("val/ce", Curve(np.array([], dtype=int), np.array([])))
        since = curve.steps >= self.measured_since
        return Curve(curve.steps[since], curve.values[since])

    @cached_property
    def measured_since(self) -> int:
        """The first validation on the same text as the last one, in rows as long, if not all of them are; else 0."""
        if "val/ce" not in self.curves:
            return 0
        at = [step + 1 for step, found in self.changes.items() if not found.keys().isdisjoint(CONTEXT)]
        return max((step for step in (*at, self.text_since) if step <= self.curves["val/ce"].steps[-1]), default=0)

    @cached_property
    def text_since(self) -> int:
        """The first validation on the same text as the last one, as far as the log shows, if not all are; else 0."""
        texts = list(self.measured("val").items())
        return max((step for (_, was), (step, now) in pairwise(texts) if differ(was, now)), default=0)

    def measured(self, kind: str) -> dict[int, tuple[float, float]]:
        """Step -> tokens and bytes of the text that each val or test loss was measured on; NaN: not known."""
        ce, tokens, bits = (
            dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)) if curve else {}
            for curve in (self.curves.get(f"{kind}/{name}") for name in ("ce", "tokens", "bits_per_byte"))
        )
        found = {}
        for step, value in ce.items():
            count = tokens.get(step, math.nan)
            found[step] = count, value * count / (bits.get(step, math.nan) * math.log(2) or math.nan)
        return found

    def last(self, tag: str) -> float:
        """The last value of a tag; of a validation or test, NaN if the last one did not log it."""
        kind, curve = tag.partition("/")[0], self.curves.get(tag)
        whole = self.curves.get(f"{kind}/ce") if kind in ("val", "test") else None
        if curve is None or (whole is not None and curve.steps[-1] < whole.steps[-1]):
            return math.nan
        return float(curve.values[-1])

    def total(self, tag: str, step: float) -> float:
        """One of CUMULATIVE after `step` optimizer steps, also between and after the logged ones."""
        return float(self._totals(tag, np.array([step]))[0])

    def _totals(self, tag: str, steps: np.ndarray) -> np.ndarray:
        if tag not in self.curves:
            return np.full(len(steps), 0.0 if tag == "train/flops_teacher_total" and self.kd_steps == 0 else math.nan)
        curve = self.curves[tag]
        if self.began > 0:  # before its log, perhaps trained with other settings
            steps = np.where(steps < curve.steps[0], math.nan, steps)
        if tag.endswith("time_s"):
            return curve.totals_at(steps)
        spans = [(0.0, math.inf)]  # the others grow with the tokens read, those of the teacher while it is there
        if tag == "train/flops_teacher_total":
            student = self.curves.get("train/flops_student_total", curve).steps
            after = student[student > curve.steps[-1]]  # the teacher had left when these were logged
            until = float(after[0]) if len(after) else math.inf
            spans = [(start, max(start, min(end, until))) for start, end, _ in self._taught_from]
            spans = spans or [(0.0, float(curve.steps[-1]))]
        both = np.append(curve.steps, steps)
        at = sum(self._tokens(both.clip(*span)) - self._tokens(np.array(span[:1])) for span in spans)
        return Curve(at[: len(curve.steps)], curve.values).totals_at(at[len(curve.steps) :])

    def _tokens(self, steps: np.ndarray) -> np.ndarray:
        """What is proportional to the tokens of the first `steps` steps."""
        known = [[c.get(f"data.{name}") for name in ("global_batch_size", "block_size")] for c in self._configs]
        sizes = np.array([[n if isinstance(n, int | float) else 1.0 for n in both] for both in known]).prod(1)
        if len(set(sizes)) == 1:
            return steps
        starts = np.array(self._starts)
        of_each = np.clip(steps[:, None] - starts, 0, [*np.diff(starts), math.inf])
        return of_each @ sizes

    def flops(self, step: float) -> float:
        return float(self.axis("FLOPs", np.array([step]))[0])

    def axis(self, axis: str, steps: np.ndarray) -> np.ndarray:
        """Optimizer steps -> one of AXES."""
        if axis == "steps":
            return steps.astype(float)
        if axis == "FLOPs":
            return self._totals("train/flops_student_total", steps) + self._totals("train/flops_teacher_total", steps)
        return self._totals({"tokens": "train/tokens", "seconds": "train/time_s"}[axis], steps)

    @cached_property
    def deciding(self) -> dict[str, Any]:
        """The settings that decide the result, without seeds and the run's own folder.

        If it was resumed with other settings, the earlier ones are included: it is not a run of the new settings alone.
        A run with unknown settings equals no other.
        """
        if not self.config:
            return {"folder": str(self.path.absolute())}
        own = {"run", "ckpt_path", "trainer.default_root_dir", "seed_everything", *self.seeds}
        given = without_watchers(self.config)
        may_end = given.get("kd.stop_margin") is not None or any(k.startswith("trainer.callbacks.") for k in given)
        if self._validated_at_end and not may_end:  # a validation may end KD, or the run
            own.add("trainer.val_check_interval")
        trained = {k: v for k, v in given.items() if k not in own and not _AROUND.match(k) and not self._is_idle(k)}
        before = {f"until step {n}: {k}": was for n, found in self.changes.items() for k, (was, _) in found.items()}
        before |= {"ckpt_path": self.lost} if self.lost else {}
        # null equals a missing setting: an older version did not have it
        return {key: value for key, value in (trained | before).items() if value is not None}

    def _is_idle(self, key: str) -> bool:
        """Whether a setting has no effect beside the others: of a teacher that never teaches, of no selection or of one
        that chose nothing, and the sizes of a student that started from weights, which a resume writes down."""
        if key.startswith("model.student.config"):
            return bool(self.config.get("model.student.path"))
        if key.startswith(("kd.", "model.teacher")):
            return not self.taught and not (self.selected and key == "kd.steps")
        if not self.selected:
            return key.startswith(("data.keep.", "data.selection"))
        return not self.scores and key in ("data.keep.k", "data.keep.masked")

    @cached_property
    def variant(self) -> dict[str, Any]:
        """`deciding` with seeds in paths of runs made anonymous: equal for all seeds of an experiment."""
        seed = re.compile(rf"(?<![A-Za-z0-9])(seed|s)[-_=]?{re.escape(str(self.seed))}(?![0-9])")
        folders = [
            str(folder).rstrip("/").split("/") for folder in (self.config.get("run") or "", self.path.absolute())
        ]
        # runs/0/salt: everything in runs/0 belongs to this seed
        of_seed = [folder[: folder.index(str(self.seed)) + 1] for folder in folders if str(self.seed) in folder]

        def anonymous(value: Any) -> Any:
            if not isinstance(value, str):
                return value
            parts = value.split("/")
            for stands, prefixes in (("RUN", folders), ("SEED", of_seed)):
                for prefix in prefixes:
                    if prefix != [""] and parts[: len(prefix)] == prefix:
                        parts = [stands, *parts[len(prefix) :]]
            return seed.sub("SEED", "/".join(parts))

        return {key: anonymous(value) if _PLACES.match(key) else value for key, value in self.deciding.items()}


def differ(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """Whether two losses were measured on different text or tokens, as far as `Run.measured` knows."""
    (tokens, size), (other_tokens, other_size) = a, b
    if math.isnan(tokens + other_tokens):
        return False
    alike = math.isnan(size + other_size) or math.isclose(size, other_size, rel_tol=ROUNDING)
    return tokens != other_tokens or not alike


def read_run(path: str | Path, name: str) -> Run:
    """Reads config.yaml and every TensorBoard event file of a run's folder, finished or not.

    Raises:
        ConfigError: no such folder, or an unreadable config.yaml.
    """
    path = Path(os.path.expanduser(path))
    if not path.is_dir():
        raise ConfigError(f"compare: RUN {path} is not a folder; give a run's own folder, e.g. runs/salt")
    settings = read_config(path / "config.yaml") if (path / "config.yaml").is_file() else {}
    earlier, unread = [], []
    for step, file in earlier_configs(path):
        try:
            earlier.append((step, read_config(file)))
        except ConfigError as error:
            unread.append(f"{error}; the settings before step {step} are not known")
    curves, damaged = read_curves(path)
    tested, damaged_too = read_curves(path / "test", apart=True)  # `cli.py test` logs there
    curves |= {tag: curve for tag, curve in tested.items() if tag.startswith("test/")}
    return Run(name, path, settings, curves, (*damaged, *damaged_too, *unread), tuple(earlier))


ROUNDING = 1e-5  # of a loss in nats, and of the bytes of a text: TensorBoard keeps seven digits
CONTEXT = ("data.block_size", "data.isolate_documents")  # these change a loss on the same text
# Settings that change no result. With half the micro-batch, e.g. after running out of memory, it is the same run.
_AROUND = re.compile(
    r"data\.(\w+_workers|cache_dir|micro_batch_size)$|checkpoint\.|kd\.(allow_|probe_)|answers\."
    r"|trainer\.(max_time|log_every_n_steps|num_sanity_val_steps)$"
)
# Settings whose path may point into a run. Not those of texts: s1.jsonl and s2.jsonl are different texts.
_PLACES = re.compile(
    r"(until step \d+: )?(ckpt_path|model\.(student|teacher)\.path|data\.(tokenizer|selection|difficulty)"
    r"|trainer\.callbacks)\b"
)


def changes_said(run: Run) -> list[str]:
    """Each of a run's `changes`, as text to follow "NAME continued" or "resumed:"."""
    return [f"at step {step} under other settings: {_shown(found)}" for step, found in run.changes.items()]


def _on_a_line(value: Any) -> Any:
    """A value for a message; text such as a template in quotes, as it may be empty or have several lines."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and value.split() != [value] else value


def _shown(found: dict[str, tuple[Any, Any]]) -> str:
    said = [f"{key} {_on_a_line(now)} (before {_on_a_line(was)})" for key, (was, now) in found.items()]
    return ", ".join(said[:4]) + (f" and {len(said) - 4} more" if len(said) > 4 else "")
