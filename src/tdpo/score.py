"""Scores preference pairs: hidden states of policy and reference, token statistics, pair statistics, objective."""

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
from tdpo.types import Hidden, PackedBatch, PairLoss, PairStats, PairTokens, TokenisedPair, TokenStats

LayoutChoice = Literal["auto", "tree", "padded"]
logger = logging.getLogger("tdpo")


@dataclass(frozen=True)
class PairScores:
    """The results of one pass over P pairs; see :class:`~tdpo.types.PairLoss` and :class:`~tdpo.types.PairStats`.

    Attributes:
        loss: Loss of each pair, ``[P]``.
        chosen_reward: The objective's implicit reward of each chosen response, ``[P]``.
        rejected_reward: The same for each rejected response.
        stats: Log-ratio, sequential KL, log-probability and length of chosen and rejected responses, ``[P]`` each, in
            nats; not weighted by token weights.
        tokens: Statistics of each response token, ``[N]``.
        batch: The packed batch; ``sequence_ids`` and ``labels`` say which response and which token each entry of
            ``tokens`` belongs to.
        aux_loss: Router load-balancing loss before its coefficient, a scalar; None if the loss does not include it.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    stats: PairStats
    tokens: TokenStats
    batch: PackedBatch
    aux_loss: Tensor | None = None

    @property
    def chosen_logp(self) -> Tensor | None:
        """``[P]`` log-probability of the chosen response under the policy, in nats."""
        return self.stats.chosen_logp

    @property
    def rejected_logp(self) -> Tensor | None:
        """``[P]`` log-probability of the rejected response under the policy, in nats."""
        return self.stats.rejected_logp


def score_pairs(
    policy: nn.Module,
    reference: nn.Module | Reference | None,
    pairs: Sequence[TokenisedPair],
    objective: Objective,
    layout: LayoutChoice = "auto",
    backend: ops.BackendName = "auto",
) -> PairScores:
    """Scores preference pairs in one forward pass of policy and reference.

    Args:
        policy: A transformers causal language model. Gradients flow into it when they are on; its training mode is
            left as it is, so call ``policy.eval()`` first where dropout must be off.
        reference: A second causal language model with the same vocabulary, or a reference strategy. Never trained. It
            runs in evaluation mode, except where training mode changes the results of both models without randomness:
            there it runs in the policy's mode. None for an objective without a reference (``simpo``); log-ratios and
            KL are then NaN.
        pairs: P tokenised pairs, scored in one batch.
        objective: One of :mod:`tdpo.objectives`.
        layout: ``"tree"``: each prompt is computed once and shared by its two responses; a short test run first checks
            that both models compute this correctly. ``"padded"``: one sequence per row. ``"auto"``: trees if all
            models pass the test and none is in float64, padded rows otherwise.
        backend: See :func:`tdpo.ops.token_stats`.

    Returns:
        Losses, rewards and statistics per pair and per token, in nats.

    Raises:
        UserError: for no pairs, an unknown layout, ``"tree"`` with a model that does not support it, different
            vocabularies, a model other than a causal language model, a token id outside the vocabulary, or a pair
            longer than the model's position limit.

    Source: TDPO (arXiv 2404.11999), section 4; DPO (arXiv 2305.18290), eq. 7.
    """
    return score_batch(
        unwrapped(policy), reference, check_and_pack(policy, reference, pairs, layout), objective, backend
    )


def pair_loss(
    policy: nn.Module,
    reference: nn.Module | Reference | None,
    pairs: Sequence[TokenisedPair],
    objective: Objective,
    layout: LayoutChoice = "auto",
    backend: ops.BackendName = "auto",
) -> tuple[Tensor, PairScores]:
    """Computes the summed loss of preference pairs in one pass over the logits, for a custom training loop.

    It equals ``score_pairs(...).loss.sum()``, in value and gradients. For a mean loss, divide it by the number of pairs
    in the optimizer step.

    Args:
        policy: As in :func:`score_pairs`. Must not be wrapped in DDP or FSDP, which synchronise gradients only if the
            wrapper's own forward is called; use :class:`~tdpo.TDPOTrainer` with them.
        reference: As in :func:`score_pairs`.
        pairs: As in :func:`score_pairs`.
        objective: As in :func:`score_pairs`.
        layout: As in :func:`score_pairs`.
        backend: As in :func:`score_pairs`.

    Returns:
        The sum of the pairs' losses, a scalar that can be differentiated once, and the detached scores.

    Raises:
        UserError: as :func:`score_pairs`.

    Examples:
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
    return batch_loss(
        unwrapped(policy), reference, check_and_pack(policy, reference, pairs, layout), objective, backend
    )


