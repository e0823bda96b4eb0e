"""The report of benchmarks/study.py: its results as Markdown, and figures made by `compare`."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from salt_lightning import compare
from salt_lightning.comparison.report import flop_unit, number, table
from salt_lightning.run.curves import THIRDS
from salt_lightning.teacher.difficulty import thirds

if TYPE_CHECKING:
    from study import Study

Record = dict[str, Any]
Rows = dict[str, dict[int, Record]]  # row -> seed -> result


def report(study: Study) -> str:
    """Returns all results as Markdown, and writes the figures."""
    _add_thirds(study)
    cells = study.cells()
    order = list(dict.fromkeys(cell.row for cell in cells))
    rows: Rows = {row: {} for row in order}
    for record in study.done.values():
        rows.setdefault(record["row"], {})[record["seed"]] = record
    base, large = (next(c.row for c in cells if c.row.startswith(name) and c.part == part)
                   for name, part in (("baseline", "main"), ("large-baseline", "large")))  # fmt: skip
    half = next(c.settings["model.optim.lr"] for c in cells if c.row == "half-lr-salt")
    main = [base, "rkd", "salt", "salt-ds", "random"]
    more = dict.fromkeys(r["row"] for r in study.done.values() if r["part"] == "more" and r["row"] not in main)
    parts = [
        _facts(study),
        _sweeps(study.done),
        _teachers(study.done),
        _seeds(rows, "Main rows", main),
        _seeds(rows, "At half the rate", [f"baseline-lr{half:g}", "half-lr-salt"]),
        _reached(study, rows, base, "salt"),
        _reached(study, rows, base, "best"),
        _singles(study, rows, base),
        _seeds(rows, "Beside the plan", [base, *more]),
        _seeds(rows, "The larger student", [large, "large-salt"]),
        _splits(rows, main),
        _tuned(rows),
        _figures(study, base, main),
    ]
    left = [cell.name for cell in cells if cell.name not in study.done]
    return "\n\n".join([*filter(None, parts), *([f"Not run: {', '.join(left)}."] if left else [])])


def _add_thirds(study: Study) -> None:
    """Adds val/ce/easy, medium and hard to each result: thirds of the validation text by the teacher's own loss."""
    read = {path.stem: pq.read_table(path) for path in (study.state / "documents").glob("*.parquet")}
    teacher = next((read[name] for name, r in study.done.items() if r["row"] == "teacher" and name in read), None)
    if teacher is None:
        return
    third_D = thirds(teacher["nll"].to_numpy(), teacher["tokens"].to_numpy())
    for name in read.keys() & study.done.keys():
        nll_D, tokens_D = (read[name][column].to_numpy() for column in ("nll", "tokens"))
        for third, label in enumerate(THIRDS):
            inside_D = third_D == third
            study.done[name][f"val/ce/{label}"] = float(nll_D[inside_D].sum() / tokens_D[inside_D].sum())


def _facts(study: Study) -> str:
    records, size = list(study.done.values()), study.size
    facts = json.loads((study.state / "corpus.json").read_text())
    run = next(r for r in records if "epochs" in r)
    lines = [f"`{name}`: {f['bytes']:,} bytes, SHA-256 `{f['sha256']}`" for name, f in facts["corpus"].items()]
    for name, f in facts["files"].items():
        sources = ", ".join(f"{s} {n / 1e6:.1f}" for s, n in sorted(f["text_bytes"].items(), key=lambda x: -x[1]))
        lines.append(f"{name}: {f['documents']:,} documents, {sum(f['text_bytes'].values()) / 1e6:.1f} MB ({sources})")
    told = [" ".join(f"{k} {v}" for k, v in r["versions"].items()) for r in records]
    lines += [
        (f"one in {size.keep_one_in} documents of the text: " if size.keep_one_in > 1 else "")
        + f"{run['unique_tokens']:,} unique tokens with a BPE of {size.vocab:,}; a run reads "
        f"{size.steps * size.rows * size.block:,} ({size.steps} steps of {size.rows} rows of {size.block}), "
        f"{run['epochs']:.2f} epochs",
        f"`python benchmarks/study.py run --size {study.size_name}`; commit {_distinct(r['commit'] for r in records)}; "
        f"{_distinct(r['card'] for r in records)}; {_distinct(told)}; {_distinct(r['date'] for r in records)}; "
        f"{sum(r['wall_s'] for r in records) / 60:.0f} minutes in {len(records)} cells",
        f"seeds {', '.join(map(str, size.seeds))}, named beforehand; one teacher of each kind, with its own seed",
        "val/ce in nats per token, std over n - 1; the held-out source is only in val/ce/ood",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(values))


