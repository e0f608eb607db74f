"""Composes the stages: hidden states of policy and reference, token statistics, pair statistics, objective."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tdpo import ops
from tdpo.data.dataset import check_fits
from tdpo.data.pack import pack_padded, pack_trees
from tdpo.errors import UserError
from tdpo.models.hidden import response_states
from tdpo.models.inside import run_in_head
from tdpo.models.own_loss import RouterLoss, collect_router_logits
from tdpo.models.policy import head_of, position_limit, prove_head
from tdpo.models.reference import Reference, as_reference, check_comparable
from tdpo.models.tied import tied_gradient
from tdpo.models.trees import tree_plan
from tdpo.objectives import Objective
from tdpo.ops.budget import LogitsBudget
from tdpo.ops.fused import FusedLoss
from tdpo.types import Hidden, PackedBatch, PairLoss, PairStats, TokenisedPair, TokenStats

LayoutChoice = Literal["auto", "tree", "padded"]


@dataclass(frozen=True)
class PairScores:
    """Everything one pass says of P pairs; see :class:`~tdpo.types.PairLoss` and :class:`~tdpo.types.PairStats`.

    Attributes:
        outcome: Losses and rewards of the objective, ``[P]``.
        stats: Sums over response tokens, ``[P]``, in nats.
        chosen_logp: ``[P]`` log-probability of the chosen response under the policy, in nats.
        rejected_logp: ``[P]``, the same of the rejected response.
        tokens: The token statistics ``[N]`` the sums were made of.
        batch: The layout, which says the sequence (``sequence_ids``) and the token (``labels``) of each statistic.
        aux_loss: Load-balancing loss of the policy's routers, a scalar without its coefficient, where it is part of the
            loss.
    """

    outcome: PairLoss
    stats: PairStats
    chosen_logp: Tensor
    rejected_logp: Tensor
    tokens: TokenStats
    batch: PackedBatch
    aux_loss: Tensor | None = None

    @property
    def loss(self) -> Tensor:
        """Loss of each pair, ``[P]``."""
        return self.outcome.loss

    @property
    def chosen_reward(self) -> Tensor:
        """The objective's implicit reward of each chosen response, ``[P]``."""
        return self.outcome.chosen_reward

    @property
    def rejected_reward(self) -> Tensor:
        """The objective's implicit reward of each rejected response, ``[P]``."""
        return self.outcome.rejected_reward


def score_pairs(
    policy: nn.Module,
    reference: nn.Module | Reference,
    pairs: Sequence[TokenisedPair],
    objective: Objective,
    layout: LayoutChoice = "auto",
    backend: ops.Backend = "auto",
) -> PairScores:
    """Scores preference pairs in one forward pass of policy and reference.

    Args:
        policy: A transformers causal language model. Gradients flow into it when they are on; its training mode is
            left as it is, so call ``policy.eval()`` first where dropout must be off.
        reference: A second causal language model with the same vocabulary, or a reference strategy. Never trained.
        pairs: P tokenised pairs; all of them run at once.
        objective: One of :mod:`tdpo.objectives`.
        layout: ``"tree"``: every prompt once, proven on both models by a probe; ``"padded"``: one sequence a row;
            ``"auto"``: trees where the models take them, padded rows elsewhere.
        backend: See :func:`tdpo.ops.token_stats`.

    Returns:
        Losses, rewards and statistics per pair and per token, in nats.

    Raises:
        UserError: if the vocabularies differ, ``"tree"`` is asked of a model that takes no trees, the model is no
            causal language model, or a token id is outside the vocabulary.

    Source: TDPO (arXiv 2404.11999), section 4; DPO (arXiv 2305.18290), eq. 7.
    """
    if not pairs:
        raise UserError("score_pairs was given no pairs")
    prove_head(policy)
    if isinstance(reference, nn.Module):
        check_comparable(policy, reference)
    models = [policy, *as_reference(reference).models()]
    check_fits(pairs, head_of(policy).vocab_size, position_limit(*models))
    batch = packer(layout, models)(pairs).to(next(policy.parameters()).device)
    return score_batch(policy, reference, batch, objective, backend)


def packer(layout: str, models: Sequence[nn.Module]) -> Callable[[Sequence[TokenisedPair]], PackedBatch]:
    """The function that lays pairs out for some models, as :func:`score_pairs` is asked to.

    Raises:
        UserError: for an unknown layout, or trees for a model that does not take them (with the reason).
    """
    if layout not in get_args(LayoutChoice):
        raise UserError(f"unknown layout {layout!r}; there are: {', '.join(get_args(LayoutChoice))}")
    if layout == "padded":
        return pack_padded
    refusal = tree_refusal(models)
    if layout == "tree" and refusal:
        raise UserError(f"--layout tree: this model takes no trees: {refusal}")
    # Float64 is for comparisons to the last digit, and where a model rounds to float32 inside, digits depend on layout.
    exact = any(parameter.dtype == torch.float64 for model in models for parameter in model.parameters())
    return pack_padded if refusal or (exact and layout == "auto") else pack_trees


