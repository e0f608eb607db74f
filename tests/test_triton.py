"""The Triton kernels equal torch's row operations, and their backend the specification.

On a GPU they are compiled; elsewhere triton's interpreter runs them on CPU tensors (see ``conftest.py``), and one test
compiles them for a GPU that is not there. ``TRITON_INTERPRET=1`` on a machine with a GPU gives the CPU's tests.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from numeric_worlds import (
    OBJECTIVE_PARAMETERS,
    HeadProblem,
    budget_for,
    head_problem,
    moved,
    plain_token_stats,
    random_pairs,
    tiny_llama,
)
from test_objective_family import FAMILY
from torch import Tensor

import tdpo
from tdpo import UserError, objectives, ops
from tdpo.ops import backends, rows
from tdpo.score import batch_loss
from tdpo.types import Head, Hidden

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux)")

from tdpo.ops import triton_kernels

DEVICE = torch.device("cpu" if triton_kernels.INTERPRETED else "cuda")
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("no GPU, and triton was imported before TRITON_INTERPRET=1 was set", allow_module_level=True)

on_a_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
every_vocabulary = pytest.mark.parametrize("vocab", [1, 2, 31, 1000, 5003])
LENGTHS = [3, 5, 4, 4, 9, 1, 2, 2]


@pytest.fixture(params=[8192, 256], ids=["one_block", "many_blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Sets the largest block of a program: as it is, and small enough for several even in a test."""
    monkeypatch.setattr(triton_kernels, "MAX_BLOCK", request.param)
    return request.param


def logits(vocab: int, rows: int = 5, seed: int = 0, closeness: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of two models that differ by noise of that size, or altogether, and labels."""
    generator = torch.Generator().manual_seed(seed)
    z, noise = 3 * torch.randn(2, rows, vocab, generator=generator)
    ref_z = noise if closeness is None else z + closeness * noise
    return z.to(DEVICE), ref_z.to(DEVICE), torch.randint(vocab, (rows,), generator=generator).to(DEVICE)


def true_direction(z: Tensor, ref_z: Tensor, labels: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Computes the gradient of ``sum(a logp + b kl)`` in the logits, by autograd in float64."""
    leaf = z.double().requires_grad_()
    logp, _, kl = plain_token_stats(leaf, ref_z.double(), labels)
    return torch.autograd.grad((a.double() * logp + b.double() * kl).sum(), leaf)[0]


# --- the two operations ---------------------------------------------------------------------------------------------


@every_vocabulary
def test_statistics_are_those_of_the_torch_rows(vocab: int, block: int):
    z, ref_z, labels = logits(vocab)
    before = z.clone(), ref_z.clone()
    ours, theirs = triton_kernels.row_stats_(z, ref_z, labels), rows.row_stats_(z, ref_z, labels)
    assert torch.equal(z, before[0]) and torch.equal(ref_z, before[1])
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == torch.float32 and our.shape == (5,)
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)


@every_vocabulary
def test_the_gradient_is_that_of_the_torch_rows(vocab: int, block: int):
    z, ref_z, labels = logits(vocab)
    stats = rows.row_stats_(z, ref_z, labels)
    a, b = torch.randn(2, 5, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    truth = true_direction(z, ref_z, labels, a, b)
    theirs = rows.direction_(z.clone(), ref_z.clone(), labels, stats, a, b)
    ours = triton_kernels.direction_(z, ref_z, labels, stats, a, b)
    assert ours is z
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=2e-6)


def test_without_a_reference_the_gradient_is_that_of_the_log_probability(block: int):
    z, ref_z, labels = logits(1000)
    stats = rows.row_stats_(z, ref_z, labels)
    a, b = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0], device=DEVICE), torch.zeros(5, device=DEVICE)
    truth = true_direction(z, ref_z, labels, a, b)
    ours = triton_kernels.direction_(z, None, labels, stats, a, b)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=2e-6)


