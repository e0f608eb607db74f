"""Composes the stages: hidden states of policy and reference, token statistics, pair statistics, objective."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from tdpo import ops
from tdpo.data.dataset import check_fits
from tdpo.data.pack import pack_padded, pack_trees
from tdpo.errors import UserError
from tdpo.models.hidden import response_states, sparse_embedding_gradient
from tdpo.models.modes import same_mode
from tdpo.models.neighbours import laid_out, neighbour_plan
from tdpo.models.own_loss import RouterLoss, collect_router_logits
from tdpo.models.policy import head_of, position_limit, prove_head
from tdpo.models.probe import unwrapped
from tdpo.models.redirect import run_in_head
from tdpo.models.reference import Reference, as_reference, check_comparable
from tdpo.models.trees import tree_plan
from tdpo.objectives import Objective
from tdpo.ops.heads import default_logits_budget
from tdpo.ops.numerics import sum_pairs, sum_responses
from tdpo.types import Hidden, PackedBatch, PairLoss, PairStats, TokenisedPair, TokenStats

LayoutChoice = Literal["auto", "tree", "padded"]
logger = logging.getLogger("tdpo")


@dataclass(frozen=True)
class PairScores:
    """The results of one pass over P pairs; see :class:`~tdpo.types.PairLoss` and :class:`~tdpo.types.PairStats`.

    Attributes:
        loss: Loss of each pair, ``[P]``.
        chosen_reward: The objective's implicit reward of each chosen response, ``[P]``.
        rejected_reward: The same of each rejected response.
        stats: Sums over response tokens, ``[P]``, in nats.
        chosen_logp: ``[P]`` log-probability of the chosen response under the policy, in nats.
        rejected_logp: ``[P]``, the same of the rejected response.
        tokens: The token statistics ``[N]`` the sums were made of.
        batch: The layout, with the sequence (``sequence_ids``) and the token (``labels``) of each statistic.
        aux_loss: Load-balancing loss of the policy's routers, a scalar without its coefficient, where it is part of the
            loss.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    stats: PairStats
    chosen_logp: Tensor
    rejected_logp: Tensor
    tokens: TokenStats
    batch: PackedBatch
    aux_loss: Tensor | None = None


