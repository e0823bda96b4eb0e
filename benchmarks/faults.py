"""Kills real runs of the real command, or makes their disk, checkpoints or teacher fail; then continues them.

    python benchmarks/faults.py                 all kills and faults; about 20 minutes on two cores
    python benchmarks/faults.py --tiny          nine cases, about a minute
    python benchmarks/faults.py --only 17       repeats one case, by its number

A case passes if the run continues with `--ckpt_path last` (or the same command) and ends with the bits of a run that
was never stopped, or if it ends with one error line that says what to do. Every process is forked from this one, which
has imported the program and computed nothing, so a start costs no import.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import CLOCK, arguments, scalars, write_corpus
from lightning.pytorch.utilities import rank_zero_only

from salt_lightning import checkpoint, cli
from salt_lightning.models import read_checkpoint
from salt_lightning.teacher import scores
from salt_lightning.text import prepare

HANG_S = 60.0  # a process that outlives a dead one by this long hangs
MODEL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
PER_RANK = {"trainer.devices": 2, "data.micro_batch_size": 4}
# a sum of three depends on its order, that of two does not
OF_THREE = {"trainer.devices": 3, "data.micro_batch_size": 4, "data.global_batch_size": 12}


# ------------------------------------------------------------------- processes


@dataclass
class Started:
    """The ranks of one start, each with its own session, and their common log."""

    log: Path
    pids: list[int]
    codes: dict[int, int] = field(default_factory=dict)

    def reap(self) -> bool:
        """Whether all ranks have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def living(self) -> list[int]:
        """All living processes of the start, including those that its ranks started."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = entry.read_text().rpartition(")")[2].split()[:4]
            except OSError:  # the process has just ended
                continue
            if int(session) in self.pids and state != "Z":
                found.append(int(entry.parent.name))
        return found

    def wait(self, limit_s: float = HANG_S) -> bool:
        """Whether every process ended in time; kills those that did not."""
        deadline = time.monotonic() + limit_s
        while not self.reap() or self.living():
            if time.monotonic() > deadline:
                for pid in self.living():
                    os.kill(pid, signal.SIGKILL)
                while not self.reap():
                    time.sleep(0.01)
                return False
            time.sleep(0.005)
        return True

    def code(self) -> int:
        return self.codes[self.pids[0]]

    def text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def start(args: list[str], log: Path, ranks: int = 1, largest_file: int | None = None) -> Started:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    sys.stdout.flush()
    return Started(log, [_fork(args, log, rank, ranks, port, largest_file) for rank in range(ranks)])


def _fork(args: list[str], log: Path, rank: int, ranks: int, port: int, largest_file: int | None) -> int:
    if pid := os.fork():
        return pid
    code: Any = 70
    try:
        os.setsid()
        torch.set_num_threads(torch.get_num_threads())  # else autograd's threads may make torch's pool anew at once
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        scores._SHARD_TOKENS = 256  # about 20 shards for a small text
        prepare._JOURNAL_S = 0.1
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
        if ranks > 1:  # like a cluster's launcher
            os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
            os.environ["MASTER_PORT"] = str(port)
            rank_zero_only.rank = rank
        checkpoint.FIRST_RANK_S = 3.0
        code = cli.main(args)
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


# ------------------------------------------------------------------- scenarios


@dataclass(frozen=True)
class Scenario:
    """A command, its number of ranks, and the part of its folder that must come out the same."""

    name: str
    verb: str
    own: dict[str, Any]
    result: Callable[[Path], Any]
    ranks: int = 1
    kills: int = 0  # in a full campaign
    moments: dict[str, str] = field(default_factory=dict)  # name -> files that appear then, or text in the log

    def args(self, folder: Path, again: bool) -> list[str]:
        own = {k: v.replace("CASE", str(folder)) if isinstance(v, str) else v for k, v in self.own.items()}
        resumed = {"ckpt_path": "last"} if again and self.verb == "fit" else {}
        return [self.verb, *arguments(own, {"run": str(folder / "run")}, resumed)]


def bits(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().numpy().tobytes()).hexdigest()


def fit_result(folder: Path) -> Any:
    """Bits of the final weights, and all logged values."""
    [last] = (folder / "run/checkpoints").glob("step-00000024.ckpt")
    weights = read_checkpoint(str(last), "result")["state_dict"]
    logged = {tag: values for tag, values in scalars(folder / "run").items() if tag not in CLOCK}
    return {name: bits(weights[name]) for name in weights}, logged


def files_of(pattern: str) -> Callable[[Path], Any]:
    def result(folder: Path) -> Any:
        files = sorted(path for path in folder.glob(pattern) if path.is_file())
        return {str(path.relative_to(folder)): hashlib.blake2b(path.read_bytes()).hexdigest() for path in files}

    return result


def scenarios(shared: Path) -> dict[str, Scenario]:
    data = {
        "data.source": str(shared / "text.jsonl"), "data.vocab_size": 300, "data.block_size": 32,
        "data.micro_batch_size": 8, "data.val_fraction": 0.1, "data.cache_dir": str(shared / "cache"),
        "data.prepare_workers": 1, "data.num_workers": 0,
        "trainer.accelerator": "cpu", "trainer.enable_progress_bar": False,
    }  # fmt: skip
    fit = {
        **data, "data.global_batch_size": 8, "model.student.config": {**MODEL, "tie_word_embeddings": True},
        "model.optim.lr": 3e-3, "model.optim.warmup_steps": 2, "model.teacher.path": str(shared / "teacher"),
        "kd.allow_untrained": True,
        "kd.weight": 0.5, "kd.steps": 10, "checkpoint.every_n_steps": 4, "checkpoint.keep": 2,
        "trainer.max_steps": 24, "trainer.val_check_interval": 8, "trainer.log_every_n_steps": 1,
    }  # fmt: skip
    at = {"save": "run/checkpoints/.*.tmp", "boundary": "the teacher was unloaded"}
    ddp = {"trainer.strategy": "lightning.pytorch.strategies.DDPStrategy", "trainer.strategy.timeout": "0:00:30"}
    fsdp = {"trainer.strategy": "salt_lightning.parallel.FSDP2", "trainer.strategy.timeout_minutes": 0.5}
    prepared = {**fit, "data.source": str(shared / "long.jsonl"), "data.cache_dir": "CASE/cache",
                "data.vocab_size": 400, "data.prepare_workers": 2, "trainer.max_steps": 1,
                "trainer.val_check_interval": 1, "data.val_rows": 16,
                "model.optim.warmup_steps": 0, "model.teacher.path": None, "kd.weight": 0.0}  # fmt: skip
    scored = {**data, "model.teacher.path": str(shared / "teacher")}
    shards, cache = files_of("run/scores/*"), files_of("cache/**/*")
    found = [
        Scenario("fit, one process", "fit", fit, fit_result, 1, 90, at),
        Scenario("fit, DDP, 3 ranks", "fit", {**fit, **OF_THREE, **ddp}, fit_result, 3, 25, at),
        Scenario("fit, FSDP2, 2 ranks", "fit", {**fit, **PER_RANK, **fsdp}, fit_result, 2, 25, at),
        Scenario("preparation", "fit", prepared, cache, 1, 40, {"tokenizing": "cache/.*.partial"}),
        Scenario("scoring", "predict", scored, shards, 1, 40, {"shard": "run/scores/.*.tmp"}),
    ]
    return {scenario.name: scenario for scenario in found}


def run_whole(scenario: Scenario, folder: Path, again: bool = False, **limits: Any) -> Started:
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"log.{len(list(folder.glob('log.*')))}"
    started = start(scenario.args(folder, again), log, scenario.ranks, **limits)
    if not started.wait(240.0):
        raise TimeoutError(f"hangs: {log}")
    return started


def make_shared(shared: Path) -> None:
    """Writes text, and a teacher in Hugging Face's format."""
    shared.mkdir(parents=True)
    write_corpus(shared / "text.jsonl")
    write_corpus(shared / "long.jsonl", num_documents=30_000, seed=1)
    own = scenarios(shared)["fit, one process"].own
    small = {"model.student.config": {**own["model.student.config"], "hidden_size": 16}, "kd.weight": 0.0,
             "model.teacher.path": None, "checkpoint.export": str(shared / "teacher")}  # fmt: skip
    started = run_whole(Scenario("teacher", "fit", {**own, **small}, fit_result), shared / "made")
    assert started.code() == 0, started.text()