def test_statistics_and_direction_in_one_pass_are_those_of_the_torch_rows(block: int):
    z, ref_z, labels = logits(1000)
    c = torch.tensor([0.0, 0.5, 1.0, 0.7, 0.0], device=DEVICE)
    written, ref_written = z.clone(), z.clone()
    ours, theirs = triton_kernels.row_stats_(written, ref_z, labels, c), rows.row_stats_(ref_written, ref_z, labels, c)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(written, ref_written, rtol=1e-5, atol=1e-6)
    truth = true_direction(z, ref_z, labels, -torch.ones_like(c), -c)
    torch.testing.assert_close(written.double(), truth, rtol=1e-4, atol=2e-6)


def test_rows_of_a_larger_block_are_found_and_no_others_touched(block: int):
    z, ref_z, labels = logits(1000, rows=9)
    a, b = torch.ones(9, device=DEVICE), torch.full((), 0.5, device=DEVICE).expand(9)
    some, before = slice(2, 7), z.clone()
    stats = triton_kernels.row_stats_(z, ref_z, labels)
    theirs = rows.direction_(z[some].clone(), ref_z[some].clone(), labels[some], stats[:, some], a[some], b[some])
    triton_kernels.direction_(z[some], ref_z[some], labels[some], stats[:, some], a[some], b[some])
    torch.testing.assert_close(z[some], theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(z[:2], before[:2]) and torch.equal(z[7:], before[7:])


# --- what the divergence promises -----------------------------------------------------------------------------------


@every_vocabulary
def test_equal_logits_have_no_divergence_at_all(vocab: int, block: int):
    z, _, labels = logits(vocab)
    stats = triton_kernels.row_stats_(z, z.clone(), labels)
    assert (stats[2] == 0).all() and torch.equal(stats[3], stats[4])
    a, b = torch.zeros(5, device=DEVICE), torch.ones(5, device=DEVICE)
    assert (triton_kernels.direction_(z.clone(), z, labels, stats, a, b) == 0).all()


@pytest.mark.parametrize("closeness", [2.5e-4, 2.5e-3, 2.5e-2, 0.1, 0.4])
def test_small_divergences_keep_their_digits(closeness: float, block: int):
    """From 1e-7 nats and across the end of the series, within a thousandth of float64 (measured on a CPU: 1e-6)."""
    z, ref_z, labels = logits(1000, closeness=closeness)
    truth = plain_token_stats(z.double(), ref_z.double(), labels)[2]
    assert 0.5 * closeness**2 < truth.min() and truth.max() < 10 * closeness**2
    error = ((triton_kernels.row_stats_(z, ref_z, labels)[2] - truth).abs() / truth).max()
    assert error < 1e-3


def test_the_divergence_is_never_negative_and_has_no_seam():
    """Two words whose log-ratio crosses the end of the series: every value follows float64 to a thousandth."""
    gaps = torch.linspace(-1, 1, 101)
    z = torch.stack((gaps, torch.zeros_like(gaps)), 1).to(DEVICE)
    ref_z, labels = torch.zeros_like(z), torch.zeros(101, dtype=torch.long, device=DEVICE)
    truth = plain_token_stats(z.double(), ref_z.double(), labels)[2]
    kl = triton_kernels.row_stats_(z, ref_z, labels)[2]
    assert (kl >= 0).all()
    torch.testing.assert_close(kl.double(), truth, rtol=1e-3, atol=1e-12)


@pytest.mark.parametrize("gap", [200.0, 1e4])
def test_wide_gaps_stay_finite(gap: float, block: int):
    generator = torch.Generator().manual_seed(1)
    z, ref_z = gap * torch.rand(2, 6, 1000, generator=generator).to(DEVICE)
    z[0, 5], ref_z[1, 7], labels = 2 * gap, 2 * gap, torch.arange(6, device=DEVICE)
    truth = plain_token_stats(z.double(), ref_z.double(), labels)
    ours = triton_kernels.row_stats_(z, ref_z, labels)
    for our, true in zip(ours[:3], truth, strict=True):
        assert our.isfinite().all()
        torch.testing.assert_close(
            our.double(), true, rtol=max(1e-5, gap * 1e-7), atol=gap * 1e-6
        )  # float32 has 1e-3 at 1e4
    a, b = torch.ones(6, device=DEVICE), torch.ones(6, device=DEVICE)
    assert triton_kernels.direction_(z, ref_z, labels, ours, a, b).isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's numpy on inf - inf
def test_padded_words_change_nothing(block: int):
    """-inf on both sides, whole blocks of it in front included; nothing flows into them."""
    z, ref_z, labels = logits(300)
    padding = torch.full((5, 600), -math.inf, device=DEVICE)
    wide, ref_wide = (torch.cat((padding, side, padding), 1) for side in (z, ref_z))
    stats, padded = triton_kernels.row_stats_(z, ref_z, labels), triton_kernels.row_stats_(wide, ref_wide, labels + 600)
    for ours, theirs in zip(padded, stats, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    a, b = torch.randn(2, 5, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    grad = triton_kernels.direction_(wide, ref_wide, labels + 600, padded, a, b)
    torch.testing.assert_close(
        grad[:, 600:900], triton_kernels.direction_(z, ref_z, labels, stats, a, b), rtol=1e-5, atol=1e-6
    )
    assert (grad[:, :600] == 0).all() and (grad[:, 900:] == 0).all()


def test_words_of_one_side_only():
    """Only the policy gives it: its term is p. Only the reference: infinity. Underflow counts as not giving."""
    policy = torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.0, 0.5]], device=DEVICE).log()
    reference = torch.tensor([[0.5, 0.0, 0.5], [0.25, 0.25, 0.5]], device=DEVICE).log()
    labels = torch.zeros(2, dtype=torch.long, device=DEVICE)
    kl = triton_kernels.row_stats_(policy, reference, labels)[2]
    assert kl.tolist() == [pytest.approx(0.5 * math.log(2), rel=1e-5), math.inf]
    policy[1, 1], reference[1, 1] = -math.inf, -500.0
    assert triton_kernels.row_stats_(policy, reference, labels)[2].isfinite().all()


