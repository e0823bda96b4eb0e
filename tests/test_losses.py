"""salt_loss and token_stats compared with the float64 formulas, with every uninitialized tensor filled with NaN."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import salt_reference, stats_reference
from torch.utils._python_dispatch import TorchDispatchMode

from salt_lightning.errors import ConfigError
from salt_lightning.head.chunked_head import CPU_BLOCK_ELEMENTS, Plan, chunk_and_strip_rows, rows_and_dtypes
from salt_lightning.head.row_pass import Mix, row_pass
from salt_lightning.losses import SaltLoss, salt_loss, token_stats

N, D, E, V = 37, 16, 24, 101  # nothing divides anything
EXACT = 1e-11  # float64 inputs: only the order of sums differs from the reference
FP32 = 2e-6  # about 30 units in the last place (6e-8) over sums of a few hundred terms
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
    ),
]


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """Memory that the loss allocates and forgets to write shows up as NaN."""
    for name in ("empty", "empty_like"):
        real = getattr(torch, name)

        def fill(*args, real=real, **kwargs):
            made = real(*args, **kwargs)
            return made.fill_(math.nan) if made.is_floating_point() else made

        monkeypatch.setattr(torch, name, fill)
    assert torch.empty(3).isnan().all()


def make_case(dtype=torch.float64, device="cpu", seed=0, num_tokens=N, vocab=V, widths=(D, E), logit_std=2.0):
    """Random inputs by salt_loss's argument names; every fifth label is ignored."""
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape, std=1.0):
        return (torch.randn(*shape, generator=gen, dtype=torch.float64) * std).to(device, dtype)

    student_width, teacher_width = widths
    labels_N = torch.randint(0, vocab, (num_tokens,), generator=gen)
    labels_N[::5] = -100
    return {
        "student_hidden_ND": draw(num_tokens, student_width).requires_grad_(),
        "student_head_VD": draw(vocab, student_width, std=logit_std / student_width**0.5).requires_grad_(),
        "labels_N": labels_N.to(device),
        "teacher_hidden_NE": draw(num_tokens, teacher_width),
        "teacher_head_VE": draw(vocab, teacher_width, std=logit_std / teacher_width**0.5),
        "student_bias_V": draw(vocab).requires_grad_(),
        "teacher_bias_V": draw(vocab),
    }


def without_teacher(case):
    return {k: v for k, v in case.items() if not k.startswith("teacher")}


def trainable(case):
    return {k: v for k, v in case.items() if v.requires_grad}


def upcast(case, through=None):
    """The same case in float64 on the CPU, with matrices rounded to a dtype first."""

    def convert(t):
        t = t.detach().cpu().to(through if through and t.dim() == 2 else t.dtype)
        return t.double() if t.is_floating_point() else t

    return {k: convert(v).requires_grad_(v.requires_grad) for k, v in case.items()}


def gradients(loss, case):
    leaves = trainable(case)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def relative_error(value, truth):
    truth = truth.detach().double().cpu()
    error = (value.detach().double().cpu() - truth).norm()
    return (error / truth.norm().clamp(min=1e-300)).item() if truth.norm() > 0 else error.item()


def assert_matches_reference(case, tolerance, **options):
    out = salt_loss(**case, **options)
    choices = {k: options[k] for k in ("kd_weight", "teacher_temperature", "num_tokens") if k in options}
    exact = upcast(case)
    truth = salt_reference(**exact, **choices)
    for name in SaltLoss._fields:
        assert relative_error(getattr(out, name), truth[name]) <= tolerance, name
    expected = gradients(truth["loss"], exact)
    for name, grad in gradients(out.loss, case).items():
        assert grad.dtype == case[name].dtype
        assert relative_error(grad, expected[name]) <= tolerance, name
    return out


# ---- values and gradients


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
@pytest.mark.parametrize("kd_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_tokens", [None, 1, 10])
def test_values_and_gradients_are_the_formula(temperature, kd_weight, chunk_tokens):
    options = {"teacher_temperature": temperature, "kd_weight": kd_weight, "chunk_tokens": chunk_tokens}
    out = assert_matches_reference(make_case(), EXACT, **options)
    assert out.loss.requires_grad
    assert not any(t.requires_grad for t in out[1:])
    assert all(t.dim() == 0 for t in out)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_tokens", [None, 3])
