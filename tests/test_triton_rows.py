"""The Triton row pass compared with the plain one: on a GPU, or under Triton's interpreter on a CPU."""

import importlib
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.plugins import HalfPrecision
from test_losses import gradients, make_case, relative_error

from salt_lightning.head import chunked_head
from salt_lightning.head.row_pass import Mix, label_stats, row_pass
from salt_lightning.losses import salt_loss

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
NUMPY = "only 0-dimensional arrays can be converted to Python scalars"
CUDA = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")]
triton = pytest.importorskip("triton")


@pytest.fixture(params=[pytest.param("", marks=pytest.mark.gpu)])
def kernels(monkeypatch):
    """The kernels in blocks of 32, so that small rows take several."""
    if not CUDA and not INTERPRETED:
        pytest.skip("runs in the interpreter's process")
    module = importlib.import_module("salt_lightning.head.triton_rows")
    monkeypatch.setattr(module, "BLOCK", 32)
    return module


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests run here")
def test_under_the_interpreter():
    """Triton decides on import whether to interpret, so these tests run in a separate process."""
    its_numpy_warnings = ["-W", "ignore::RuntimeWarning", "-W", "ignore::DeprecationWarning"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *its_numpy_warnings, __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    if NUMPY in done.stdout:
        pytest.skip("the interpreter of this Triton needs numpy below 2.4")
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


@pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process")
def test_candidate(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["logit_tiles.py", "--tiny"])
    monkeypatch.setattr(sys, "path", sys.path.copy())
    runpy.run_path(str(BENCHMARKS / "logit_tiles.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert out.count("\n| ") == 4, out  # a heading, and three rows: it asserts what they say


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("logits", ["bf16", "fp32"])
@pytest.mark.parametrize("flags", [(True, False, True), (True, True, True), (False, False, True), (True, True, False)])
def test_kernels_compile_for_a_gpu(logits, flags, monkeypatch, tmp_path):
    """Needs no GPU. The interpreter accepts what the compiler refuses, such as a variable that changes its type."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernels = importlib.import_module("salt_lightning.head.triton_rows")
    integers = {"vocab", "width", "student_stride", "teacher_stride", "grad_stride", "sums_stride", "stride"}
    types = {"student": logits, "teacher": logits, "logits": logits, "grad": "bf16", "labels": "i64", "rank": "i64"}
    sizes = {"BLOCK": kernels.BLOCK, "RUN": kernels.LOAD_BYTES // {"bf16": 2, "fp32": 4}[logits]}
    constants = dict(zip(("TEACHER", "SOFTENED", "GRADIENT"), flags, strict=True)) | sizes
    for kernel in (kernels._row_kernel, kernels._label_kernel, kernels._scale_kernel):
        ptx = assert_compiles(kernel, types, integers, constants, kernels.WARPS, aligned=integers - {"vocab"})
        assert not any("bar.sync" in loop or "shfl" in loop for loop in loops(ptx))  # as maxima over all threads need


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, at its import
@pytest.mark.parametrize("flag", [True, False])
def test_candidate_compiles_for_a_gpu(flag, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.syspath_prepend(BENCHMARKS)
    tiles = importlib.import_module("logit_tiles")
    integers = {"num_rows", "vocab", "width", *(f"{n}_stride" for n in ("hidden", "head", "code", "tile", "out"))}
    types = {
        "hidden": "bf16",
        "head": "bf16",
        "labels": "i64",
        "code": "u16",
        "s_code": "u16",
        "t_code": "u16",
        "above": "i32",
    }
    tiling = tiles.TILINGS[0]
    cut = {"ROWS": tiling.rows, "COLUMNS": tiling.columns, "WIDTH": tiling.width, "GROUP": tiling.group}
    for rank in (False, True):
        assert_compiles(tiles._product_kernel, types, integers, {**cut, "RANK": rank, "SOFTENED": flag}, tiling.warps)
    whole_row = {"TEACHER": flag, "TILES": 256, "COLUMNS": tiling.columns, "BLOCK": tiles.BLOCK}
    assert_compiles(tiles._row_kernel, types, integers, whole_row, tiles.WARPS)


def assert_compiles(kernel, types, integers, constants, warps, aligned=()):
    """`aligned`: integers that 16 divides, and then also all addresses, as Triton finds at a launch."""
    signature = {}
    for name in kernel.arg_names:
        scalar = (
            "i32"
            if name in integers
            else {"num_elements": "i64", "inverse_temperature": "fp32", "soft": "fp32"}.get(name)
        )
        signature[name] = "constexpr" if name in constants else scalar or f"*{types.get(name, 'fp32')}"
    values = {(kernel.arg_names.index(k),): v for k, v in constants.items() if k in kernel.arg_names}
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if aligned and (name in aligned or signature[name].startswith("*"))
    }
    source = triton.compiler.ASTSource(kernel, signature, constexprs=values, attrs=attrs)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    options = {
        "num_warps": warps,
        "enable_fp_fusion": True,
    }  # the default so far; Triton 3.9 warns if it is not given
    return triton.compile(source, target=target, options=options).asm["ptx"]


def loops(ptx):
    """The text of each loop: from a label to a later branch back to it."""
    labels = {found[1]: found.start() for found in re.finditer(r"^(\$\w+):", ptx, re.MULTILINE)}
    back = ((labels[found[1]], found.end()) for found in re.finditer(r"\bbra(?:\.uni)?\s+(\$\w+);", ptx))
    return [ptx[start:end] for start, end in back if start < end]


CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # ten units in the last place (1e-6) of the summed logits, which are near 10


def make_rows(dtype, vocab=101, num_rows=9, padded=128, seed=0):
    """Logits of both models as rows of a wider buffer, filled with NaN (except row 3); labels with ignored rows."""
    gen = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(2):
        buffer = torch.full((num_rows, padded), math.nan, dtype=dtype, device=DEVICE)
        buffer[3] = 0
        buffer[:, :vocab] = (torch.randn(num_rows, vocab, generator=gen) * 3).to(DEVICE, dtype)
        rows.append(buffer[:, :vocab])
    labels_C = torch.randint(0, vocab, (num_rows,), generator=gen)
    labels_C[[0, 4]] = -100
    labels_C[1] = int(rows[0][1].argmax())  # one correct token
    rows[1][1, labels_C[1]] = 50  # also for the teacher
    return *rows, labels_C.to(DEVICE)


def make_mix(kd_weight, temperature):
    return Mix(torch.tensor(kd_weight, device=DEVICE), torch.tensor(0.2, device=DEVICE), temperature)


def run(kernels, logits, labels_C, mix, grad_CV):
    sums_7C = torch.full((7, len(labels_C)), math.nan, device=DEVICE)
    kernels.fill_rows(logits, labels_C, mix, sums_7C, grad_CV)
    return sums_7C


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kd_weight", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("vocab", [101, 96])
def test_fp32_rows_are_the_plain_ones(kernels, temperature, kd_weight, vocab):
    student_CV, teacher_CV, labels_C = make_rows(torch.float32, vocab)
    mix = make_mix(kd_weight, temperature)
    sums_7C, grad_CV = row_pass(student_CV, teacher_CV, labels_C, mix, True)
    buffer = torch.full((9, 128), math.nan, device=DEVICE)
    ours_CV = buffer[:, :vocab]
    ours_7C = run(kernels, [student_CV, teacher_CV], labels_C, mix, ours_CV)
    # beyond a row, only what wide stores need is written, and only up to the next row
    assert (buffer[:, vocab:] == 0).all() if vocab % 16 else buffer[:, vocab:].isnan().all()
    assert relative_error(ours_CV, grad_CV) <= 1e-6  # fp32, exponents of up to 40 in base 2
    assert torch.allclose(ours_7C, sums_7C, **CLOSE)
    assert sums_7C[4].sum() > 0  # the two models agree somewhere: both ways of finding it are tested


@pytest.mark.parametrize("accuracy", ["bf16 logits in place", "fp32 logits"])
@pytest.mark.parametrize("with_teacher", [True, False])
def test_bf16_gradient(kernels, accuracy, with_teacher):
    dtype = torch.bfloat16 if accuracy == "bf16 logits in place" else torch.float32
    student_CV, teacher_CV, labels_C = make_rows(dtype)
    mix = make_mix(0.4 if with_teacher else 0.0, 1.0)
    logits = [student_CV, teacher_CV] if with_teacher else [student_CV]
    expected_7C, expected_CV = row_pass(student_CV, teacher_CV if with_teacher else None, labels_C, mix, True)
    grad_CV = student_CV if dtype == torch.bfloat16 else torch.full_like(student_CV, math.nan, dtype=torch.bfloat16)
    sums_7C = run(kernels, logits, labels_C, mix, grad_CV)
    # Half a unit in the last place of bf16 is 2^-9 of the value; the interpreter truncates, which doubles it.
    assert relative_error(grad_CV, expected_CV) <= (2**-9 if CUDA else 2**-8)
    assert torch.allclose(sums_7C, expected_7C, **CLOSE)


@pytest.mark.parametrize("broken", [None, "sums", "gradient", "losses", "ranks"])
def test_the_kernels_are_tried_before_they_are_used(kernels, broken, monkeypatch):
    def off(function, of_one):
        wrong = [broken in of_one and broken == name for name in of_one]
        return lambda *args: tuple(2 * x + 1 if w else x for x, w in zip(function(*args), wrong, strict=True))

    monkeypatch.setattr(kernels.plain, "row_pass", off(row_pass, ("sums", "gradient")))
    monkeypatch.setattr(kernels.plain, "label_stats", off(label_stats, ("losses", "ranks")))
    with HalfPrecision("bf16-true").train_step_context():  # bf16 is the default dtype in there
        assert kernels.fault(torch.device(DEVICE)) == (broken and f"wrong values ({broken})")


@pytest.mark.parametrize(
    "error", [ImportError("no triton for this torch"), RuntimeError("Failed to find C compiler.\n")]
)
def test_without_kernels_that_run_the_plain_pass_is_taken_and_said(error, monkeypatch):
    def raises(name):
        raise error

    monkeypatch.setattr(chunked_head.importlib, "import_module", raises)
    first = str(error).strip()
    with pytest.warns(UserWarning, match=f"runs without its Triton kernels, .*: {type(error).__name__}: {first}"):
        assert chunked_head._triton_rows.__wrapped__() is None
    error = torch.OutOfMemoryError("CUDA out of memory")  # tells nothing of the kernels
    with pytest.raises(torch.OutOfMemoryError):
        chunked_head._triton_rows.__wrapped__()


def test_rows_that_touch_stay_apart(kernels):
    """Contiguous rows of a vocabulary that no wide load fits: the kernels must not write beyond them."""
    student_CV, teacher_CV, labels_C = (t.contiguous() for t in make_rows(torch.float32))
    mix, around = make_mix(0.4, 1.0), torch.full((11, 101), math.nan, device=DEVICE)
    expected_CV = row_pass(student_CV, teacher_CV, labels_C, mix, True)[1]
    run(kernels, [student_CV, teacher_CV], labels_C, mix, around[1:10])
    assert relative_error(around[1:10], expected_CV) <= 1e-6
    assert around[[0, 10]].isnan().all()


def test_no_gradient_gives_the_same_sums(kernels):
    student_CV, teacher_CV, labels_C = make_rows(torch.float32)
    mix = make_mix(0.4, 2.0)
    before = student_CV.clone()
    sums_7C = run(kernels, [student_CV, teacher_CV], labels_C, mix, None)
    assert torch.allclose(sums_7C, row_pass(student_CV, teacher_CV, labels_C, mix, False)[0], **CLOSE)
    assert torch.equal(student_CV, before)


def test_masked_vocabulary_and_broken_rows(kernels):
    student_CV, teacher_CV, labels_C = make_rows(torch.float32)
    labels_C[labels_C >= 90] = 3
    student_CV[:, 90:] = -math.inf
    teacher_CV[:, 90:] = -math.inf
    mix = make_mix(0.4, 1.0)
    cut = row_pass(student_CV[:, :90], teacher_CV[:, :90], labels_C, mix, True)
    student_CV[2, 5] = math.nan  # must show in the result, not vanish
    labels_C[3] = 101  # outside the vocabulary: must be neither read nor ignored
    grad_CV = torch.full_like(student_CV, 7.0)
    sums_7C = run(kernels, [student_CV, teacher_CV], labels_C, mix, grad_CV)
    good = [0, 1, 4, 5, 6, 7, 8]
    assert torch.allclose(sums_7C[:, good], cut[0][:, good], **CLOSE)
    assert torch.allclose(grad_CV[good][:, :90], cut[1][good], rtol=1e-5, atol=1e-7)
    assert (grad_CV[good][:, 90:] == 0).all()
    assert sums_7C[0, 2].isnan()
    assert sums_7C[0, 3].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_label_stats_are_the_plain_ones(kernels, dtype):
    logits_CV, _, labels_C = make_rows(dtype)
    nll_C, rank_C = kernels.label_stats(logits_CV, labels_C)
    expected_nll_C, expected_rank_C = label_stats(logits_CV.float(), labels_C)
    assert torch.allclose(nll_C, expected_nll_C, **CLOSE)
    assert torch.equal(rank_C, expected_rank_C)


@pytest.mark.parametrize("mask", [-math.inf, torch.finfo(torch.bfloat16).min])
def test_the_rank_of_a_label_that_is_masked(kernels, mask):
    logits_CV = torch.randn(2, 101, device=DEVICE)
    logits_CV[:, 90:] = mask
    labels_C = torch.tensor([3, 95], device=DEVICE)
    assert torch.equal(kernels.label_stats(logits_CV, labels_C)[1], label_stats(logits_CV, labels_C)[1])


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scale_in_place(kernels, factor, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "SCALERS", 2)  # for five blocks
    grad = torch.randn(3, 45, device=DEVICE).to(dtype)
    expected = grad * factor
    assert kernels.scale_in_place(grad, torch.tensor(factor, device=DEVICE)) is grad
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("case", [pytest.param(None, marks=gpu)])
def test_offsets_beyond_31_bits(case):
    student_CV = torch.zeros(8400, 256_000, dtype=torch.bfloat16, device="cuda")  # 2^31 = 8388 rows
    student_CV[-1, 7] = 10.0
    labels_C = torch.full((8400,), 7, device="cuda")
    sums_7C = torch.full((7, 8400), math.nan, device="cuda")
    importlib.import_module("salt_lightning.head.triton_rows").fill_rows(
        [student_CV], labels_C, make_mix(0.0, 1.0), sums_7C, student_CV
    )
    assert sums_7C[0, 0].item() == pytest.approx(math.log(256_000), rel=1e-5)
    assert sums_7C[0, -1].item() == pytest.approx(math.log(255_999 + math.exp(10)) - 10, rel=1e-5)
    assert student_CV[-1, 7].item() < 0 < student_CV[-1, 8].item()


def gpu_case():
    case = make_case(torch.bfloat16, "cuda", num_tokens=300, vocab=1000, widths=(64, 32))
    return case, torch.tensor(0.4, device="cuda")


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("accuracy", [pytest.param(a, marks=gpu) for a in ("accurate", "fast")])
def test_nothing_waits_for_the_device(accuracy):
    case, weight = gpu_case()
    salt_loss(**case, kd_weight=weight, accuracy=accuracy).loss.backward()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        salt_loss(**case, kd_weight=weight, accuracy=accuracy, chunk_tokens=128).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("accuracy", [pytest.param(a, marks=gpu) for a in ("accurate", "fast")])
def test_replays_from_a_cuda_graph_with_a_new_weight(accuracy):
    case, weight = gpu_case()

    def step():
        out = salt_loss(**case, kd_weight=weight, accuracy=accuracy, chunk_tokens=128)
        return out.loss, *gradients(out.loss, case).values()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    weight.fill_(0.9)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


@pytest.mark.parametrize("accuracy", [pytest.param(a, marks=gpu) for a in ("accurate", "fast")])
def test_the_kernels_and_the_plain_row_pass_give_the_same_loss(accuracy, monkeypatch):
    case, weight = gpu_case()
    ours = salt_loss(**case, kd_weight=weight, accuracy=accuracy, teacher_temperature=2.0)
    our_grads = gradients(ours.loss, case)
    monkeypatch.setattr("salt_lightning.head.chunked_head._triton_rows", lambda: None)
    plain = salt_loss(**case, kd_weight=weight, accuracy=accuracy, teacher_temperature=2.0)
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(ours, plain, strict=True))
    for name, grad in gradients(plain.loss, case).items():
        assert relative_error(our_grads[name], grad) <= 2**-9


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")  # torch's own, at its import
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning")
@pytest.mark.parametrize("mode", [pytest.param(m, marks=gpu) for m in ("default", "reduce-overhead")])
def test_beside_a_compiled_model(mode):
    case, weight = gpu_case()
    model = torch.nn.Linear(64, 64, device="cuda", dtype=torch.bfloat16)
    x = case.pop("student_hidden_ND").detach()

    def step(forward):
        out = salt_loss(forward(x), **case, kd_weight=weight)
        return torch.autograd.grad(out.loss, [model.weight, case["student_head_VD"]])

    compiled = torch.compile(model, mode=mode)
    eager = step(model)
    for _ in range(3):  # records a graph on the second call, replays it on the third
        assert all(relative_error(c, e) <= 2**-7 for c, e in zip(step(compiled), eager, strict=True))
