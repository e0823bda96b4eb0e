"""Finds without a GPU what a GPU would wait for or refuse in a step."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "fake_cuda.py"


CASES = ["llama bf16 packed", "gemma3_text bf16 packed", "olmo3 bf16 packed", "gpt_oss bf16 mask"]


@pytest.fixture(scope="module")
def steps(settings, teacher):
    where = [str(settings["data.source"]), str(settings["data.cache_dir"]), teacher]
    done = subprocess.run([sys.executable, SCRIPT, *where, *CASES], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("g++ cannot build it")
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.skipif(torch.version.cuda is not None or torch.version.hip is not None, reason="torch has its own CUDA")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
@pytest.mark.parametrize("how", CASES)
def test_a_step_reads_nothing_from_a_gpu_and_mixes_no_devices(steps, how):
    assert f"{how}: no sync, no device beside another" in steps.stdout, steps.stderr