@pytest.mark.parametrize("biases", [True, False])
def test_ids_that_the_teachers_head_lacks_have_no_probability(dtype, device, chunk_tokens, biases):
    case, rows = make_case(dtype, device), V - 7
    case["teacher_head_VE"], case["teacher_bias_V"] = case["teacher_head_VE"][:rows], case["teacher_bias_V"][:rows]
    case["labels_N"] = case["labels_N"].clamp(max=rows - 1)
    if not biases:
        del case["teacher_bias_V"]
    options = {"kd_weight": 0.4, "teacher_temperature": 1.5, "chunk_tokens": chunk_tokens}
    assert_matches_reference(case, EXACT if dtype == torch.float64 else FP32, **options)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("biases", [True, False])
def test_fp32_is_the_formula(device, temperature, biases):
    case = make_case(torch.float32, device)
    if not biases:
        del case["student_bias_V"], case["teacher_bias_V"]
    assert_matches_reference(case, FP32, teacher_temperature=temperature, kd_weight=0.6, chunk_tokens=10)


@pytest.mark.parametrize("chunk_tokens", [None, 10])
def test_plain_phase_is_cross_entropy(chunk_tokens):
    out = assert_matches_reference(without_teacher(make_case()), EXACT, chunk_tokens=chunk_tokens)
    assert out.kd_sum == out.teacher_ce_sum == out.teacher_entropy_sum == 0
    assert out.agree_sum == out.student_better_sum == 0


def test_a_weight_tensor_counts_like_the_number_and_not_at_all_without_teacher():
    case = make_case()
    weight = torch.tensor(0.3, dtype=torch.float64)
    assert torch.equal(salt_loss(**case, kd_weight=weight).loss, salt_loss(**case, kd_weight=0.3).loss)
    plain = without_teacher(case)
    assert torch.equal(salt_loss(**plain, kd_weight=weight).loss, salt_loss(**plain).loss)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, EXACT), (torch.float32, FP32)])
def test_several_strips_in_several_chunks(device, teacher, dtype, tolerance, monkeypatch):
    """As with a budget at real sizes: the gradient of a chunk is collected from strips of logits."""
    for name, rows in (("MIN_ROWS", 15), ("MIN_CHUNK_ROWS", 15), ("MIN_STRIP_ROWS", 4), ("TILE_ROWS", 2)):
        monkeypatch.setattr(f"salt_lightning.head.chunked_head.{name}", rows)
    case = make_case(dtype, device)
    if not teacher:
        case = without_teacher(case)
    options = {"kd_weight": 0.6 if teacher else 0.0, "logits_budget_gib": 1e-9}
    with _Products() as products:
        salt_loss(**case, **options)
    # KD: 2 chunks of 20 rows in strips of 10. Plain: 3 chunks of 14, with logits stored where the gradient will be.
    assert products.count == (2 * 4 + 2 * 2 if teacher else 3 + 2 * 3)
    assert_matches_reference(case, tolerance, **options)


@pytest.mark.parametrize("num_tokens", [50, 12.5, torch.tensor(50), torch.tensor(12.5)])
def test_num_tokens_is_the_denominator(num_tokens):
    assert_matches_reference(make_case(), EXACT, kd_weight=0.4, num_tokens=num_tokens)


def test_a_teacher_in_float64_beside_a_student_in_fp32():
    case = make_case(torch.float32)
    case |= {name: case[name].double() for name in ("teacher_hidden_NE", "teacher_head_VE", "teacher_bias_V")}
    assert_matches_reference(case, FP32, kd_weight=0.4, teacher_temperature=2.0)


def test_the_denominator_0_counts_as_1():
    losses = [salt_loss(**make_case(), kd_weight=0.4, num_tokens=num_tokens).loss for num_tokens in (0, 1, 0.5)]
    assert losses[0] == losses[1] == losses[2] / 2 > 0


