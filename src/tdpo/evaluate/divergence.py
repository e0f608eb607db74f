"""Divergence between a policy and its reference along responses, exact over the vocabulary at every token.

Shape legend: S responses, N response tokens of a batch, n rows of one chunk, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tdpo.data.pack import pack_sequences
from tdpo.models.hidden import response_hidden
from tdpo.models.probe import evaluating
from tdpo.models.reference import Reference, reference_hidden
from tdpo.ops.heads import chunk_rows, default_logits_budget
from tdpo.ops.numerics import head_logits, kl_terms, statistics_dtype
from tdpo.types import Hidden, PackedBatch


@dataclass(frozen=True)
class ResponseStats:
    """Sums over the tokens of each response, all ``[S]`` on the CPU; statistics in nats.

    The mean of ``kl_policy_reference`` over responses that the policy sampled from its own distribution (temperature
    1, no top-k, no top-p) estimates KL(policy || reference) of whole responses without bias, up to the length that
    they were cut at; ``kl_reference_policy`` on responses of the reference estimates KL(reference || policy). On other
    responses, such as those of a dataset, they are sums of token-level KLs (sequential KL, eq. 12 of the TDPO paper).

    Attributes:
        kl_policy_reference: sum_t KL(policy || reference) of the next-token distributions.
        kl_reference_policy: sum_t KL(reference || policy).
        logratio: sum_t log pi(y_t) - log pi_ref(y_t).
        entropy: Sum over t of the entropy of the policy's next-token distribution.
        ref_entropy: The same for the reference.
        length: Number of tokens, int64.
    """

    kl_policy_reference: Tensor
    kl_reference_policy: Tensor
    logratio: Tensor
    entropy: Tensor
    ref_entropy: Tensor
    length: Tensor


def response_stats(
    policy: nn.Module,
    reference: nn.Module | Reference,
    prompts: Sequence[list[int]],
    responses: Sequence[list[int]],
    batch_size: int = 32,
) -> ResponseStats:
    """Computes the statistics of responses with one forward pass of each model, without gradient.

    Args:
        policy: The policy, a causal language model; its training mode is restored.
        reference: Its reference, a model with the same vocabulary or a reference strategy.
        prompts: Token ids of the prompt of each response.
        responses: Token ids of each response, end token included.
        batch_size: Sequences per forward pass; results depend on it only by rounding.

    Raises:
        ValueError: if the numbers of prompts and responses differ or are 0, or one of them is empty.
    """
    if len(prompts) != len(responses) or not len(prompts):
        raise ValueError(f"{len(prompts)} prompts and {len(responses)} responses; the numbers must be equal and not 0")
    for number, (prompt, response) in enumerate(zip(prompts, responses, strict=True), start=1):
        if not len(prompt) or not len(response):
            raise ValueError(f"response {number}: {'it' if len(prompt) else 'its prompt'} has no tokens")
    device = next(policy.parameters()).device
    models = [model for model in (policy, reference) if isinstance(model, nn.Module)]
    # Sequences of similar length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]) + len(responses[index]))
    parts: list[Tensor] = []
    with evaluating(*models), torch.no_grad():
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            batch = pack_sequences([prompts[i] for i in rows], [responses[i] for i in rows]).to(device)
            parts.append(_batch_sums(policy, reference, batch))
    sums = torch.empty_like(joined := torch.cat(parts, dim=1))
    sums[:, order] = joined
    lengths = torch.tensor([len(response) for response in responses])
    return ResponseStats(sums[0], sums[1], sums[2], sums[3], sums[4], lengths)


def _batch_sums(policy: nn.Module, reference: nn.Module | Reference, batch: PackedBatch) -> Tensor:
    """Computes the sums of each response of a batch, ``[5, S]`` on the CPU."""
    values = token_divergence(response_hidden(policy, batch), reference_hidden(reference, batch), batch.labels)
    sums = torch.zeros(len(values), batch.num_pairs, dtype=values.dtype, device=values.device)
    return sums.index_add(1, batch.sequence_ids // 2, values).cpu()


def token_divergence(policy: Hidden, reference: Hidden, labels_N: Tensor, logits_budget: int | None = None) -> Tensor:
    """Computes divergences in both directions and entropies at every token, in chunks of bounded memory.

    Args:
        policy: Hidden states ``[N, D]`` and head of the policy.
        reference: The same for the reference.
        labels_N: Response tokens, int64.
        logits_budget: Maximum size of the buffers of a chunk in bytes; None for the device's default.

    Returns:
        ``[5, N]`` in nats, float32 (float64 for float64 states): KL(policy || reference), KL(reference || policy),
        log-ratio of the label, entropy of the policy, entropy of the reference.

    Examples:
        >>> import math
        >>> from tdpo.types import Head
        >>> uniform = Hidden(torch.zeros(1, 4), Head(torch.ones(8, 4)))
        >>> entropy, ref_entropy = token_divergence(uniform, uniform, torch.tensor([0]))[3:, 0].tolist()
        >>> round(entropy, 4) == round(ref_entropy, 4) == round(math.log(8), 4)
        True
    """
    device, wide = policy.states.device, statistics_dtype(policy.states.dtype)
    budget = default_logits_budget(device) if logits_budget is None else logits_budget
    values = torch.empty(5, len(labels_N), dtype=wide, device=device)
    step = chunk_rows(policy.head, wide, budget // 4)  # logits and probabilities of both, and temporaries
    for start in range(0, len(labels_N), step):
        rows = slice(start, start + step)
        logp_nV, ref_logp_nV = (
            head_logits(hidden.states[rows], hidden.head).log_softmax(-1) for hidden in (policy, reference)
        )
        logratio_n = (logp_nV - ref_logp_nV).gather(1, labels_N[rows, None])[:, 0]
        values[:, rows] = torch.stack(
            (
                kl_terms(ref_logp_nV, logp_nV).sum(-1),  # KL(second || first)
                kl_terms(logp_nV, ref_logp_nV).sum(-1),
                logratio_n,
                torch.special.entr(logp_nV.exp()).sum(-1),  # entr(p) = -p log p, and 0 at p = 0
                torch.special.entr(ref_logp_nV.exp()).sum(-1),
            )
        )
    return values