def score_pairs(
    policy: nn.Module,
    reference: nn.Module | Reference,
    pairs: Sequence[TokenisedPair],
    objective: Objective,
    layout: LayoutChoice = "auto",
    backend: ops.BackendName = "auto",
) -> PairScores:
    """Scores preference pairs in one forward pass of policy and reference.

    Args:
        policy: A transformers causal language model. Gradients flow into it when they are on; its training mode is
            left as it is, so call ``policy.eval()`` first where dropout must be off. A reference whose training mode
            is another arithmetic without being random runs in the policy's mode, any other in evaluation mode.
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
    return score_batch(unwrapped(policy), reference, lay_out(policy, reference, pairs, layout), objective, backend)


def pair_loss(
    policy: nn.Module,
    reference: nn.Module | Reference,
    pairs: Sequence[TokenisedPair],
    objective: Objective,
    layout: LayoutChoice = "auto",
    backend: ops.BackendName = "auto",
) -> tuple[Tensor, PairScores]:
    """Computes the summed loss of preference pairs in one pass over the logits, for a training loop of one's own.

    It costs no more than DPO and equals ``score_pairs(...).loss.sum()``, values and gradients. Divide it by the number
    of pairs of an optimizer step for their mean.

    Args:
        policy: As in :func:`score_pairs`; not wrapped in DDP or FSDP, which need the step inside their forward: there
            use :class:`~tdpo.TDPOTrainer`.
        reference: As in :func:`score_pairs`.
        pairs: As in :func:`score_pairs`.
        objective: As in :func:`score_pairs`.
        layout: As in :func:`score_pairs`.
        backend: As in :func:`score_pairs`.

    Returns:
        The sum of the pairs' losses, a scalar that can be differentiated once, and the scores, which carry no gradient.

    Raises:
        UserError: as :func:`score_pairs`.

    Example:
        >>> import copy, tdpo
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        >>> policy = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
        >>> reference = copy.deepcopy(policy)
        >>> optimizer = torch.optim.RMSprop(policy.parameters(), lr=1e-3)
        >>> pairs = [tdpo.TokenisedPair([1, 2], [3, 4], [5]), tdpo.TokenisedPair([6], [7], [8, 9])]
        >>> losses = []
        >>> for _ in range(3):
        ...     total, scores = tdpo.pair_loss(policy, reference, pairs, tdpo.objectives.tdpo2(beta=0.1, alpha=0.5))
        ...     (total / len(pairs)).backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     losses.append(total.item() / len(pairs))
        >>> round(losses[0], 4), losses[2] < losses[1] < losses[0]
        (0.6931, True)
    """
    return batch_loss(unwrapped(policy), reference, lay_out(policy, reference, pairs, layout), objective, backend)


def lay_out(
    policy: nn.Module, reference: nn.Module | Reference, pairs: Sequence[TokenisedPair], layout: LayoutChoice
) -> PackedBatch:
    """Checks that pairs and models fit each other, and lays the pairs out on the policy's device.

    Raises:
        UserError: as :func:`score_pairs`.
    """
    if not pairs:
        raise UserError("there are no pairs to score; pass at least one")
    policy = unwrapped(policy)
    prove_head(policy)
    if isinstance(reference, nn.Module):
        check_comparable(policy, unwrapped(reference))
    models = [policy, *as_reference(reference).models()]
    check_fits(pairs, head_of(policy).vocab_size, position_limit(*models))
    return packer(layout, models)(pairs).to(next(policy.parameters()).device)


def packer(layout: str, models: Sequence[nn.Module]) -> Callable[[Sequence[TokenisedPair]], PackedBatch]:
    """Returns the function that lays pairs out for some models.

    Raises:
        UserError: for an unknown layout, or trees for a model that does not take them (with the reason).
    """
    if layout not in get_args(LayoutChoice):
        raise UserError(f"unknown layout {layout!r}; there are: {', '.join(get_args(LayoutChoice))}")
    for model in models:
        neighbour_plan(model)  # while its weights are whole
    if layout == "padded":
        return pack_padded
    refusal = tree_refusal(models)
    if layout == "tree" and refusal:
        raise UserError(f"--layout tree: this model takes no trees: {refusal}")
    # Float64 is for comparisons to the last digit, and where a model rounds to float32 inside, digits depend on layout.
    exact = any(parameter.dtype == torch.float64 for model in models for parameter in model.parameters())
    return pack_padded if refusal or (exact and layout == "auto") else pack_trees


def tree_refusal(models: Sequence[nn.Module]) -> str:
    """Returns why one of the models takes no trees; empty if all of them do."""
    return next((reason for model in models if (reason := tree_plan(model).refusal)), "")


class LogitsBudget:
    """The bytes that logits may take at a time, halved once when the device runs out of memory over them.

    Args:
        size: Bytes, or None for the device's default.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size, self.halved = size, False

    def halve(self, device: torch.device) -> None:
        """Halves the budget for all further steps, and warns."""
        self.size, self.halved = max((self.size or default_logits_budget(device)) // 2, 1), True
        if device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning("out of memory over the logits: --logits_budget is %d bytes from here on, half of it", self.size)


def batch_loss(
    policy: nn.Module,
    reference: nn.Module | Reference,
    batch: PackedBatch,
    objective: Objective,
    backend: ops.BackendName = "auto",
    logits_budget: LogitsBudget | None = None,
    router: RouterLoss | None = None,
) -> tuple[Tensor, PairScores]:
    """Computes :func:`pair_loss` of a batch on the policy's device, without the checks.

    Args:
        policy: The policy.
        reference: The reference.
        batch: The pairs.
        objective: One of :mod:`tdpo.objectives`.
        backend: See :func:`tdpo.ops.token_stats`.
        logits_budget: Memory for logits; None for the device's default.
        router: Load-balancing loss of the policy's routers, added to the loss of every pair.
    """
    live, budget = as_reference(reference), logits_budget or LogitsBudget()

    def loss(states: Tensor) -> tuple[Tensor, PairLoss, PairStats, TokenStats]:
        hidden, ref_hidden = Hidden(states, head_of(policy)), Hidden(ref_states, live.head())
        compute = partial(ops.pair_loss, hidden, ref_hidden, batch.labels, batch.lengths, objective)
        try:
            return compute(budget.size, backend=backend)
        except torch.OutOfMemoryError:
            if budget.halved:
                raise
        # Outside the handler, whose traceback would keep the failed attempt's tensors alive. Only work inside the head
        # is repeated, where no other process waits.
        budget.halve(states.device)
        return compute(budget.size, backend=backend)

    recording: AbstractContextManager[Any] = nullcontext() if router is None else collect_router_logits(policy)
    with recording as router_logits:
        with same_mode(policy, live):
            ref_states = live.states(batch)
        with sparse_embedding_gradient(policy):
            states = response_states(policy, batch)
        total, outcome, stats, tokens = run_in_head(policy, states, loss)
    scores = _scores(outcome, stats, tokens, batch)
    if router is None:
        return total, scores
    # A reference that runs in the policy's body runs before the policy: its logits are not the last.
    aux = router.of_batch(router_logits[-1], laid_out(policy, batch))
    term = router.coefficient * aux
    scores = replace(scores, loss=scores.loss + term.detach(), aux_loss=aux.detach())
    return total + batch.num_pairs * term, scores


def score_batch(
    policy: nn.Module,
    reference: nn.Module | Reference,
    batch: PackedBatch,
    objective: Objective,
    backend: ops.BackendName = "auto",
    logits_budget: int | None = None,
) -> PairScores:
    """Computes :func:`score_pairs` of a batch on the policy's device, without the checks."""
    live = as_reference(reference)

    def token_stats(states: Tensor) -> tuple[Tensor, ...]:
        hidden, ref_hidden = Hidden(states, head_of(policy)), Hidden(ref_states, live.head())
        tokens = ops.response_stats(hidden, ref_hidden, batch.labels, backend, logits_budget)
        return tokens.logp, tokens.ref_logp, tokens.kl

    with same_mode(policy, live):
        ref_states = live.states(batch)
    tokens = TokenStats(*run_in_head(policy, response_states(policy, batch), token_stats))
    stats = PairStats(*sum_pairs(tokens, batch.sequence_ids, batch.num_pairs))
    return _scores(objective(stats), stats, tokens, batch)


def _scores(outcome: PairLoss, stats: PairStats, tokens: TokenStats, batch: PackedBatch) -> PairScores:
    logp = sum_responses(tokens.logp.detach(), batch.sequence_ids, batch.num_pairs)
    rewards = outcome.chosen_reward, outcome.rejected_reward
    return PairScores(outcome.loss, *rewards, stats, logp[0], logp[1], tokens, batch)


def token_counts(batch: PackedBatch) -> Any:
    """Counts the response tokens per pair and side, ``[P, 2]`` int64."""
    return torch.bincount(batch.sequence_ids, minlength=2 * batch.num_pairs).view(-1, 2)