# ----------------------------------------------------------------------- cases


@dataclass
class Outcome:
    number: int
    scenario: str
    kind: str
    verdict: str  # "same result", "one clear error", or what is wrong
    detail: str = ""
    seconds_to_end: float = 0.0  # from the fault to the end of the last process


@dataclass
class Campaign:
    folder: Path
    references: dict[str, tuple[Any, float]] = field(default_factory=dict)  # name -> result and duration in seconds

    def __post_init__(self) -> None:
        self.shared = self.folder / "shared"
        self.scenarios = scenarios(self.shared)

    def prepare(self, names: list[str]) -> None:
        make_shared(self.shared)
        for name in names:
            scenario, folder = self.scenarios[name], self.folder / "reference" / name
            began_s = time.monotonic()
            started = run_whole(scenario, folder)
            assert started.code() == 0, started.text()
            self.references[name] = scenario.result(folder), time.monotonic() - began_s

    def go_on(self, scenario: Scenario, folder: Path) -> tuple[str, str]:
        """Continues the run until it ends by itself, at most three times; returns the verdict and its detail."""
        for _ in range(3):
            there = sorted(path.name for path in folder.glob("run/checkpoints/step-*.ckpt"))
            started = run_whole(scenario, folder, again=True)
            text = started.text()
            if scenario.verb == "fit" and there and f"{there[-1]}" not in text:
                return "lost work", f"{there[-1]} was not used"
            if started.code() == 0:
                same = scenario.result(folder) == self.references[scenario.name][0]
                return ("same result" if same else "another result"), ""
            if verdict := self.error(text, started.code()):
                return verdict
        return "did not end", text[-300:]

    @staticmethod
    def error(text: str, code: int) -> tuple[str, str] | None:
        """Whether a failed run printed one error line; None after a signal."""
        if code in (-signal.SIGTERM, 128 + signal.SIGTERM):
            return None
        lines = {line for line in text.splitlines() if line.startswith("error: ")}  # several ranks print the same line
        if len(lines) > 1:  # keep the cause, which one rank reports
            lines = {line for line in lines if "has lost the others" not in line}
        if "Traceback" in text or len(lines) != 1:
            return "no clear error", text[-300:]
        return "one clear error", lines.pop()

    def kill(self, number: int, scenario: Scenario, kind: str, attempt: int) -> Outcome:
        """Kills a run as `kind`, "WHICH SIGNAL at MOMENT", says, and continues it."""
        rng, folder = random.Random(3 * number + attempt), self.folder / f"case-{number:04d}"
        which, signal_name, moment = re.fullmatch(r"(\w+) (\w+) at (.+)", kind).groups()  # type: ignore[union-attr]
        folder.mkdir()
        started = start(scenario.args(folder, False), folder / "log.0", scenario.ranks)
        hit = self._await(started, scenario, moment, rng, folder)
        targets = started.pids if which == "all" else [started.pids[rng.randrange(scenario.ranks)]]
        if which == "worker":
            targets = [pid for pid in started.living() if pid not in started.pids][-1:]
        sent_s = time.monotonic()
        if not hit or not targets:
            started.wait()
            return Outcome(number, scenario.name, kind, "not hit")
        for pid in targets:
            if pid not in started.codes:
                os.kill(pid, signal.Signals[signal_name])
        ended = started.wait()
        seconds = time.monotonic() - sent_s
        if not ended:
            return Outcome(number, scenario.name, kind, "hang", started.text()[-300:], seconds)
        crashed = "Traceback" in started.text()
        verdict, detail = self.go_on(scenario, folder)
        if verdict == "same result":
            detail = "a survivor ended with a traceback" if crashed else ""
            shutil.rmtree(folder)
        return Outcome(number, scenario.name, kind, verdict, detail, seconds)

    def _await(self, started: Started, scenario: Scenario, moment: str, rng: random.Random, folder: Path) -> bool:
        """Sleeps until the moment; returns whether the run is still alive then."""
        if moment == "any time":
            until_s = time.monotonic() + rng.uniform(0.05, 0.95) * self.references[scenario.name][1]
            while time.monotonic() < until_s and not started.reap():
                time.sleep(0.005)
            return not started.reap()
        sign, nth, seen = scenario.moments[moment], rng.randrange(1, 4), set()
        while not started.reap():
            if "*" not in sign:
                if sign in started.text():
                    return True
                time.sleep(0.001)
                continue
            seen.update(folder.glob(sign))
            if len(seen) >= (1 if moment == "tokenizing" else nth):
                wait_s = rng.uniform(0.0, 2.0) if moment == "tokenizing" else rng.uniform(0.0, 0.003)
                time.sleep(wait_s)
                return not started.reap()
        return False

    # ------------------------------------------------------------- other faults

    def base(self, scenario: Scenario, folder: Path, step: int) -> None:
        """Starts a run and kills it once the checkpoint of `step` exists."""
        folder.mkdir()
        started = start(scenario.args(folder, False), folder / "log.0", scenario.ranks)
        while not (folder / f"run/checkpoints/step-{step:08d}.ckpt").exists() and not started.reap():
            time.sleep(0.001)
        for pid in started.living():
            os.kill(pid, signal.SIGKILL)
        started.wait()

    def fault(self, number: int, scenario: Scenario, kind: str, attempt: int) -> Outcome:
        rng, folder = random.Random(3 * number + attempt), self.folder / f"case-{number:04d}"
        teacher = folder / "teacher"
        scenario = Scenario(**{**vars(scenario), "own": {**scenario.own}})
        if kind.startswith("teacher"):
            shutil.copytree(self.shared / "teacher", self.folder / f"teacher-{number}")
            teacher = self.folder / f"teacher-{number}"
            scenario.own["model.teacher.path"] = str(teacher)
        began_s = time.monotonic()
        verdict = self._faults()[kind](scenario, folder, rng, teacher)
        outcome = Outcome(number, scenario.name, kind, *verdict, seconds_to_end=time.monotonic() - began_s)
        if outcome.verdict in ("same result", "one clear error"):
            shutil.rmtree(folder)
        return outcome

    def _faults(self) -> dict[str, Callable[..., tuple[str, str]]]:
        return {
            "newest checkpoint cut off": lambda s, f, r, _: self._damage(s, f, r, cut=True),
            "byte of the newest checkpoint flipped": lambda s, f, r, _: self._damage(s, f, r, cut=False),
            "disk full": lambda s, f, r, _: self._disk_full(s, f, r),
            "teacher removed in phase 1": self._teacher_leaves_early,
            "teacher missing at a resume in phase 1": lambda s, f, _, t: self._no_teacher(s, f, t, 4),
            "teacher missing at a resume in phase 2": lambda s, f, _, t: self._no_teacher(s, f, t, 12),
        }

    def _damage(self, scenario: Scenario, folder: Path, rng: random.Random, cut: bool) -> tuple[str, str]:
        self.base(scenario, folder, 12)
        newest = sorted(folder.glob("run/checkpoints/step-*.ckpt"))[-1]
        files = sorted(newest.iterdir()) if newest.is_dir() else [newest]
        file = rng.choices(files, [path.stat().st_size for path in files])[0]
        content = bytearray(file.read_bytes())
        place = rng.randrange(len(content))
        if cut:
            del content[place:]
        else:
            content[place] ^= 1 << rng.randrange(8)
        file.write_bytes(content)
        started = run_whole(scenario, folder, again=True)
        if started.code():
            return self.error(started.text(), started.code()) or ("no clear error", "")
        same = scenario.result(folder) == self.references[scenario.name][0]
        at = f"byte {place} of {len(content)} in {newest.name}/{file.name}"
        return ("same result", "") if same else ("another result", at)

    def _disk_full(self, scenario: Scenario, folder: Path, rng: random.Random) -> tuple[str, str]:
        """Limits the size of files below what the run's own files need."""
        pattern = {"preparation": "cache/**/*", "scoring": "run/scores/*"}.get(scenario.name, "run/checkpoints/**/*")
        reference = self.folder / "reference" / scenario.name
        largest = max(path.stat().st_size for path in reference.glob(pattern) if path.is_file())
        started = run_whole(scenario, folder, largest_file=int(largest * rng.uniform(0.3, 0.99)))
        if started.code() == 0:
            return "not hit", ""
        verdict = self.error(started.text(), started.code())
        if verdict is None or verdict[0] != "one clear error":
            return verdict or ("no clear error", "")
        after, detail = self.go_on(scenario, folder)
        return verdict if after == "same result" else (after, detail)

    def _teacher_leaves_early(
        self, scenario: Scenario, folder: Path, rng: random.Random, teacher: Path
    ) -> tuple[str, str]:
        folder.mkdir()
        started = start(scenario.args(folder, False), folder / "log.0", scenario.ranks)
        while not list(folder.glob("run/checkpoints/step-00000004.ckpt")) and not started.reap():
            time.sleep(0.001)
        shutil.rmtree(teacher)
        if not started.wait(120.0):
            return "hang", ""
        if started.code():
            return self.error(started.text(), started.code()) or ("no clear error", "")
        same = scenario.result(folder) == self.references[scenario.name][0]
        return ("same result" if same else "another result"), ""

    def _no_teacher(self, scenario: Scenario, folder: Path, teacher: Path, step: int) -> tuple[str, str]:
        self.base(scenario, folder, step)
        shutil.rmtree(teacher)
        return self.go_on(scenario, folder)


