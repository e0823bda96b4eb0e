"""Nine cases of the fault campaign (benchmarks/faults.py): real runs are killed or damaged, then continued."""

import sys
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[1]
SAME, ERROR = (1, 0), (0, 1)
CASES = {
    ("fit, one process", "one SIGKILL at any time"): SAME,
    ("fit, one process", "one SIGTERM at save"): SAME,
    ("fit, FSDP2, 2 ranks", "one SIGKILL at any time"): SAME,
    ("fit, DDP, 3 ranks", "all SIGTERM at save"): SAME,
    ("preparation", "one SIGKILL at tokenizing"): SAME,
    ("scoring", "one SIGKILL at shard"): SAME,
    ("fit, one process", "byte of the newest checkpoint flipped"): SAME,
    ("fit, one process", "disk full"): ERROR,
    ("fit, one process", "teacher missing at a resume in phase 1"): ERROR,
}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory) -> str:
    """Output of the campaign, in a separate process: it forks, and this process has threads."""
    folder = tmp_path_factory.mktemp("faults") / "campaign"
    command = [sys.executable, str(ROOT / "benchmarks/faults.py"), "--tiny", "--folder", str(folder)]
    done = forked.run(command, timeout=280)
    return done.stdout + done.stderr


@pytest.mark.parametrize(("run", "fault"), CASES, ids=[", ".join(case) for case in CASES])
def test_a_fault_costs_nothing_or_is_one_clear_error(campaign, run, fault):
    same, error = CASES[run, fault]
    assert f"| {run} | {fault} | 1 | {same} | {error} | 0 |" in campaign, campaign[-4000:]