@pytest.mark.parametrize("num_tokens", [None, 7, 0])
@pytest.mark.parametrize("device", DEVICES)
def test_all_masked_is_zero_without_nan(num_tokens, device):
    case = make_case(torch.float32, device)
    case["labels_N"].fill_(-100)
    out = salt_loss(**case, kd_weight=0.5, num_tokens=num_tokens, chunk_tokens=10)
    assert all(t == 0 for t in out)
    assert all((grad == 0).all() for grad in gradients(out.loss, case).values())


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_no_token_and_one_token(num_tokens):
    case = make_case(num_tokens=num_tokens)
    case["labels_N"].fill_(3)
    assert_matches_reference(case, EXACT, kd_weight=0.5)


def test_ignored_rows_get_no_gradient_and_their_values_do_not_count():
    case = make_case()
    before = salt_loss(**case, kd_weight=0.5)
    ignored_N = case["labels_N"] == -100
    changed = {**case, "student_hidden_ND": case["student_hidden_ND"].detach().clone().requires_grad_()}
    changed["student_hidden_ND"].data[ignored_N] = 1e30
    after = salt_loss(**changed, kd_weight=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (gradients(after.loss, changed)["student_hidden_ND"][ignored_N] == 0).all()


def test_gradient_reaches_a_tied_embedding_from_both_ends():
    case = make_case()
    tokens_N = torch.arange(N) % V

    def loss_of(head_VD, loss):
        tied = {**case, "student_head_VD": head_VD, "student_hidden_ND": torch.tanh(head_VD[tokens_N])}
        return loss(**tied, kd_weight=0.4)

    ours = case["student_head_VD"].detach().clone().requires_grad_()
    loss_of(ours, salt_loss).loss.backward()
    truth = case["student_head_VD"].detach().clone().requires_grad_()
    loss_of(truth, salt_reference)["loss"].backward()
    assert relative_error(ours.grad, truth.grad) <= EXACT


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])  # bf16 needs a cast
def test_incoming_gradient_scales_and_a_second_backward_is_refused(dtype):
    case = make_case(dtype)
    once = gradients(salt_loss(**case, kd_weight=0.4).loss, case)
    out = salt_loss(**case, kd_weight=0.4)
    scaled = torch.autograd.grad(out.loss * 4.0, list(trainable(case).values()), retain_graph=True)
    assert all(relative_error(s, 4.0 * o) <= EXACT for s, o in zip(scaled, once.values(), strict=True))
    with pytest.raises(RuntimeError, match="twice"):
        out.loss.backward()


@pytest.mark.parametrize("factor", [1.0, torch.tensor(2.0, requires_grad=True)])
def test_second_derivatives_are_refused(factor):
    """Also where the incoming gradient has no graph: they would lack the head's part."""
    case = make_case()
    loss = salt_loss(**{**case, "student_hidden_ND": case["student_hidden_ND"].tanh()}, kd_weight=0.4).loss
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss * factor, case["student_hidden_ND"], create_graph=True)


class _Products(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("wanted", "num_products"),  # both logits, and one for the gradient of hidden states or head
    [
        ({"student_hidden_ND"}, 3),
        ({"student_head_VD"}, 3),
        ({"student_bias_V"}, 2),
        ({"student_head_VD", "student_bias_V"}, 3),
    ],
)
def test_only_what_needs_a_gradient_gets_one(wanted, num_products):
    case = make_case()
    full = gradients(salt_loss(**case, kd_weight=0.4).loss, case)
    for name in full.keys() - wanted:
        case[name].requires_grad_(False)
    with _Products() as products:
        part = gradients(salt_loss(**case, kd_weight=0.4).loss, case)
    assert products.count == num_products
    assert part.keys() == wanted
    assert all(torch.equal(grad, full[name]) for name, grad in part.items())


def test_without_grad_the_values_are_the_same():
    case = make_case()
    with_grad = salt_loss(**case, kd_weight=0.4, chunk_tokens=10)
    with torch.no_grad(), _Products() as products:
        out = salt_loss(**case, kd_weight=0.4, chunk_tokens=10)
    assert products.count == 2 * 4  # logits of four chunks, no gradients
    assert not out.loss.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(out, with_grad, strict=True))