# -------------------------------------------------------------------- campaign

TINY = (
    ("fit, one process", "one SIGKILL at any time"),
    ("fit, one process", "one SIGTERM at save"),
    ("fit, FSDP2, 2 ranks", "one SIGKILL at any time"),
    ("fit, DDP, 3 ranks", "all SIGTERM at save"),
    ("preparation", "one SIGKILL at tokenizing"),
    ("scoring", "one SIGKILL at shard"),
    ("fit, one process", "byte of the newest checkpoint flipped"),
    ("fit, one process", "disk full"),
    ("fit, one process", "teacher missing at a resume in phase 1"),
)


def cases(scenarios: dict[str, Scenario], share: float) -> Iterator[tuple[str, str]]:
    """Yields (scenario, kind) of every case, in the order of their numbers."""
    for scenario in scenarios.values():
        which = (
            ("one", "all") if scenario.ranks > 1 else ("worker", "one") if scenario.name == "preparation" else ("one",)
        )
        kinds = [
            f"{who} {number} at {moment}"
            for moment in ("any time", *scenario.moments)
            for number in ("SIGKILL", "SIGTERM")
            for who in which
        ]
        for i in range(max(1, round(scenario.kills * share))):
            yield scenario.name, kinds[i % len(kinds)]
    fits = [name for name in scenarios if name.startswith("fit")]
    repeats = max(1, round(4 * share))
    for kind in ("newest checkpoint cut off", "byte of the newest checkpoint flipped"):
        yield from ((name, kind) for name in fits for _ in range(repeats))
    yield from ((name, "disk full") for name in scenarios for _ in range(max(1, repeats // 2)))
    for kind in ("removed in phase 1", "missing at a resume in phase 1", "missing at a resume in phase 2"):
        yield from ((name, f"teacher {kind}") for name in fits)


def table(outcomes: list[Outcome]) -> str:
    lines = [
        "| run | fault | cases | same result | one clear error | wrong | slowest end, s |",
        "|---|---|---|---|---|---|---|",
    ]
    groups = Counter((o.scenario, o.kind) for o in outcomes if o.verdict != "not hit")
    for (scenario, kind), count in groups.items():
        own = [o for o in outcomes if (o.scenario, o.kind) == (scenario, kind) and o.verdict != "not hit"]
        verdicts = Counter(o.verdict for o in own)
        good = [verdicts.pop("same result", 0), verdicts.pop("one clear error", 0)]
        wrong = ", ".join(f"{n} {name}" for name, n in verdicts.items()) or "0"
        slowest = max(o.seconds_to_end for o in own)
        lines.append(f"| {scenario} | {kind} | {count} | {good[0]} | {good[1]} | {wrong} | {slowest:.1f} |")
    kills = [o for o in outcomes if " at " in o.kind and "SIG" in o.kind and o.verdict != "not hit"]
    same = sum(o.verdict == "same result" for o in kills)
    done, traces = sum(o.verdict != "not hit" for o in outcomes), sum("traceback" in o.detail for o in kills)
    lines.append(
        f"\n{len(kills)} kills, {same} with the uninterrupted result ({traces} left a traceback of a survivor); "
        f"{done} cases in total; {len(outcomes) - done} more ended before the moment of their fault"
    )
    return "\n".join(lines)


def run_case(campaign: Campaign, number: int, name: str, kind: str) -> Outcome:
    """Runs a case, up to three times if its run ends before the moment of the fault."""
    scenario, run = campaign.scenarios[name], campaign.kill if "SIG" in kind else campaign.fault
    try:
        for attempt in range(3):
            outcome = run(number, scenario, kind, attempt)
            if outcome.verdict != "not hit":
                break
            shutil.rmtree(campaign.folder / f"case-{number:04d}")
        return outcome
    except Exception as error:  # a case that breaks the campaign counts as failed
        return Outcome(number, name, kind, f"campaign: {type(error).__name__}", str(error)[-300:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=220, help="approximate number of kills in total")
    parser.add_argument("--tiny", action="store_true", help="only nine cases, of all kinds")
    parser.add_argument("--only", type=int, nargs="*", help="numbers of the cases to run")
    parser.add_argument("--lanes", type=int, default=2, help="cases that run in parallel")
    parser.add_argument("--folder", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    campaign = Campaign(options.folder or Path(tempfile.mkdtemp(prefix="faults-")))
    numbered = list(enumerate(TINY if options.tiny else cases(campaign.scenarios, options.kills / 220)))
    if options.only:
        numbered = [numbered[number] for number in options.only]
    campaign.prepare(list(dict.fromkeys(name for _, (name, _) in numbered)))
    for name, (_, seconds) in campaign.references.items():
        print(f"{name}: {seconds:.1f} s undisturbed", flush=True)
    random.Random(0).shuffle(numbered)  # so that an unfinished campaign has cases of every kind
    lanes = []
    for lane in range(options.lanes):
        if not (pid := os.fork()):
            with open(campaign.folder / f"outcomes.{lane}", "w") as out:
                for number, (name, kind) in numbered[lane :: options.lanes]:
                    print(json.dumps(asdict(run_case(campaign, number, name, kind))), file=out, flush=True)
            os._exit(0)
        lanes.append(pid)
    for pid in lanes:
        os.waitpid(pid, 0)
    files = sorted(campaign.folder.glob("outcomes.*"))
    outcomes = [Outcome(**json.loads(line)) for file in files for line in file.read_text().splitlines()]
    outcomes.sort(key=lambda outcome: outcome.number)
    print(table(outcomes))
    wrong = [o for o in outcomes if o.verdict not in ("same result", "one clear error", "not hit")]
    for outcome in wrong:
        print(f"case {outcome.number}: {outcome.scenario}, {outcome.kind}: {outcome.verdict}: {outcome.detail}")
    print(f"logs of the wrong cases: {campaign.folder}" if wrong else "nothing was wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