def tree_refusal(models: Sequence[nn.Module]) -> str:
    """Why one of the models takes no trees, in words; empty if all of them do."""
    return next((reason for model in models if (reason := tree_plan(model).refusal)), "")


def batch_loss(
    policy: nn.Module,
    reference: nn.Module | Reference,
    batch: PackedBatch,
    objective: Objective,
    backend: ops.Backend = "auto",
    logits_budget: LogitsBudget | None = None,
) -> tuple[Tensor, PairScores]:
    """Sum of the pairs' losses, differentiable, with the scores of :func:`score_batch`, which then are constants.

    What training wants, in one pass over the logits; the naive backend takes the general way.
    """
    if backend == "naive":
        scores = score_batch(policy, reference, batch, objective, backend)
        return scores.loss.sum(), scores
    live = as_reference(reference)
    ref_states = live.states(batch)
    budget = logits_budget or LogitsBudget()
    with tied_gradient(policy, batch.input_ids.device) as tied:

        def loss(states: Tensor) -> tuple[Tensor, FusedLoss]:
            hidden, ref_hidden = Hidden(states, head_of(policy)), Hidden(ref_states, live.head())

            def sized(size: int | None) -> FusedLoss:
                return ops.pair_loss(
                    hidden, ref_hidden, batch.labels, batch.lengths, objective, size, backend=backend, tied=tied
                )

            fused = budget.within(sized, states.device)
            return fused.total, fused

        total, fused = run_in_head(policy, response_states(policy, batch), loss)
    logp = _sums(fused.tokens.logp, batch)
    return total, PairScores(fused.outcome, fused.stats, logp[:, 0], logp[:, 1], fused.tokens, batch)


def batch_loss_with_router(
    router: RouterLoss | None, policy: nn.Module, reference: nn.Module | Reference, batch: PackedBatch, *options: Any
) -> tuple[Tensor, PairScores]:
    """Computes :func:`batch_loss` with the policy's router loss in the loss of every pair."""
    if router is None:
        return batch_loss(policy, reference, batch, *options)
    with collect_router_logits(policy) as router_logits:
        total, scores = batch_loss(policy, reference, batch, *options)
    aux = router.of_batch(router_logits[-1], batch)  # a reference that runs in the policy's body runs before the policy
    term = router.coefficient * aux
    outcome = replace(scores.outcome, loss=scores.loss + term.detach())
    return total + batch.num_pairs * term, replace(scores, outcome=outcome, aux_loss=aux.detach())


def score_batch(
    policy: nn.Module,
    reference: nn.Module | Reference,
    batch: PackedBatch,
    objective: Objective,
    backend: ops.Backend = "auto",
    logits_budget: int | None = None,
) -> PairScores:
    """:func:`score_pairs` for a batch that is already laid out, on the policy's device, without the checks."""
    live = as_reference(reference)
    ref_states = live.states(batch)

    def statistics(states: Tensor) -> tuple[Tensor, Tensor, TokenStats]:
        hidden, ref_hidden = Hidden(states, head_of(policy)), Hidden(ref_states, live.head())
        tokens = ops.response_stats(hidden, ref_hidden, batch.labels, backend, logits_budget)
        return tokens.logp, tokens.kl, tokens

    logp, kl, tokens = run_in_head(policy, response_states(policy, batch), statistics)
    tokens = replace(tokens, logp=logp, kl=kl)
    logratio = _sums(logp - tokens.ref_logp, batch)
    kl, logp = _sums(kl, batch), _sums(logp.detach(), batch)
    stats = PairStats(logratio[:, 0], logratio[:, 1], kl[:, 0], kl[:, 1])
    return PairScores(objective(stats), stats, logp[:, 0], logp[:, 1], tokens, batch)


def _sums(values_N: Tensor, batch: PackedBatch) -> Tensor:
    """Sums a token statistic per sequence: ``[P, 2]``, chosen and rejected."""
    totals = torch.zeros(2 * batch.num_pairs, dtype=values_N.dtype, device=values_N.device)
    return totals.index_add(0, batch.sequence_ids, values_N).view(-1, 2)


def token_counts(batch: PackedBatch) -> Any:
    """Response tokens per pair and side, ``[P, 2]`` int64."""
    return torch.bincount(batch.sequence_ids, minlength=2 * batch.num_pairs).view(-1, 2)
