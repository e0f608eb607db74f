"""How far a policy has moved from its reference, and how varied it still is, along its own samples.

Shape legend: S samples, N response tokens of a batch, n rows of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdpo import ops
from tdpo.data.pack import pack_sequences
from tdpo.evaluate.estimates import Estimate
from tdpo.models.hidden import response_hidden
from tdpo.models.probe import evaluating
from tdpo.models.reference import Reference, reference_hidden
from tdpo.ops.heads import chunk_rows, default_logits_budget
from tdpo.ops.numerics import head_logits, statistics_dtype
from tdpo.types import Hidden, PackedBatch


@dataclass(frozen=True)
class SampleStats:
    """Sums over the response tokens of each sample, all ``[S]`` on the CPU; statistics in nats.

    Attributes:
        kl: sum_t KL(policy || reference) at the policy's own prefixes, exact over the vocabulary at every step.
        logratio: sum_t log pi(y_t) - log pi_ref(y_t). Its mean estimates the same KL with more variance.
        entropy: sum_t of the entropy of the policy's next-token distribution.
        length: Response tokens, int64.
    """

    kl: Tensor
    logratio: Tensor
    entropy: Tensor
    length: Tensor


@dataclass(frozen=True)
class Diversity:
    """What S samples of a policy say, as means with standard errors over samples.

    Attributes:
        kl: Sequence-level KL(policy || reference), nats per sample.
        kl_per_token: The same divided by the sample's length, nats per token.
        entropy: Predictive entropy of the policy, averaged within each sample, nats per token.
        length: Response tokens per sample.
        distinct_1: Distinct tokens over all tokens of all samples.
        distinct_2: Distinct token pairs over all adjacent pairs of all samples.
    """

    kl: Estimate
    kl_per_token: Estimate
    entropy: Estimate
    length: Estimate
    distinct_1: float
    distinct_2: float


def measure_samples(
    policy: nn.Module,
    reference: nn.Module | Reference,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    batch_size: int = 32,
) -> Diversity:
    """Measures divergence and diversity of responses that the policy sampled; see :class:`Diversity`.

    The mean KL estimates KL(policy || reference) of whole responses without bias when the responses were drawn from
    the policy's own distribution (temperature 1, no top-k, no top-p), up to the length they were cut at. Samples
    count as independent; draw one per prompt where the standard errors must hold.

    Args:
        policy: The causal language model the responses came from.
        reference: Its reference, a model with the same vocabulary or a reference strategy.
        prompts: Token ids of the prompt of each sample.
        responses: Token ids of each sample, end token included.
        batch_size: Sequences per forward pass.
    """
    stats = sample_stats(policy, reference, prompts, responses, batch_size)
    return Diversity(
        kl=Estimate.of(stats.kl),
        kl_per_token=Estimate.of(stats.kl / stats.length),
        entropy=Estimate.of(stats.entropy / stats.length),
        length=Estimate.of(stats.length),
        distinct_1=distinct_n(responses, 1),
        distinct_2=distinct_n(responses, 2),
    )


def sample_stats(
    policy: nn.Module,
    reference: nn.Module | Reference,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    batch_size: int = 32,
) -> SampleStats:
    """Computes sums per sample with one forward pass of each model, never ``[N, V]`` for a large N.

    Raises:
        ValueError: if prompts and responses do not match in number, there are none, or one of them is empty.
    """
    if len(prompts) != len(responses) or not len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses; both must be the same number, not 0")
    device = next(policy.parameters()).device
    models = [model for model in (policy, reference) if isinstance(model, nn.Module)]
    parts: list[Tensor] = []
    with evaluating(*models), torch.no_grad():
        for start in range(0, len(prompts), batch_size):
            rows = slice(start, start + batch_size)
            parts.append(_batch_sums(policy, reference, pack_sequences(prompts[rows], responses[rows]).to(device)))
    kl, logratio, entropy = torch.cat(parts, dim=1)
    return SampleStats(kl, logratio, entropy, torch.tensor([len(response) for response in responses]))


def _batch_sums(policy: nn.Module, reference: nn.Module | Reference, batch: PackedBatch) -> Tensor:
    """Computes KL, log-ratio and entropy of each row, ``[3, S]`` on the CPU."""
    hidden, ref_hidden = response_hidden(policy, batch), reference_hidden(reference, batch)
    # The operation gives KL(second || first). Trained against, the reference comes second; here the roles are swapped,
    # so that it is KL(policy || reference) that comes out, and "logp" is the reference's.
    swapped = ops.response_stats(ref_hidden, hidden, batch.labels)
    values = torch.stack((swapped.kl, swapped.ref_logp - swapped.logp, predictive_entropy(hidden)))
    sums = torch.zeros(3, batch.num_pairs, dtype=values.dtype, device=values.device)
    return sums.index_add(1, batch.sequence_ids // 2, values).cpu()


def predictive_entropy(hidden: Hidden, logits_budget: int | None = None) -> Tensor:
    """Computes the entropy of the next token at every position, ``[N]`` in nats, in chunks of bounded memory.

    Args:
        hidden: States ``[N, D]`` and head.
        logits_budget: Bytes the buffers of a chunk may take; None for the device's default.

    Example:
        >>> import math
        >>> from tdpo.types import Head
        >>> uniform = Hidden(torch.zeros(2, 4), Head(torch.ones(8, 4)))
        >>> [round(x, 4) for x in predictive_entropy(uniform).tolist()], round(math.log(8), 4)
        ([2.0794, 2.0794], 2.0794)
    """
    states, head = hidden.states, hidden.head
    wide = statistics_dtype(states.dtype)
    budget = default_logits_budget(states.device) if logits_budget is None else logits_budget
    entropy = torch.empty(states.shape[0], dtype=wide, device=states.device)
    step = chunk_rows(head, wide, budget // 2)  # logits, probabilities, and two more in the entropy
    for start in range(0, states.shape[0], step):
        p_nV = head_logits(states[start : start + step], head).softmax(-1)
        entropy[start : start + step] = torch.special.entr(p_nV).sum(-1)  # entr(p) = -p log p, and 0 at p = 0
    return entropy


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float:
    """Computes the share of distinct n-grams of a set of sequences (Li et al. 2016, arXiv 1510.03055).

    It falls as a set grows, so compare sets of one size. 0 where no sequence has n items.

    Example:
        >>> distinct_n([["a", "b", "a", "b"]], 1), round(distinct_n([["a", "b", "a", "b"]], 2), 3)
        (0.5, 0.667)
    """
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
