"""Statistics of every token of preference pairs, with the most likely alternatives under both models.

Shape legend: N response tokens of a batch, n rows of one chunk, V vocabulary, K alternatives of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from tdpo import ops
from tdpo.data.token_texts import Piece, pieces
from tdpo.models.hidden import response_hidden
from tdpo.models.probe import evaluating
from tdpo.models.reference import Reference, as_reference, reference_hidden
from tdpo.objectives import Objective, weighted
from tdpo.ops.heads import chunk_rows, default_logits_budget
from tdpo.ops.numerics import head_logits, statistics_dtype
from tdpo.score import check_and_pack
from tdpo.train.progress import bar
from tdpo.types import Hidden, PairTokens, TokenisedPair

Floats = NDArray[np.float64]
TOP = 5
"""Most likely tokens of each model that are kept at every position."""


class Alternatives(NamedTuple):
    """The most likely tokens at each of T positions under either model, K of them, some twice.

    Attributes:
        ids: ``[T, K]`` token ids.
        policy: ``[T, K]`` their probabilities under the policy.
        reference: ``[T, K]`` their probabilities under the reference.
    """

    ids: NDArray[np.int64]
    policy: Floats
    reference: Floats


@dataclass(frozen=True)
class InspectedResponse:
    """One response of a pair, token by token; statistics are in nats.

    Attributes:
        ids: Token ids, ``[T]``.
        pieces: Text of the tokens; a piece has several tokens where only together they are a character.
        logp: ``[T]`` log pi(y_t) of the policy.
        ref_logp: ``[T]`` the reference's.
        kl: ``[T]`` KL(reference || policy) at the position of y_t.
        weights: ``[T]`` weight of the token's log-ratio in the objective.
        kl_weights: ``[T]`` weight of its KL.
        alternatives: The most likely tokens at each position.
        reward: Implicit reward of the response in the objective.
    """

    ids: list[int]
    pieces: list[Piece]
    logp: Floats
    ref_logp: Floats
    kl: Floats
    weights: Floats
    kl_weights: Floats
    alternatives: Alternatives
    reward: float

    @property
    def logratio(self) -> Floats:
        """``[T]`` log pi(y_t) - log pi_ref(y_t)."""
        return self.logp - self.ref_logp

    @property
    def text(self) -> str:
        """Text of the response, special tokens included."""
        return "".join(piece.text for piece in self.pieces)


@dataclass(frozen=True)
class InspectedPair:
    """A preference pair, token by token.

    Attributes:
        row: Row in the source, counted from 1; 0 if unknown.
        prompt: Text of the prompt's tokens, as the models see it.
        chosen: The preferred response.
        rejected: The other response.
        loss: Loss of the pair in the objective.
    """

    row: int
    prompt: str
    chosen: InspectedResponse
    rejected: InspectedResponse
    loss: float

    @property
    def margin(self) -> float:
        """Reward of the chosen response minus that of the rejected one."""
        return self.chosen.reward - self.rejected.reward

    @property
    def kl(self) -> float:
        """Sequential KL(reference || policy) of both responses together."""
        return float(self.chosen.kl.sum() + self.rejected.kl.sum())

    @property
    def largest_kl(self) -> float:
        """Largest KL(reference || policy) at a single token of the pair."""
        return float(max(self.chosen.kl.max(), self.rejected.kl.max()))


def inspect_pairs(
    policy: nn.Module,
    reference: nn.Module | Reference,
    pairs: Sequence[TokenisedPair],
    objective: Objective,
    tokenizer: Any,
    batch_size: int = 8,
    token_weights: str | None = None,
    progress: bool = False,
) -> list[InspectedPair]:
    """Computes the statistics of every token of preference pairs, as :func:`tdpo.score_pairs` does.

    Args:
        policy: A causal language model; its training mode is restored.
        reference: Its reference, with the same vocabulary, or a reference strategy; used for the statistics even if the
            objective has none.
        pairs: Tokenised pairs.
        objective: Defines loss and rewards.
        tokenizer: The models' tokenizer.
        batch_size: Pairs per forward pass; results depend on it only by rounding.
        token_weights: Weights by position, as in training; see :class:`tdpo.objectives.PositionWeights`.
        progress: Whether to show a bar on a terminal's standard error.

    Raises:
        UserError: as :func:`tdpo.score_pairs`.
    """
    # Pairs of similar length share a batch: less padding.
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i].prompt_ids) + len(pairs[i].chosen_ids))
    found: dict[int, InspectedPair] = {}
    shown = bar(Console(stderr=True, quiet=not progress), transient=True)
    with evaluating(policy, *as_reference(reference).models()), torch.no_grad(), shown:
        task = shown.add_task("scoring", total=len(pairs), figures="")
        for start in range(0, max(len(order), 1), batch_size):
            rows = order[start : start + batch_size]
            batch = [pairs[row] for row in rows]
            results = _inspect_batch(policy, reference, batch, objective, tokenizer, token_weights)
            found |= dict(zip(rows, results, strict=True))
            shown.update(task, advance=len(rows))
    return [found[row] for row in range(len(pairs))]


def _inspect_batch(
    policy: nn.Module,
    reference: nn.Module | Reference,
    pairs: Sequence[TokenisedPair],
    objective: Objective,
    tokenizer: Any,
    token_weights: str | None,
) -> list[InspectedPair]:
    batch = weighted(lambda pairs: check_and_pack(policy, reference, pairs, "auto"), token_weights)(pairs)
    hidden, ref_hidden = response_hidden(policy, batch), reference_hidden(reference, batch)
    stats = ops.response_stats(hidden, ref_hidden, batch.labels)
    top = top_tokens(hidden, ref_hidden, TOP)
    outcome = objective.pair_loss(PairTokens.of(stats, batch.sequence_ids, batch.num_pairs, batch.weights))
    columns = [column.double().cpu().numpy() for column in (stats.logp, stats.ref_logp, stats.kl)]
    weights = np.ones((2, len(columns[0]))) if batch.weights is None else batch.weights.double().cpu().numpy()
    columns += [*weights, *(part.cpu().numpy() for part in top)]
    rewards = torch.stack([outcome.chosen_reward, outcome.rejected_reward], 1).flatten().tolist()
    responses: list[InspectedResponse] = []
    start = 0
    for length, reward in zip(batch.lengths, rewards, strict=True):
        rows, number = slice(start, start + length), len(responses)
        pair = pairs[number // 2]
        ids = list(pair.rejected_ids if number % 2 else pair.chosen_ids)
        texts = pieces(ids, tokenizer.decode, pair.prompt_ids)
        logp, ref_logp, kl, weight, kl_weight, *alternatives = (column[rows] for column in columns)
        kept = Alternatives(*alternatives)
        responses.append(InspectedResponse(ids, texts, logp, ref_logp, kl, weight, kl_weight, kept, reward))
        start += length
    shown = [tokenizer.decode(pair.prompt_ids, clean_up_tokenization_spaces=False) for pair in pairs]
    losses = outcome.loss.tolist()
    return [
        InspectedPair(pair.row, prompt, chosen, rejected, loss)
        for pair, prompt, chosen, rejected, loss in zip(
            pairs, shown, responses[::2], responses[1::2], losses, strict=True
        )
    ]


def top_tokens(
    policy: Hidden, reference: Hidden, count: int, logits_budget: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the most likely tokens of each model at every position, and their probabilities under both.

    Args:
        policy: Hidden states ``[N, D]`` and head of the policy.
        reference: The same for the reference.
        count: Tokens of each model; at most the size of the vocabulary.
        logits_budget: Maximum size of the logits of a chunk in bytes; None for the device's default.

    Returns:
        ``[N, 2 count]`` each: token ids, the policy's before the reference's; probabilities under the policy; under
        the reference.

    Examples:
        >>> from tdpo.types import Head
        >>> policy, reference = (Hidden(torch.ones(1, 1), Head(torch.tensor([[a], [1.0]]))) for a in (2.0, 0.0))
        >>> top_tokens(policy, reference, 1)[0].tolist()
        [[0, 1]]
    """
    wide, device = statistics_dtype(policy.states.dtype), policy.states.device
    budget = default_logits_budget(device) if logits_budget is None else logits_budget
    count = min(count, policy.head.vocab_size)
    step = chunk_rows(policy.head, wide, budget // 2)  # logits and probabilities of both
    parts = []
    for start in range(0, len(policy.states), step):
        rows = slice(start, start + step)
        p_nV, ref_p_nV = (head_logits(side.states[rows], side.head).softmax(-1) for side in (policy, reference))
        ids_nK = torch.cat([side.topk(count).indices for side in (p_nV, ref_p_nV)], 1)
        parts.append((ids_nK, p_nV.gather(1, ids_nK), ref_p_nV.gather(1, ids_nK)))
    ids, probabilities, ref_probabilities = (torch.cat(column) for column in zip(*parts, strict=True))
    return ids, probabilities, ref_probabilities