def test_masked_vocabulary_by_an_infinite_bias():
    case = make_case()
    case["labels_N"].clamp_(max=V - 10)
    for name in ("student_bias_V", "teacher_bias_V"):
        case[name].data[-9:] = -math.inf
    out = salt_loss(**case, kd_weight=0.5)
    cut = {k: v if k.endswith(("ND", "NE", "_N")) else v[:-9] for k, v in case.items()}
    assert relative_error(out.loss, salt_reference(**cut, kd_weight=0.5)["loss"]) <= EXACT
    assert all(grad.isfinite().all() for grad in gradients(out.loss, case).values())


def test_among_equal_logits_every_top_token_counts():
    hidden_ND, labels_N = torch.ones(4, 1), torch.tensor([1, 2, 0, -100])
    student_VD, teacher_VE = (torch.tensor(logits)[:, None] for logits in ([1.0, 2.0, 2.0], [2.0, 0.0, 2.0]))
    out = salt_loss(hidden_ND, student_VD, labels_N, hidden_ND, teacher_VE, kd_weight=0.5)
    assert out.correct_sum == 2  # 1 and 2
    assert out.agree_sum == 3  # on 2
    same = salt_loss(hidden_ND, student_VD, labels_N, hidden_ND, student_VD, kd_weight=0.5)
    assert (same.agree_sum, same.student_better_sum) == (3, 0)