def _sweeps(done: dict[str, Record]) -> str:
    found = [r for r in done.values() if r["part"] == "sweep"]
    found.sort(key=lambda r: (r["row"].startswith("large"), r["settings"]["model.optim.lr"]))
    return "### BASELINE's learning rate, before any other run\n\n" + table({
        "student": ["large" if r["row"].startswith("large") else "main" for r in found],
        "peak rate": [f"{r['settings']['model.optim.lr']:g}" for r in found],
        "val/ce": [number(r["val/ce"], ".4f") for r in found],
    }, text=("student",))  # fmt: skip


def _teachers(done: dict[str, Record]) -> str:
    found = [r for r in done.values() if r["part"] == "teacher"]
    if not found:
        return ""
    told = [
        f"All rows scored by the teacher at step {early['settings']['checkpoint.at_steps'][0]} of {early['steps']}: "
        f"{r['zero_share']:.1%} score 0 (k 10, masked zero), {_flops(r['scoring_flops'])}."
        for r in done.values() if r["part"] == "score"
        for early in found if early["row"] == "teacher"
    ]  # fmt: skip
    columns = {
        "teacher": [r["row"] for r in found], "val/ce": [number(r["val/ce"], ".4f") for r in found],
        "val/ce/ood": [number(r["val/ce/ood"], ".4f") for r in found],
        "own training": [_flops(r["flops_student"]) for r in found], "seconds": [f"{r['seconds']:.0f}" for r in found],
    }  # fmt: skip
    return "\n\n".join(["### Teachers", table(columns, text=("teacher",)), *told])


def _flops(value: float) -> str:
    scale, unit = flop_unit(value)
    return "0" if value == 0 else f"{value / scale:.3g} {unit}"


def _each(values: Iterable[float], form: str = ".4f") -> str:
    return ", ".join(number(value, form) for value in values)


def _mean(records: dict[int, Record], key: str = "val/ce") -> float:
    return statistics.mean(r[key] for r in records.values())


def _mean_std(records: dict[int, Record], key: str = "val/ce") -> str:
    values = [r[key] for r in records.values()]
    return f"{statistics.mean(values):.4f} ({number(statistics.stdev(values) if len(values) > 1 else math.nan, '.4f')})"


def crossing(record: Record, level: float, whole_flops: float) -> tuple[float, float]:
    """Where val/ce first falls to `level`: share of the run's steps; FLOPs so far (both models) / whole_flops."""
    steps, ce = map(np.array, zip(*record["curve"], strict=True))
    step = compare.first_reach(steps, ce, level)
    taught = record["settings"]["kd.steps"] or record["steps"]
    flops = record["flops_student"] * step / record["steps"] + record["flops_teacher"] * min(1.0, step / taught)
    return step / record["steps"], flops / whole_flops


def _seeds(rows: Rows, title: str, names: list[str]) -> str:
    """Table of rows with several seeds; the first row is BASELINE."""
    base, there = rows.get(names[0]), {name: rows[name] for name in names if rows.get(name)}
    if not base or len(there) < 2:
        return ""
    goal, whole = _mean(base), _mean(base, "flops_student")

    def paired(found: dict[int, Record], key: str) -> str:
        return _each((r[key] - base[s][key] for s, r in sorted(found.items()) if s in base), "+.4f")

    columns: dict[str, list[str]] = {
        "experiment": [], "n": [], "val/ce: mean (std)": [], "each seed": [], "minus BASELINE of its seed": [],
        "crosses BASELINE's mean at: steps": [], "FLOPs": [], "val/ce/ood: mean (std)": [], "ood minus BASELINE": [],
        "student": [], "teacher's forward": [], "seconds": [],
    }  # fmt: skip
    for name, found in there.items():
        seeds = [found[seed] for seed in sorted(found)]
        at = [crossing(r, goal, whole) for r in seeds]
        cells = [
            name, str(len(seeds)), _mean_std(found), _each(r["val/ce"] for r in seeds),
            paired(found, "val/ce"), _each((s for s, _ in at), ".1%"), _each((f for _, f in at), ".1%"),
            _mean_std(found, "val/ce/ood"), paired(found, "val/ce/ood"), _flops(_mean(found, "flops_student")),
            _flops(_mean(found, "flops_teacher")), f"{_mean(found, 'seconds'):.0f}",
        ]  # fmt: skip
        for column, cell in zip(columns.values(), cells, strict=True):
            column.append(cell)
    for column in ("minus BASELINE of its seed", "ood minus BASELINE"):
        columns[column][0] = ""
    return f"### {title}\n\n" + table(columns, text=("experiment",))