def test_a_label_outside_of_the_vocabulary_reads_nothing():
    z, ref_z, _ = logits(31)
    stats = triton_kernels.row_stats_(z, ref_z, torch.tensor([0, -100, 31, 5, 30], device=DEVICE))
    assert stats[0].isnan().tolist() == stats[1].isnan().tolist() == [False, True, True, False, False]
    assert stats[2].isfinite().all()


# --- the backend ----------------------------------------------------------------------------------------------------


def on_the_device(problem: HeadProblem) -> HeadProblem:
    """Moves the problem to the device of the kernels, with new leaves."""

    def side(hidden: Hidden) -> Hidden:
        head = hidden.head
        weight, bias = head.weight.to(DEVICE), None if head.bias is None else head.bias.to(DEVICE)
        return Hidden(hidden.states.to(DEVICE), Head(weight, bias, head.scale, head.soft_cap))

    on_device = HeadProblem(side(problem.policy), side(problem.reference), problem.labels.to(DEVICE))
    return on_device.cast(problem.policy.states.dtype)


def assert_close_to(ours: list[Tensor], theirs: list[Tensor], rtol: float) -> None:
    """Asserts equality within ``rtol`` of each tensor's largest entry."""
    for our, their in zip(ours, theirs, strict=True):
        assert our.dtype == their.dtype
        assert (our - their).abs().max() <= rtol * their.abs().max()