@settings(max_examples=30, deadline=None)
@given(
    num_tokens=st.integers(1, 20),
    vocab=st.integers(1, 30),
    chunk_tokens=st.integers(1, 25),
    kd_weight=st.floats(0, 1),
    temperature=st.floats(0.1, 10),
    logit_std=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_any_sizes_and_weights(num_tokens, vocab, chunk_tokens, kd_weight, temperature, logit_std, seed):
    case = make_case(seed=seed, num_tokens=num_tokens, vocab=vocab, widths=(3, 5), logit_std=logit_std)
    # Loss and gradients may cancel to almost nothing, so errors are relative to the terms, not the result.
    options = {"kd_weight": kd_weight, "teacher_temperature": temperature}
    out = salt_loss(**case, **options, chunk_tokens=chunk_tokens)
    truth = salt_reference(**case, **options)
    # Which of two losses that both round to 0 is lower depends on how they round: 1e-12 is 30 units of logits of 150.
    names = [("student_hidden_ND", "student_head_VD"), ("teacher_hidden_NE", "teacher_head_VE")]
    nlls = [
        stats_reference(*(case[name].detach() for name in (*two, "labels_N", f"{two[0][:7]}_bias_V")))[0]
        for two in names
    ]
    ties = ((nlls[0] - nlls[1]).abs() <= 1e-12)[case["labels_N"] != -100].sum().item()
    for name in SaltLoss._fields:
        may_differ = ties if name == "student_better_sum" else 1e-9
        assert getattr(out, name).item() == pytest.approx(truth[name].item(), rel=1e-9, abs=may_differ), name
    expected = gradients(truth["loss"], case)
    for name, grad in gradients(out.loss, case).items():
        assert torch.allclose(grad, expected[name], rtol=1e-9, atol=1e-9), name


# ---- numerics of 16 bits


def close_teacher(case, noise=0.03):
    """A teacher that nearly equals the student, where rounded logits do the most harm."""
    gen = torch.Generator().manual_seed(1)
    near = dict(case)
    for student, teacher in (
        ("student_hidden_ND", "teacher_hidden_NE"),
        ("student_head_VD", "teacher_head_VE"),
    ):
        value = case[student].detach()
        shift = torch.randn(value.shape, generator=gen, dtype=torch.float64).to(value) * value.std() * noise
        near[teacher] = value + shift
    near["teacher_bias_V"] = case["student_bias_V"].detach()
    return near


def naive_fp32_logits(case, kd_weight, teacher_temperature):
    """Full fp32 logits of 16-bit inputs; their gradient is rounded for the products, as in autograd."""
    hidden_ND, head_VD = case["student_hidden_ND"].detach(), case["student_head_VD"].detach()
    valid_N = case["labels_N"] != -100
    logits_NV = (hidden_ND.double() @ head_VD.double().T).float() + case["student_bias_V"].detach().float()
    teacher_NV = (case["teacher_hidden_NE"].double() @ case["teacher_head_VE"].double().T).float()
    logits_NV.requires_grad_()
    log_p_NV = logits_NV.log_softmax(1)
    q_NV = ((teacher_NV + case["teacher_bias_V"].float()) / teacher_temperature).softmax(1)
    nll_N = -log_p_NV[torch.arange(len(valid_N)), case["labels_N"].clamp(min=0)]
    rows_N = (1 - kd_weight) * nll_N - kd_weight * (q_NV * log_p_NV).sum(1)
    (grad_NV,) = torch.autograd.grad((rows_N * valid_N).sum() / valid_N.sum(), logits_NV)
    grad_NV = grad_NV.to(hidden_ND.dtype).double()
    return {
        "student_hidden_ND": (grad_NV @ head_VD.double()).to(hidden_ND.dtype),
        "student_head_VD": (grad_NV.T @ hidden_ND.double()).to(hidden_ND.dtype),
        "student_bias_V": grad_NV.sum(0).to(hidden_ND.dtype),
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("teacher", ["far", "near"])
@pytest.mark.parametrize("shift", [0.0, -40.0])
def test_accurate_bf16_is_as_good_as_fp32_logits(device, teacher, shift):
    case = make_case(torch.bfloat16, num_tokens=512, vocab=2003, widths=(64, 64), logit_std=3.0)
    case["student_bias_V"].data += shift  # a common offset of all logits changes nothing, but coarse storage would
    weight = 0.667 if teacher == "far" else 1.0
    if teacher == "near":
        case = close_teacher(case)
    naive = naive_fp32_logits(case, weight, 1.0)
    upcast = {k: v.detach().double().requires_grad_() if v.is_floating_point() else v for k, v in case.items()}
    truth = gradients(salt_reference(**upcast, kd_weight=weight)["loss"], {k: upcast[k] for k in trainable(case)})
    on_device = {k: v.detach().to(device).requires_grad_(v.requires_grad) for k, v in case.items()}
    out = salt_loss(**on_device, kd_weight=weight, chunk_tokens=128)
    for name, grad in gradients(out.loss, on_device).items():
        assert relative_error(grad, truth[name]) <= 1.2 * relative_error(naive[name], truth[name]), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("accuracy", ["accurate", "fast"])
def test_bf16_inputs_of_either_accuracy(device, accuracy):
    case = make_case(torch.bfloat16, device)
    # Rounding a logit near 8 to bf16 moves it by up to 2^-6, and so every probability by about 1.6%.
    tolerance = 2**-8 if accuracy == "accurate" and device == "cpu" else 2**-6
    exact = upcast(case)
    options = {"kd_weight": 0.5, "chunk_tokens": 10}
    out = salt_loss(**case, **options, accuracy=accuracy)
    truth = salt_reference(**exact, kd_weight=0.5)
    assert relative_error(out.loss, truth["loss"]) <= tolerance
    expected = gradients(truth["loss"], exact)
    for name, grad in gradients(out.loss, case).items():
        assert grad.dtype == torch.bfloat16
        assert relative_error(grad, expected[name]) <= tolerance


@pytest.mark.parametrize("teacher_dtype", [torch.bfloat16, torch.float32])
def test_teacher_and_student_may_differ_in_dtype(teacher_dtype):
    case = make_case(torch.float32)
    for name in ("teacher_hidden_NE", "teacher_head_VE", "teacher_bias_V"):
        case[name] = case[name].to(teacher_dtype)
    assert_matches_reference(case, FP32, kd_weight=0.6, chunk_tokens=10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float32])
def test_autocast_computes_in_its_dtype_and_returns_the_inputs_dtype(device, hidden_dtype):
    case = make_case(torch.float32, device)
    case["student_hidden_ND"] = case["student_hidden_ND"].detach().to(hidden_dtype).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        out = salt_loss(**case, kd_weight=0.5)
    rounded = upcast(case, through=torch.bfloat16 if device == "cuda" else None)  # a CPU computes in fp32
    truth = salt_reference(**rounded, kd_weight=0.5)
    assert relative_error(out.loss, truth["loss"]) <= 1e-5
    expected = gradients(truth["loss"], rounded)
    for name, grad in gradients(out.loss, case).items():
        assert grad.dtype == case[name].dtype
        assert relative_error(grad, expected[name]) <= 2**-8, name


# ---- memory and compilers


class _LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("mode", ["kd", "plain", "no_grad", "stats"])
def test_no_tensor_is_larger_than_a_chunk_of_logits(mode):
    case = make_case(num_tokens=400, vocab=300, widths=(4, 4))
    if mode == "plain":
        case = without_teacher(case)
    with _LargestTensor() as largest, torch.set_grad_enabled(mode not in ("no_grad", "stats")):
        if mode == "stats":
            names = ("teacher_hidden_NE", "teacher_head_VE", "labels_N")
            token_stats(*(case[n] for n in names), chunk_tokens=16)
        else:
            out = salt_loss(**case, chunk_tokens=16)
        if mode in ("kd", "plain"):
            gradients(out.loss, case)
    assert largest.elements == 16 * 300


@pytest.mark.parametrize(
    ("num_rows", "grad_bytes", "strip_bytes", "expected"),
    [
        (8192, 100, 100, (8192, 8192)),  # all fits
        (8192, 100, 800, (8192, 1280)),  # all rows, with room for the logits of a few
        (8193, 200, 0, (4224, 4224)),  # one row too many: two chunks, rounded up to whole tiles
        (16384, 200, 200, (5504, 1920)),  # three chunks; room for 2,688 rows of logits: three strips of each
        (1000, 1000, 600, (1000, 1000)),
        (8192, 0, 800, (8192, 2048)),  # no gradient: strips only
        (0, 4, 4, (1, 1)),
    ],
)
def test_chunks_and_strips_fill_the_budget(num_rows, grad_bytes, strip_bytes, expected):
    budget = 8192 * 200 / 2**30
    assert chunk_and_strip_rows(num_rows, grad_bytes, strip_bytes, budget, None) == expected
    fixed = max(1, min(num_rows, 100))
    assert chunk_and_strip_rows(num_rows, grad_bytes, strip_bytes, budget, 100) == (fixed, fixed)


BF16, WIDE = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("accuracy", "compute", "with_grad", "buffers", "row_bytes"),  # a row's bytes: of the gradient, of the logits
    [
        ("accurate", [BF16, BF16], True, [WIDE, WIDE], (2, 4 + 4)),
        ("accurate", [BF16, WIDE], True, [WIDE, WIDE], (2, 4 + 4)),
        ("accurate", [BF16], True, [WIDE], (2, 4)),
        ("accurate", [BF16, BF16], False, [WIDE, WIDE], (0, 4 + 4)),
        ("fast", [BF16, BF16], True, [BF16], (2, 2)),  # the gradient overwrites the student's logits
        ("fast", [BF16, WIDE], True, [WIDE], (2, 4)),
        ("fast", [BF16], True, [], (2, 0)),
        ("fast", [BF16, BF16], False, [BF16, BF16], (0, 2 + 2)),
        ("accurate", [WIDE, WIDE], True, [WIDE], (4, 4)),
        ("accurate", [WIDE, WIDE], False, [WIDE, WIDE], (0, 4 + 4)),
    ],
)
def test_what_a_row_takes_in_memory(accuracy, compute, with_grad, buffers, row_bytes):
    vocab, budget_gib = 1000, 0.01
    rows, dtypes = rows_and_dtypes(8192, vocab, compute, Plan(accuracy, budget_gib, None, compute[0], with_grad))
    assert dtypes == buffers
    assert rows == chunk_and_strip_rows(8192, *(vocab * size for size in row_bytes), budget_gib, None)