def _singles(study: Study, rows: Rows, base: str) -> str:
    """Table of rows with one seed. A row with its own learning-rate curve is compared with BASELINE on that curve."""
    seed = study.size.seeds[0]
    plain, salt = rows[base].get(seed), rows["salt"].get(seed)
    found = [r for records in rows.values() for r in records.values() if r["part"] == "one seed"]
    if not found or plain is None or salt is None:
        return ""
    own = rows["high-lr-baseline"].get(seed)

    def against(r: Record) -> float:
        other = own if r["row"] == "high-lr-salt" else plain
        return math.nan if other is None or other is r else r["val/ce"] - other["val/ce"]

    found = [plain, salt, *found]
    columns = {
        "experiment": [r["row"] for r in found], "val/ce": [number(r["val/ce"], ".4f") for r in found],
        "minus BASELINE": [number(against(r), "+.4f") for r in found],
        "minus SALT": [number(r["val/ce"] - salt["val/ce"], "+.4f") for r in found],
        "val/ce/ood": [number(r["val/ce/ood"], ".4f") for r in found],
        "FLOPs": [_flops(r["flops_student"] + r["flops_teacher"]) for r in found],
    }  # fmt: skip
    note = "high-lr-salt is compared with high-lr-baseline, which has the same learning-rate curve."
    title = f"### One seed each (seed {seed}, n = 1: no spread known)"
    return "\n\n".join([title, table(columns, text=("experiment",)), note])


def reached_at(shares: list[float], losses: list[float], goal: float) -> float:
    """The smallest f with a final loss of at most `goal`, interpolated linearly between those measured; NaN if none."""
    return compare.first_reach(np.array(shares), np.array(losses), goal)


def _reached(study: Study, rows: Rows, base: str, kind: str) -> str:
    """Runs with complete schedules of f x the steps against BASELINE's mean final loss at f = 1."""
    full, shares = rows[base], study.size.shares
    found = {f: records for f in shares if (records := rows.get(f"{kind}-f{f:g}"))}
    if not full or not found:
        return ""
    if kind == "salt" and rows["salt"]:
        found[1.0] = rows["salt"]
    whole = _mean(full, "flops_student")

    def share(records: dict[int, Record]) -> float:
        return (_mean(records, "flops_student") + _mean(records, "flops_teacher")) / whole

    goal, shares_there = _mean(full), sorted(found)
    f = reached_at(shares_there, [_mean(found[s]) for s in shares_there], goal)
    shown = {f"{kind}, f {s:g}": found[s] for s in shares_there}
    shown |= {f"BASELINE, f {s:g}": short for s in shares if (short := rows.get(f"baseline-f{s:g}"))}
    columns = {
        "run": list(shown), "n": [str(len(r)) for r in shown.values()],
        "val/ce at its end": [_each(r[s]["val/ce"] for s in sorted(r)) for r in shown.values()],
        "mean minus BASELINE's mean": [f"{_mean(r) - goal:+.4f}" for r in shown.values()],
        "share of BASELINE's FLOPs": [f"{share(r):.1%}" for r in shown.values()],
    }  # fmt: skip
    told = f"BASELINE's mean final loss, {goal:.4f}, is not reached"
    if not math.isnan(f):
        flops = float(np.interp(f, shares_there, [share(found[s]) for s in shares_there]))
        teacher = Path(next(iter(found[shares_there[0]].values()))["settings"]["model.teacher.path"]).name
        own = next(r["flops_student"] for r in rows[teacher].values())
        less = " or less (the smallest measured)" if f == shares_there[0] else ""
        told = f"BASELINE's mean final loss, {goal:.4f}, is reached at f = {f:.3f}{less} in steps and {flops:.3f} in "
        told += (
            f"FLOPs with the teacher's forward pass; {flops + own / whole:.3f} also with its training ({_flops(own)})"
        )
    low, high = bootstrap(full, found)
    ends = " to ".join("not reached" if math.isinf(end) else f"{end:.3f}" for end in (low, high))
    about = next((r["about"] for r in study.done.values() if r["part"] == "best"), "")
    title = f"### Reached at f: {kind}" + (
        f" ({about}: the best of SALT's settings on the first seed, measured on the others)" if kind == "best" else ""
    )
    told += f". Bootstrap over the seeds of all rows, 95%: {ends}."
    return "\n\n".join([title, table(columns, text=("run",)), told])