SHAPES = {
    "plain": {},
    "bias_scale_and_soft_cap": {"bias": True, "scale": 0.7, "soft_cap": 3.0},
    "another_reference_width": {"ref_width": 3},
    "near_reference": {"closeness": 1e-3},
}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@every_shape
@pytest.mark.parametrize("budget", [None, budget_for(4, 37, torch.float32)], ids=["one_chunk", "chunks"])
def test_token_statistics_are_the_specifications(shape: dict, budget: int | None):
    problem = on_the_device(head_problem(tokens=11, vocab=37, dtype=torch.float32, **shape))
    a, b = torch.randn(2, 11, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    values, gradients = [], []
    for backend in ("triton", "naive"):
        stats = ops.response_stats(problem.policy, problem.reference, problem.labels, backend, budget)
        values.append((stats.logp, stats.ref_logp, stats.kl))
        gradients.append(torch.autograd.grad((a * stats.logp + b * stats.kl).sum(), problem.leaves))
    for our, their in zip(*values, strict=True):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-6)
    assert_close_to(*gradients, rtol=1e-5)


def test_token_statistics_take_the_gradient_of_a_plain_sum():
    """Autograd hands the gradient of a sum over as one number seen N times, and that of an unused output as None."""
    problem = on_the_device(head_problem(tokens=11, vocab=37, dtype=torch.float32))
    for pick in ("logp", "kl"):
        ours, theirs = (
            torch.autograd.grad(
                getattr(ops.response_stats(problem.policy, problem.reference, problem.labels, backend), pick).sum(),
                problem.leaves,
            )
            for backend in ("triton", "naive")
        )
        assert_close_to(ours, theirs, rtol=1e-5)


@every_shape
@pytest.mark.parametrize("alive", [8, 1000], ids=["two_passes_for_the_long_pair", "all_at_once"])
@pytest.mark.parametrize(("name", "parameters"), OBJECTIVE_PARAMETERS)
def test_the_fused_loss_is_the_specifications(name: str, parameters: dict, alive: int, shape: dict):
    problem = on_the_device(head_problem(tokens=sum(LENGTHS), vocab=37, dtype=torch.float32, **shape))
    objective = objectives.build(name, **parameters)
    budget = budget_for(alive, 37, torch.float32, 3 if "soft_cap" in shape else 2)
    arguments = problem.policy, problem.reference, problem.labels, LENGTHS, objective, budget
    total, outcome, _, fused_tokens = ops.pair_loss(*arguments, backend="triton")
    tokens = ops.response_stats(problem.policy, problem.reference, problem.labels, "naive")
    ratio, kl = ([part.sum() for part in x.split(LENGTHS)] for x in (tokens.logp - tokens.ref_logp, tokens.kl))
    stats = tdpo.PairStats(*(torch.stack(part) for part in (ratio[::2], ratio[1::2], kl[::2], kl[1::2])))
    loss = objective(stats).loss
    torch.testing.assert_close(outcome.loss, loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fused_tokens.kl, tokens.kl, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(1.7 * value, problem.leaves) for value in (total, loss.sum()))
    assert_close_to(*gradients, rtol=1e-4)