def check_and_pack(
    policy: nn.Module, reference: nn.Module | Reference | None, pairs: Sequence[TokenisedPair], layout: LayoutChoice
) -> PackedBatch:
    """Checks that pairs and models fit each other, and packs the pairs into a batch on the policy's device.

    Raises:
        UserError: as :func:`score_pairs`.
    """
    if not pairs:
        raise UserError("there are no pairs to score; pass at least one")
    policy = unwrapped(policy)
    prove_head(policy)
    if isinstance(reference, nn.Module):
        check_comparable(policy, unwrapped(reference))
    models = [policy, *([] if reference is None else as_reference(reference).models())]
    check_fits(pairs, head_of(policy).vocab_size, position_limit(*models))
    return packer(layout, models)(pairs).to(next(policy.parameters()).device)


def packer(layout: str, models: Sequence[nn.Module]) -> Callable[[Sequence[TokenisedPair]], PackedBatch]:
    """Returns the function that packs pairs in a layout: :func:`pack_trees` or :func:`pack_padded`.

    Args:
        layout: A :data:`LayoutChoice`.
        models: The policy and the models of the reference.

    Raises:
        UserError: for an unknown layout, or trees for a model that does not support them (with the reason).
    """
    if layout not in get_args(LayoutChoice):
        raise UserError(f"unknown layout {layout!r}; use one of: {', '.join(get_args(LayoutChoice))}")
    for model in models:
        neighbour_plan(model)  # measured now and remembered: sharded weights do not allow it later
    if layout == "padded":
        return pack_padded
    refusal = tree_refusal(models)
    if layout == "tree" and refusal:
        raise UserError(
            f"--layout tree: this model does not support it: {refusal}; use --layout auto or --layout padded"
        )
    # Float64 is used to compare last digits, which differ in trees if a model rounds to float32 internally.
    exact = any(parameter.dtype == torch.float64 for model in models for parameter in model.parameters())
    return pack_padded if refusal or (exact and layout == "auto") else pack_trees


def tree_refusal(models: Sequence[nn.Module]) -> str:
    """Returns the reason why one of the models does not support trees; empty if all of them do."""
    return next((reason for model in models if (reason := tree_plan(model).refusal)), "")