def bootstrap(full: dict[int, Record], found: dict[float, dict[int, Record]], draws: int = 4000) -> tuple[float, float]:
    """2.5% and 97.5% quantiles of f, with each row's seeds drawn with replacement; infinite: not reached."""
    rng = random.Random(0)

    def drawn(records: dict[int, Record]) -> float:
        return statistics.mean(rng.choices([r["val/ce"] for r in records.values()], k=len(records)))

    shares = sorted(found)
    fs = (reached_at(shares, [drawn(found[f]) for f in shares], drawn(full)) for _ in range(draws))
    ordered = sorted(math.inf if math.isnan(f) else f for f in fs)
    return ordered[round(0.025 * draws)], ordered[round(0.975 * draws) - 1]


def _splits(rows: Rows, names: list[str]) -> str:
    """By part of the validation text: BASELINE's mean, and each row's mean difference from it on the same seeds."""
    base = rows[names[0]]
    there = [name for name in names[1:] if rows[name].keys() & base.keys()]
    tags = sorted({tag for r in base.values() for tag in r if tag.startswith("val/ce/")})
    if not there:
        return ""

    def difference(name: str, tag: str) -> str:
        pairs = [(r[tag], base[seed][tag]) for seed, r in rows[name].items() if tag in base.get(seed, {})]
        return number(statistics.mean(a - b for a, b in pairs) if pairs else math.nan, "+.4f")

    columns = {"part": tags, names[0]: [number(_mean(base, tag), ".4f") for tag in tags]}
    columns |= {name: [difference(name, tag) for tag in tags] for name in there}
    return "### By part of the validation text: mean difference from BASELINE\n\n" + table(columns, text=("part",))


def _tuned(rows: Rows) -> str:
    """Fine-tuned students on the test text of their task: each seed, and the mean."""
    found = {row: records for row, records in rows.items() if row.startswith("sft-") and records}
    tags = sorted({tag for records in found.values() for r in records.values() for tag in r if tag.startswith("test/")})
    if not found:
        return ""
    columns = {"task and student": list(found), "n": [str(len(records)) for records in found.values()]}
    for tag in tags:
        known = ([r[tag] for _, r in sorted(records.items()) if tag in r] for records in found.values())
        columns[tag] = [f"{_each(v)}: {statistics.mean(v):.4f}" if v else "-" for v in known]
    return "### Fine-tuning: each seed, and the mean\n\n" + table(columns, text=("task and student",))


def _figures(study: Study, base: str, main: list[str]) -> str:
    """Writes compare's table and figure of the main rows, and of SALT's lengths on the first seed."""
    lengths = re.compile(rf"({re.escape(base)}|(salt|best)(-f.*)?)")
    of_figure = {
        "main": [name for name, r in study.done.items() if r["row"] in main],
        "reached": [name for name, r in study.done.items()
                    if lengths.fullmatch(r["row"]) and r["seed"] == study.size.seeds[0]],
    }  # fmt: skip
    lines = []
    for figure, cells in of_figure.items():
        cells.sort(key=lambda name: not name.startswith(base))  # the reference comes first
        paths = [path for cell in cells if (path := study.state / "curves" / cell).is_dir()]
        if len(paths) > 1:
            compare.compare(paths, study.state / figure)
            lines.append(f"Loss over steps and FLOPs by `compare`: `{study.state / figure}/compare.png` and `.md`.")
    return "\n".join(lines)