@pytest.mark.parametrize("alive", [8, 1000], ids=["two_passes_for_the_long_pair", "all_at_once"])
@pytest.mark.parametrize("objective", FAMILY, ids=str)
def test_weighted_losses_of_every_objective_are_the_specifications(objective: objectives.Objective, alive: int):
    problem = on_the_device(head_problem(tokens=sum(LENGTHS), vocab=37, spread=0.7, dtype=torch.float32))
    weights = 2 * torch.rand(2, sum(LENGTHS), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    weights[0, 1], weights[1, 2], weights[:, 4] = 0, 0, 0
    results = []
    for backend in ("triton", "naive"):
        arguments = problem.labels, LENGTHS, objective, budget_for(alive, 37, torch.float32), backend, weights
        reference = problem.reference if objective.uses_reference else None
        total, outcome, _, _ = ops.pair_loss(problem.policy, reference, *arguments)
        results.append((outcome.loss, torch.autograd.grad(total, problem.leaves)))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    assert_close_to(results[0][1], results[1][1], rtol=1e-4)
    if alive == 1000:
        (of_states, _) = results[0][1]
        assert not of_states[4].any() and of_states[3].any()


@pytest.mark.parametrize("closeness", [None, 0.02], ids=["far", "near"])
def test_half_precision_errs_no_more_than_eager_does(closeness: float | None):
    """Truth: float64 on the rounded inputs. Eager: logits in bfloat16, the rest in float32."""
    problem = on_the_device(
        head_problem(tokens=40, vocab=200, width=32, spread=0.7, dtype=torch.bfloat16, closeness=closeness)
    )
    a, b = torch.randn(2, 40, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        side = problem.cast(dtype)
        z, ref_z = (hidden.states @ hidden.head.weight.t() for hidden in (side.policy, side.reference))
        wide = (z, ref_z) if dtype == torch.float64 else (z.float(), ref_z.float())
        logp, ref_logp, kl = plain_token_stats(*wide, problem.labels)
        results.append(
            ((logp, ref_logp, kl), torch.autograd.grad((a.to(kl) * logp + b.to(kl) * kl).sum(), side.leaves))
        )
    stats = ops.response_stats(problem.policy, problem.reference, problem.labels, "triton")
    ours = (stats.logp, stats.ref_logp, stats.kl)
    our_gradients = torch.autograd.grad((a * stats.logp + b * stats.kl).sum(), problem.leaves)
    for our, eager, truth in zip(ours, results[0][0], results[1][0], strict=True):
        assert our.dtype == torch.float32
        assert ((our - truth).abs() <= (eager - truth).abs() + 1e-5).all()
    for our, eager, truth in zip(our_gradients, results[0][1], results[1][1], strict=True):
        assert our.dtype == torch.bfloat16
        rounding = torch.finfo(torch.bfloat16).eps
        assert ((our - truth).abs() <= (eager - truth).abs() + rounding * truth.abs() + 1e-5).all()


def test_scores_and_training_loss_of_models_are_the_specifications():
    reference = tiny_llama(dtype=torch.float32).to(DEVICE)
    policy, objective = moved(reference), objectives.tdpo2(0.3, 0.7)
    ours, theirs = (
        tdpo.score_pairs(policy, reference, random_pairs(), objective, backend=backend)
        for backend in ("triton", "naive")
    )
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.stats.chosen_kl, theirs.stats.chosen_kl, rtol=1e-5, atol=1e-6)
    total, scores = batch_loss(policy, reference, theirs.batch, objective, "triton")
    torch.testing.assert_close(total, theirs.loss.sum(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(scores.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match=r"backend triton: .* float64"):
        batch_loss(policy.double(), reference.double(), theirs.batch, objective, "triton")


@on_a_gpu
def test_auto_is_triton_on_a_gpu():
    problem = on_the_device(head_problem(dtype=torch.bfloat16))
    assert backends.choose_backend("auto", problem.policy.states) == backends.Chunked(triton_kernels)
    assert backends.choose_backend("auto", problem.policy.states.double()) == backends.Chunked(rows)
    auto, named = (
        ops.response_stats(problem.policy, problem.reference, problem.labels, backend) for backend in ("auto", "triton")
    )
    assert torch.equal(auto.kl, named.kl) and torch.equal(auto.logp, named.logp)


@on_a_gpu
def test_a_real_vocabulary_on_a_gpu():
    """150,001 words, bfloat16 hidden states, more rows than the GPU runs at once: float64's values and gradients."""
    problem = on_the_device(head_problem(tokens=600, vocab=150_001, width=64, spread=0.3, dtype=torch.bfloat16))
    gradients = []
    for backend, side in (("triton", problem), ("naive", problem.cast(torch.float64))):
        stats = ops.response_stats(side.policy, side.reference, side.labels, backend)
        gradients.append([x.double() for x in torch.autograd.grad((stats.logp + stats.kl).sum(), side.leaves)])
        if backend == "triton":
            ours = stats
    for our, truth in zip((ours.logp, ours.ref_logp, ours.kl), (stats.logp, stats.ref_logp, stats.kl), strict=True):
        torch.testing.assert_close(our.double(), truth, rtol=1e-4, atol=1e-5)
    assert_close_to(*gradients, rtol=1e-2)


# --- where it runs, and where it says why not -----------------------------------------------------------------------


def test_on_a_cpu_auto_leaves_triton_alone():
    states = torch.zeros(2, 3)
    auto, chunked = (backends.choose_backend(name, states) for name in ("auto", "chunked"))
    assert auto == chunked == backends.Chunked(rows)


def test_float64_is_refused():
    problem = head_problem(dtype=torch.float64)
    with pytest.raises(
        UserError, match=r"backend triton: .* compute in float32, .* are float64; take chunked or naive"
    ):
        ops.response_stats(problem.policy, problem.reference, problem.labels, "triton")


def test_cpu_tensors_are_refused_without_the_interpreter(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_kernels, "INTERPRETED", False)
    problem = head_problem(dtype=torch.float32)
    with pytest.raises(UserError, match=r"backend triton: it needs CUDA tensors, and these are on cpu; .*INTERPRET=1"):
        ops.response_stats(problem.policy, problem.reference, problem.labels, "triton")
    with pytest.raises(UserError, match="these are on cpu"):
        ops.pair_loss(problem.policy, problem.reference, problem.labels, [3, 4], objectives.dpo(), backend="triton")


def test_without_triton_the_refusal_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(ops, "triton_kernels")
    monkeypatch.setitem(sys.modules, "tdpo.ops.triton_kernels", None)
    problem = head_problem(dtype=torch.float32)
    with pytest.raises(UserError, match=r"backend triton: triton cannot be imported .*pip install triton"):
        ops.response_stats(problem.policy, problem.reference, problem.labels, "triton")
    ops.response_stats(problem.policy, problem.reference, problem.labels, "auto")


def test_an_unknown_backend_of_the_loss_is_refused():
    problem = head_problem(dtype=torch.float32)
    with pytest.raises(UserError, match="unknown backend 'fast'; there are: auto, naive, chunked, triton"):
        ops.pair_loss(
            problem.policy, problem.reference, problem.labels, [3, 4], objectives.dpo(), backend="fast",  # type: ignore[arg-type]
        )  # fmt: skip


def test_logits_the_kernels_would_misread_are_refused():
    z, ref_z, labels = logits(31)
    for wrong in ((z.double(), ref_z.double()), (z, ref_z.bfloat16()), (z, ref_z[:, :30]), (z.t(), ref_z.t())):
        with pytest.raises(ValueError, match="two float32 blocks"):
            triton_kernels.row_stats_(*wrong, labels)


COMPILATION = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tdpo.ops import triton_kernels as kernels

def compiled(capability, kernel, pointers, sizes, **constants):
    types = dict.fromkeys(pointers, "*fp32") | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    types = {name: "*i64" if name == "labels" else types[name] for name in kernel.arg_names}
    source = ASTSource(kernel, types, constexprs=constants)
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernels.MAX_WARPS})
    return len(binary.asm["cubin"])

words = "logits", "ref_logits", "labels", "log_zs", "ref_log_zs", "logp_weights", "kl_weights"
for capability, flag in itertools.product((80, 90, 100), (True, False)):
    names = "logits", "ref_logits", "labels", "ratios", "alone", "columns"
    sizes = "total", "vocab", "stride", "ref_stride"
    flags = {"WITH_DIRECTION": flag, "WITH_KL_ALONE": flag}
    print(compiled(capability, kernels._stats_kernel, names, sizes, **flags, BLOCK=kernels.MAX_BLOCK))
    flags = {"WITH_REFERENCE": flag}
    print(compiled(capability, kernels._direction_kernel, words, sizes[1:], **flags, BLOCK=kernels.MAX_BLOCK))
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path):
    """The interpreter runs any Python; the compiler does not. Compute capabilities 8.0, 9.0 and 10.0."""
    source = Path(tdpo.__file__).parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(source)}
    run = subprocess.run(
        [sys.executable, "-c", COMPILATION], env=environment, capture_output=True, text=True, timeout=240
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(run.stdout.split()) == 12 and all(int(size) > 1000 for size in run.stdout.split())