@given(
    num_rows=st.integers(1, 40_000),
    student_bytes=st.sampled_from([2, 4]),
    teacher_bytes=st.sampled_from([0, 2, 4]),
    grad_bytes=st.sampled_from([0, 2, 4]),
    budget_bytes=st.integers(0, 500_000),
)
def test_any_chunk_keeps_the_budget(num_rows, student_bytes, teacher_bytes, grad_bytes, budget_bytes):
    grad_bytes = min(grad_bytes, student_bytes)
    in_place = grad_bytes == student_bytes
    strip_bytes = teacher_bytes + (0 if in_place else student_bytes)
    chunk, strip = chunk_and_strip_rows(num_rows, grad_bytes, strip_bytes, budget_bytes / 2**30, None)
    granted = [min(num_rows, 2048) * (grad_bytes + strip_bytes)]
    granted.append(min(num_rows, 4096) * grad_bytes + min(num_rows, 1024) * strip_bytes)
    assert chunk * grad_bytes + strip * strip_bytes <= max(budget_bytes, *granted)
    assert 1 <= strip <= chunk <= num_rows
    least = 4096 if grad_bytes else 1024
    assert chunk >= min(num_rows, least) or -(-num_rows // chunk) == -(-num_rows // least)
    assert strip >= min(chunk, 1024) or -(-chunk // strip) == -(-chunk // 1024)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo inspects it
def test_beside_torch_compile():
    case = make_case(torch.float32)

    @torch.compile(backend="eager")
    def step(hidden_ND):
        return salt_loss(**{**case, "student_hidden_ND": hidden_ND * 1.0}, kd_weight=0.4).loss * 1.0

    assert torch.equal(step(case["student_hidden_ND"]), salt_loss(**case, kd_weight=0.4).loss)


# ---- token_stats


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_tokens", [None, 10])
@pytest.mark.parametrize("with_bias", [True, False])
def test_token_stats_are_the_formula(device, dtype, chunk_tokens, with_bias):
    case = make_case(dtype, device)
    bias_V = case["student_bias_V"] if with_bias else None
    args = case["student_hidden_ND"], case["student_head_VD"], case["labels_N"], bias_V
    nll_N, rank_N = token_stats(*args, chunk_tokens=chunk_tokens)
    true_nll_N, true_rank_N = stats_reference(*(None if a is None else a.detach().cpu() for a in args))
    assert not nll_N.requires_grad
    assert (nll_N.dtype, rank_N.dtype) == (torch.float32, torch.int64)
    assert relative_error(nll_N, true_nll_N) <= FP32
    assert torch.equal(rank_N.cpu(), true_rank_N)


def test_a_vocabulary_larger_than_a_block_of_rows():
    case = make_case(num_tokens=3, vocab=CPU_BLOCK_ELEMENTS + 1, widths=(2, 2))
    assert_matches_reference(case, EXACT, kd_weight=0.4)
    _, rank_N = token_stats(*(case[name].detach() for name in ("student_hidden_ND", "student_head_VD", "labels_N")))
    assert rank_N[0] == -1 < rank_N[1:].min()


def test_rank_counts_strictly_larger_logits():
    hidden_NE, head_VE = torch.ones(3, 1), torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    _, rank_N = token_stats(hidden_NE, head_VE, torch.tensor([0, 1, 2]))
    assert rank_N.tolist() == [2, 0, 0]


# ---- errors


def wrong(case, **changes):
    return {**case, **changes}


def test_errors_say_what_does_not_fit():
    case = make_case(torch.float32)
    plain, shard = without_teacher(case), torch.zeros(V, D)
    shard.full_tensor = None  # as a DTensor has
    bad = [
        (wrong(case, student_head_VD=shard), "^student_head is a sharded DTensor; call the loss inside the forward"),
        (
            wrong(case, teacher_head_VE=torch.zeros(V + 1, E), teacher_bias_V=None),
            rf"\({V + 1}, {E}\) has more rows than student head \({V}, {D}\)",
        ),
        (wrong(case, teacher_head_VE=None), "teacher_head_VE is missing"),
        (wrong(case, teacher_hidden_NE=None), "teacher_hidden_NE is missing"),
        (wrong(case, teacher_hidden_NE=torch.zeros(N + 1, E)), rf"\({N}, {D}\).*\({N + 1}, {E}\).*tokens"),
        (wrong(case, student_head_VD=torch.zeros(V, D + 1)), rf"\({N}, {D}\).*\({V}, {D + 1}\)"),
        (wrong(case, student_hidden_ND=torch.zeros(N, D, 1)), rf"\({N}, {D}, 1\).*use \(N, D\)"),
        (wrong(case, teacher_head_VE=torch.zeros(V, E + 1)), rf"^teacher_hidden \({N}, {E}\).*\({V}, {E + 1}\)"),
        (wrong(case, teacher_bias_V=torch.zeros(V + 1)), rf"^teacher_bias \({V + 1},\).*\({V}, {E}\)"),
        (wrong(case, student_bias_V=torch.zeros(V + 1)), rf"\({V + 1},\).*\({V}, {D}\)"),
        (wrong(case, student_bias_V=torch.zeros(1)), rf"\(1,\).*\({V}, {D}\)"),  # it would be added to every logit
        (wrong(case, labels_N=case["labels_N"].int()), "int32.*int64"),
        (wrong(case, labels_N=case["labels_N"][1:]), rf"\({N - 1},\).*\({N}, {D}\)"),
        (wrong(case, labels_N=torch.full((N,), V)), f"labels range.*{V} rows"),
        (wrong(case, labels_N=torch.full((N,), -1)), f"labels range from -1 .*{V} rows"),
        (wrong(case, accuracy="exact"), "accuracy='exact'.*'accurate' or 'fast'"),
        (wrong(case, teacher_temperature=0.0), "teacher_temperature=0.0"),
        (wrong(case, teacher_temperature=math.inf), "teacher_temperature=inf"),
        (wrong(case, kd_weight=1.5), "kd_weight=1.5.*0..1"),
        (wrong(case, kd_weight=torch.zeros(2)), "0-dim"),
        (wrong(plain, kd_weight=0.5), "kd_weight=0.5 needs a teacher"),
        (wrong(case, logits_budget_gib=0), "logits_budget_gib=0"),
        (wrong(case, logits_budget_gib=math.inf), "logits_budget_gib=inf .* finite"),
        (wrong(case, num_tokens=-1), "num_tokens=-1 .* at least 0"),
        (wrong(case, num_tokens=math.nan), "num_tokens=nan"),
        (wrong(case, chunk_tokens=0), "chunk_tokens=0"),
        (wrong(case, chunk_tokens=2.5), "chunk_tokens=2.5 must be a whole number"),
        (wrong(case, student_hidden_ND=torch.zeros(N, D).half()), "float16"),
    ]
    for arguments, message in bad:
        with pytest.raises(ConfigError, match=message):
            salt_loss(**arguments)
    hidden_NE, head_VE, labels_N = (case[name] for name in ("teacher_hidden_NE", "teacher_head_VE", "labels_N"))
    for arguments, options, message in [
        ((case["student_hidden_ND"], head_VE, labels_N), {}, rf"^hidden \({N}, {D}\) and head \({V}, {E}\) do not fit"),
        ((hidden_NE, head_VE, labels_N, torch.zeros(V + 1)), {}, rf"^bias \({V + 1},\) does not fit head \({V}, {E}\)"),
        ((hidden_NE, head_VE, torch.full((N,), V)), {}, f"labels range.*{V} rows"),
        ((hidden_NE, head_VE, labels_N), {"logits_budget_gib": 0}, "logits_budget_gib=0"),
    ]:
        with pytest.raises(ConfigError, match=message):
            token_stats(*arguments, **options)
    with torch.autocast("cpu", torch.float16), pytest.raises(ConfigError, match="not torch.float16"):
        salt_loss(**case)


def test_the_compiled_row_pass_equals_the_plain_one():
    gen = torch.Generator().manual_seed(0)
    student_CV, teacher_CV = (torch.randn(6, V, generator=gen) for _ in range(2))
    labels_C = torch.tensor([1, -100, 5, 100, 0, 7])
    mix = Mix(torch.tensor(0.3), torch.tensor(0.2), temperature=2.0)
    arguments = student_CV, teacher_CV, labels_C, mix, True
    plain = row_pass(*arguments)
    compiled = torch.compile(row_pass, backend="aot_eager", fullgraph=True)(*arguments)
    assert all(torch.allclose(p, c, rtol=1e-6, atol=1e-7) for p, c in zip(plain, compiled, strict=True))