class LogitsBudget:
    """The bytes of logits in memory at a time. Halved at most once, after an out-of-memory error.

    The device's default, which depends on its free memory, is taken once and kept in checkpoints: a resumed run forms
    the same groups of pairs, and so rounds alike.

    Args:
        size: Bytes, or None for the device's default.
    """

    def __init__(self, size: int | None = None) -> None:
        self.size, self.halved, self._given = size, False, size is not None

    def bytes_on(self, device: torch.device) -> int:
        """Returns the budget; the first call settles a default."""
        if self.size is None:
            self.size = default_logits_budget(device)
        return self.size

    def state(self) -> dict[str, Any]:
        """Returns the budget for a checkpoint."""
        return {"size": self.size}

    def load(self, state: dict[str, Any]) -> None:
        """Restores the size, which may be halved again, unless one was given; an empty state changes nothing."""
        if not self._given:
            self.size = state.get("size", self.size)

    def halve(self, device: torch.device) -> None:
        """Halves the budget for all further steps, and warns."""
        self.size, self.halved = max(self.bytes_on(device) // 2, 1), True
        if device.type == "cuda":
            torch.cuda.empty_cache()
        logger.warning(
            "out of memory while computing logits: --logits_budget is halved to %d bytes for the rest of the run; give "
            "this value to the next run",
            self.size,
        )


def batch_loss(
    policy: nn.Module,
    reference: nn.Module | Reference | None,
    batch: PackedBatch,
    objective: Objective,
    backend: ops.BackendName = "auto",
    logits_budget: LogitsBudget | None = None,
    router: RouterLoss | None = None,
) -> tuple[Tensor, PairScores]:
    """Computes :func:`pair_loss` of a packed batch on the policy's device, without checks.

    Args:
        policy: As in :func:`score_pairs`, not wrapped.
        reference: As in :func:`score_pairs`.
        batch: The packed pairs.
        objective: One of :mod:`tdpo.objectives`.
        backend: See :func:`tdpo.ops.token_stats`.
        logits_budget: Limit on the logits in memory, halved if the device runs out; None for the device's default.
        router: Load-balancing loss of the policy's routers, added to the loss of every pair; None for none.
    """
    ref, budget = _strategy(reference, objective), logits_budget or LogitsBudget()

    def loss_in_head(states: Tensor) -> tuple[Tensor, PairLoss, PairStats, TokenStats]:
        """Computes the loss; after an out-of-memory error once more, with half the budget."""
        hidden, ref_hidden = Hidden(states, head_of(policy)), None if ref is None else Hidden(ref_states, ref.head())
        compute = partial(ops.pair_loss, hidden, ref_hidden, batch.labels, batch.lengths, objective)
        try:
            return compute(budget.bytes_on(states.device), backend, batch.weights)
        except torch.OutOfMemoryError:
            if budget.halved:
                raise
        # Not in the except block, whose traceback keeps the tensors of the failed attempt alive. The retry is safe with
        # several processes: it contains no collective operation.
        budget.halve(states.device)
        return compute(budget.bytes_on(states.device), backend, batch.weights)

    recording: AbstractContextManager[Any] = nullcontext() if router is None else collect_router_logits(policy)
    with recording as router_logits:
        ref_states = _reference_states(policy, ref, batch)
        with sparse_embedding_gradient(policy):
            states = response_states(policy, batch)
        total, outcome, stats, tokens = run_in_head(policy, states, loss_in_head)
    scores = PairScores(outcome.loss, outcome.chosen_reward, outcome.rejected_reward, stats, tokens, batch)
    if router is None:
        return total, scores
    # If the reference shares the policy's modules, its router logits were recorded too; those of the policy are last.
    aux = router.of_batch(router_logits[-1], laid_out(policy, batch))
    term = router.coefficient * aux
    scores = replace(scores, loss=scores.loss + term.detach(), aux_loss=aux.detach())
    return total + batch.num_pairs * term, scores


def score_batch(
    policy: nn.Module,
    reference: nn.Module | Reference | None,
    batch: PackedBatch,
    objective: Objective,
    backend: ops.BackendName = "auto",
    logits_budget: int | None = None,
) -> PairScores:
    """Computes :func:`score_pairs` of a packed batch on the policy's device, without checks."""
    ref = _strategy(reference, objective)

    def token_stats(states: Tensor) -> tuple[Tensor, ...]:
        hidden, ref_hidden = Hidden(states, head_of(policy)), None if ref is None else Hidden(ref_states, ref.head())
        tokens = ops.response_stats(hidden, ref_hidden, batch.labels, backend, logits_budget)
        return tokens.logp, tokens.ref_logp, tokens.kl

    ref_states = _reference_states(policy, ref, batch)
    tokens = TokenStats(*run_in_head(policy, response_states(policy, batch), token_stats))
    outcome = objective.pair_loss(PairTokens.of(tokens, batch.sequence_ids, batch.num_pairs, batch.weights))
    stats = PairTokens.of(tokens, batch.sequence_ids, batch.num_pairs).sums
    return PairScores(outcome.loss, outcome.chosen_reward, outcome.rejected_reward, stats, tokens, batch)


def _strategy(reference: nn.Module | Reference | None, objective: Objective) -> Reference | None:
    """Returns the strategy that runs the reference; None if the objective does not use a reference."""
    if not objective.uses_reference:
        return None
    if reference is None:
        raise UserError(f"{objective} compares with a reference; pass a model or a strategy as `reference`")
    return as_reference(reference)


def _reference_states(policy: nn.Module, ref: Reference | None, batch: PackedBatch) -> Any:
    """Returns the reference's hidden states of response tokens; None without a reference."""
    if ref is None:
        return None
    with same_mode(policy, ref):
        return ref.states(batch)
