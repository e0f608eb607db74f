"""The whole path from token ids to losses: symmetries, invariances, gradients, refusals."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from numeric_worlds import (
    BACKENDS,
    OBJECTIVE_PARAMETERS,
    assert_same_gradients,
    gradients,
    moved,
    plain_pair_loss,
    plain_pair_stats,
    random_pairs,
    tiny_llama,
)
from torch import Tensor, nn

from tdpo import PairScores, UserError, objectives, ops, pair_loss, score_pairs
from tdpo.models.reference import FrozenCopy
from tdpo.score import score_batch
from tdpo.types import PackedBatch, TokenisedPair

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_objective = pytest.mark.parametrize(("name", "parameters"), OBJECTIVE_PARAMETERS)
REFERENCE = tiny_llama(seed=0)
POLICY = moved(REFERENCE)
PAIRS = random_pairs(seed=0, count=4)
TDPO2 = objectives.tdpo2(beta=0.3, alpha=0.7)


def all_values(scores: PairScores) -> dict[str, Tensor]:
    """Lists all values of each pair, by name."""
    stats = scores.stats
    return {
        "loss": scores.loss,
        "chosen_reward": scores.chosen_reward,
        "rejected_reward": scores.rejected_reward,
        "chosen_logratio": stats.chosen_logratio,
        "rejected_logratio": stats.rejected_logratio,
        "chosen_kl": stats.chosen_kl,
        "rejected_kl": stats.rejected_kl,
        "chosen_logp": scores.chosen_logp,
        "rejected_logp": scores.rejected_logp,
    }


@every_backend
@every_objective
def test_statistics_losses_and_gradients_are_those_of_the_models_own_logits(name, parameters, backend):
    scores = score_pairs(POLICY, REFERENCE, PAIRS, objectives.build(name, **parameters), backend=backend)
    plain = plain_pair_stats(POLICY, REFERENCE, PAIRS)
    for column in ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"):
        torch.testing.assert_close(getattr(scores.stats, column), getattr(plain, column), rtol=1e-8, atol=1e-9)
    theirs = plain_pair_loss(name, plain, **parameters)
    torch.testing.assert_close(scores.loss, theirs, rtol=1e-9, atol=0)
    assert_same_gradients(gradients(scores.loss.mean(), POLICY), gradients(theirs.mean(), POLICY), rtol=1e-7)


@every_backend
@every_objective
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_policy_equal_to_its_reference_costs_log_two_with_no_divergence(dtype, name, parameters, backend):
    policy = copy.deepcopy(REFERENCE).to(dtype)
    scores = score_pairs(policy, copy.deepcopy(policy), PAIRS, objectives.build(name, **parameters), backend=backend)
    torch.testing.assert_close(scores.loss, torch.full_like(scores.loss, math.log(2)), rtol=0, atol=1e-7)
    for key, value in all_values(scores).items():
        if key not in ("loss", "chosen_logp", "rejected_logp"):
            assert (value == 0).all(), key
    assert (scores.tokens.kl == 0).all()
    assert (scores.chosen_logp < -0.1).all()


@every_backend
@every_objective
def test_swapping_every_pair_negates_the_margin_and_exchanges_the_sides(name, parameters, backend):
    objective = objectives.build(name, **parameters)
    scores = score_pairs(POLICY, REFERENCE, PAIRS, objective, backend=backend)
    mirrored = score_pairs(POLICY, REFERENCE, [pair.swapped for pair in PAIRS], objective, backend=backend)
    # sigmoid(u) + sigmoid(-u) = 1
    both = torch.exp(-scores.loss) + torch.exp(-mirrored.loss)
    torch.testing.assert_close(both, torch.ones_like(both), rtol=0, atol=1e-8)
    assert (scores.loss - math.log(2)).abs().min() > 1e-4
    theirs = all_values(mirrored)
    for key, value in all_values(scores).items():
        if key != "loss":
            side, _, rest = key.partition("_")
            other = theirs[("rejected_" if side == "chosen" else "chosen_") + rest]
            torch.testing.assert_close(other, value, rtol=1e-8, atol=1e-9, msg=key)


@every_backend
def test_each_pair_alone_equals_all_of_them_together(backend):
    """Neither the company of a pair nor the padding it brings changes its values or its gradient."""
    together = score_pairs(POLICY, REFERENCE, PAIRS, TDPO2, backend=backend)
    alone = [score_pairs(POLICY, REFERENCE, [pair], TDPO2, backend=backend) for pair in PAIRS]
    for key, value in all_values(together).items():
        torch.testing.assert_close(torch.cat([all_values(one)[key] for one in alone]), value, rtol=1e-8, atol=1e-9)
    summed = gradients(together.loss.sum(), POLICY)
    one_by_one = [gradients(one.loss.sum(), POLICY) for one in alone]
    assert_same_gradients({name: sum(one[name] for one in one_by_one) for name in summed}, summed, rtol=1e-7)


def test_the_order_of_the_pairs_is_the_order_of_the_results():
    order = [2, 0, 3, 1]
    scores = all_values(score_pairs(POLICY, REFERENCE, PAIRS, TDPO2))
    shuffled = score_pairs(POLICY, REFERENCE, [PAIRS[i] for i in order], TDPO2)
    for key, value in all_values(shuffled).items():
        torch.testing.assert_close(value, scores[key][order], rtol=1e-8, atol=1e-9)
    assert shuffled.batch.pair_rows.tolist() == [PAIRS[i].row for i in order]


def test_what_fills_the_padding_does_not_matter():
    batch = score_pairs(POLICY, REFERENCE, PAIRS, TDPO2).batch
    assert (batch.branch_ids == -1).any()
    filled = batch.as_dict() | {"input_ids": torch.where(batch.branch_ids == -1, 49, batch.input_ids)}
    ours, theirs = (score_batch(POLICY, REFERENCE, b, TDPO2) for b in (PackedBatch.from_dict(filled), batch))
    for key, value in all_values(ours).items():
        assert torch.equal(value, all_values(theirs)[key]), key
    assert_same_gradients(gradients(ours.loss.sum(), POLICY), gradients(theirs.loss.sum(), POLICY), rtol=1e-12)


def test_the_logits_budget_does_not_matter():
    batch = score_pairs(POLICY, REFERENCE, PAIRS, TDPO2).batch
    whole = score_batch(POLICY, REFERENCE, batch, TDPO2, "chunked")
    narrow = score_batch(POLICY, REFERENCE, batch, TDPO2, "chunked", logits_budget=1)
    for key, value in all_values(narrow).items():
        torch.testing.assert_close(value, all_values(whole)[key], rtol=1e-11, atol=1e-11)
    assert_same_gradients(gradients(narrow.loss.sum(), POLICY), gradients(whole.loss.sum(), POLICY), rtol=1e-9)


def test_token_statistics_add_up_to_those_of_the_pairs():
    scores = score_pairs(POLICY, REFERENCE, PAIRS, TDPO2)
    for p, pair in enumerate(PAIRS):
        of_chosen = scores.batch.sequence_ids == 2 * p
        assert scores.batch.labels[of_chosen].tolist() == pair.chosen_ids
        assert scores.tokens.kl[of_chosen].sum().item() == pytest.approx(scores.stats.chosen_kl[p].item(), rel=1e-12)
        assert scores.tokens.logp[of_chosen].sum().item() == pytest.approx(scores.chosen_logp[p].item(), rel=1e-12)
    counts = [[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in PAIRS]
    assert torch.stack([scores.stats.chosen_length, scores.stats.rejected_length], 1).tolist() == counts


@every_backend
def test_gradients_flow_into_the_policy_alone(backend):
    policy, reference = moved(REFERENCE), copy.deepcopy(REFERENCE)
    scores = score_pairs(policy, reference, PAIRS, objectives.tdpo1(0.3), backend=backend)
    assert not scores.chosen_reward.requires_grad and not scores.tokens.ref_logp.requires_grad
    scores.loss.sum().backward()
    assert all(parameter.grad is None for parameter in reference.parameters())
    assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in policy.parameters())


def test_the_reference_runs_without_recording_a_graph():
    reference, recorded = copy.deepcopy(REFERENCE), []
    score_pairs(POLICY, reference, PAIRS, TDPO2)
    reference.model.register_forward_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    score_pairs(POLICY, reference, PAIRS, TDPO2)
    score_pairs(POLICY, FrozenCopy(reference), PAIRS, TDPO2)
    assert recorded == [False, False]


@every_backend
def test_a_frozen_head_gets_no_gradient_and_the_body_keeps_its_own(backend):
    policy = moved(REFERENCE)
    expected = gradients(score_pairs(policy, REFERENCE, PAIRS, TDPO2, backend=backend).loss.sum(), policy)
    policy.lm_head.weight.requires_grad_(False)
    frozen_head = gradients(score_pairs(policy, REFERENCE, PAIRS, TDPO2, backend=backend).loss.sum(), policy)
    assert (frozen_head["lm_head.weight"] == 0).all() and expected["lm_head.weight"].abs().max() > 1e-3
    assert_same_gradients(frozen_head | {"lm_head.weight": expected["lm_head.weight"]}, expected, rtol=1e-9)


@every_backend
def test_a_tied_head_collects_the_gradient_of_both_its_uses(backend):
    reference = tiny_llama(seed=3, tie_word_embeddings=True)
    policy = moved(reference)
    assert policy.lm_head.weight is policy.model.embed_tokens.weight
    ours = gradients(score_pairs(policy, reference, PAIRS, TDPO2, backend=backend).loss.sum(), policy)
    plain = plain_pair_stats(policy, reference, PAIRS)
    theirs = gradients(plain_pair_loss("tdpo2", plain, 0.3, 0.7).sum(), policy)
    assert_same_gradients(ours, theirs, rtol=1e-7)


@every_backend
def test_without_gradients_the_values_are_the_same(backend):
    expected = all_values(score_pairs(POLICY, REFERENCE, PAIRS, TDPO2, backend=backend))
    with torch.no_grad():
        scores = score_pairs(POLICY, REFERENCE, PAIRS, TDPO2, backend=backend)
    assert not scores.loss.requires_grad
    for key, value in all_values(scores).items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_models_give_float32_statistics_near_the_truth(dtype):
    policy, reference = copy.deepcopy(POLICY).to(dtype), copy.deepcopy(REFERENCE).to(dtype)
    scores = score_pairs(policy, reference, PAIRS, TDPO2)
    exact = score_pairs(copy.deepcopy(policy).double(), copy.deepcopy(reference).double(), PAIRS, TDPO2)
    for key, value in all_values(scores).items():
        assert value.dtype == torch.float32, key
        truth = all_values(exact)[key].detach()
        assert (value.detach() - truth).abs().max() < 0.05 * truth.abs().max().clamp(min=1), key
    scores.loss.sum().backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in policy.parameters())


def test_a_reference_of_another_width_is_fine():
    reference = tiny_llama(seed=9, hidden_size=24, num_hidden_layers=1)
    scores = score_pairs(POLICY, reference, PAIRS, TDPO2)
    plain = plain_pair_stats(POLICY, reference, PAIRS)
    torch.testing.assert_close(scores.stats.chosen_logratio, plain.chosen_logratio, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(scores.stats.rejected_kl, plain.rejected_kl, rtol=1e-8, atol=1e-9)


def test_a_frozen_copy_is_the_policy_of_that_moment():
    policy = copy.deepcopy(POLICY)
    reference = FrozenCopy.of(policy)
    with torch.no_grad():
        policy.lm_head.weight *= 1.1
    for parameter in reference.model.parameters():
        assert not parameter.requires_grad
    assert policy.lm_head.weight.requires_grad
    ours = score_pairs(policy, reference, PAIRS, TDPO2)
    theirs = score_pairs(policy, FrozenCopy(copy.deepcopy(POLICY)), PAIRS, TDPO2)
    for key, value in all_values(ours).items():
        assert torch.equal(value, all_values(theirs)[key]), key
    assert (ours.stats.chosen_kl > 1e-6).all()


def test_training_modes_are_left_as_they_were():
    """Also where they are mixed: a part the user keeps in evaluation mode stays there."""
    policy, reference = moved(REFERENCE).train(), copy.deepcopy(REFERENCE).train()
    policy.model.layers[0].eval()
    before = [[module.training for module in model.modules()] for model in (policy, reference)]
    score_pairs(policy, reference, PAIRS, TDPO2)
    assert [[module.training for module in model.modules()] for model in (policy, reference)] == before


def test_layouts_by_name():
    """Trees and padded rows give the same losses and gradients; ``auto`` takes trees, but padded rows in float64."""
    by_name = {name: score_pairs(POLICY, REFERENCE, PAIRS, TDPO2, layout=name) for name in ("tree", "padded", "auto")}
    assert {name: scores.batch.layout for name, scores in by_name.items()} == {
        "tree": "tree", "padded": "padded", "auto": "padded",
    }  # fmt: skip
    tree, padded = by_name["tree"], by_name["padded"]
    for key, value in all_values(tree).items():
        torch.testing.assert_close(value, all_values(padded)[key], rtol=1e-6, atol=1e-7, msg=key)
    assert len(tree.batch.input_ids) < len(padded.batch.input_ids) == 2 * len(PAIRS)
    assert_same_gradients(gradients(tree.loss.sum(), POLICY), gradients(padded.loss.sum(), POLICY), rtol=1e-5)
    single, single_reference = copy.deepcopy(POLICY).float(), copy.deepcopy(REFERENCE).float()
    assert score_pairs(single, single_reference, PAIRS, TDPO2).batch.layout == "tree"


# --- the loss in one pass -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["tree", "padded"])
@every_backend
@every_objective
def test_the_loss_in_one_pass_is_the_sum_of_the_scores(name, parameters, backend, layout):
    objective = objectives.build(name, **parameters)
    total, scores = pair_loss(POLICY, REFERENCE, PAIRS, objective, layout=layout, backend=backend)
    theirs = score_pairs(POLICY, REFERENCE, PAIRS, objective, layout=layout, backend="naive")
    torch.testing.assert_close(total, theirs.loss.sum(), rtol=1e-10, atol=0)
    assert scores.batch.layout == layout and total.requires_grad
    for key, value in all_values(scores).items():
        assert not value.requires_grad, key
        torch.testing.assert_close(value, all_values(theirs)[key].detach(), rtol=1e-9, atol=1e-10, msg=key)
    assert_same_gradients(gradients(total, POLICY), gradients(theirs.loss.sum(), POLICY), rtol=1e-8)


def test_a_training_loop_of_ones_own_takes_the_steps_of_plain_autograd():
    losses: dict[str, list[float]] = {"one pass": [], "plain": []}
    for name in losses:
        policy = moved(REFERENCE)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.05)
        for _ in range(5):
            if name == "one pass":
                total, _ = pair_loss(policy, REFERENCE, PAIRS, TDPO2)
            else:
                total = plain_pair_loss("tdpo2", plain_pair_stats(policy, REFERENCE, PAIRS), 0.3, 0.7).sum()
            (total / len(PAIRS)).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(total.item() / len(PAIRS))
    assert losses["one pass"] == pytest.approx(losses["plain"], rel=1e-8)
    assert losses["plain"][4] < losses["plain"][0] - 0.01


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layout": "diagonal"}, ["unknown layout 'diagonal'", "auto", "padded"]),
        ({"backend": "fast"}, ["unknown backend 'fast'", "naive", "chunked"]),
        ({"pairs": []}, ["no pairs"]),
        ({"reference": tiny_llama(vocab=51)}, ["50", "51", "vocabulary"]),
        ({"policy": tiny_llama(vocab=51)}, ["50", "51", "vocabulary"]),
        ({"policy": POLICY.model}, ["LlamaModel", "causal language model"]),
        ({"reference": REFERENCE.model}, ["LlamaModel", "causal language model"]),
        ({"policy": nn.Linear(2, 2)}, ["Linear", "causal language model"]),
    ],
    ids=[
        "layout",
        "backend",
        "no_pairs",
        "reference_vocabulary",
        "policy_vocabulary",
        "body",
        "reference_body",
        "layer",
    ],
)
def test_refusals_say_what_is_wrong(changes, words):
    arguments = {"policy": POLICY, "reference": REFERENCE, "pairs": PAIRS, "objective": TDPO2} | changes
    for function in (score_pairs, pair_loss):
        with pytest.raises(UserError) as caught:
            function(**arguments)
        for word in words:
            assert word in str(caught.value)


@pytest.mark.parametrize("part", ["prompt_ids", "chosen_ids", "rejected_ids"])
@pytest.mark.parametrize("stray", [50, -1])
def test_a_token_outside_the_vocabulary_is_refused(part, stray):
    parts = {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [5]}
    pair = TokenisedPair(**(parts | {part: [stray]}), row=7)
    with pytest.raises(UserError, match=rf"{stray}\b.*\b50\b"):
        score_pairs(POLICY, REFERENCE, [PAIRS[0], pair], TDPO2)


def test_all_backends_are_tested_here():
    """Triton, which takes no float64, has a module of its own: ``test_triton.py``."""
    assert set(BACKENDS) | {"auto", "triton"} == set(ops.BackendName.__args__)  # type: ignore[attr-defined]
