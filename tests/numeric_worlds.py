"""Small worlds the numerical tests share: random heads, tiny models, random pairs, and an independent second opinion.

The second opinion (`plain_...`) is written in plain torch from the papers' formulas and shares no code with tdpo.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from tdpo.ops.heads import padded_vocab
from tdpo.types import Head, Hidden, PairStats, TokenisedPair

BACKENDS = ("naive", "chunked")
OBJECTIVE_PARAMETERS = [("dpo", {"beta": 0.3}), ("tdpo1", {"beta": 0.3}), ("tdpo2", {"beta": 0.3, "alpha": 0.7})]


def shared_folder() -> Path:
    """Returns the folder of shared data beside the repository, or TDPO_SHARED."""
    return Path(os.environ.get("TDPO_SHARED", Path(__file__).resolve().parents[1].parent / "shared"))


def budget_for(rows: int, vocab: int, dtype: torch.dtype = torch.float64, buffers: int = 2) -> int:
    """Returns the bytes that ``rows`` rows of logits take in two buffers; a soft cap takes a third."""
    return max(1, rows * padded_vocab(vocab, dtype) * dtype.itemsize * buffers)


@dataclass(frozen=True)
class HeadProblem:
    """Inputs of the per-token operation: policy and reference states and heads, and labels."""

    policy: Hidden
    reference: Hidden
    labels: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        """The policy's tensors, in the order states, weight, bias where there is one."""
        head = self.policy.head
        return [self.policy.states, head.weight] + ([] if head.bias is None else [head.bias])

    def cast(self, dtype: torch.dtype) -> HeadProblem:
        """Rounds the values to ``dtype``; returns new leaves that require gradients on the policy's side."""
        return HeadProblem(_cast(self.policy, dtype, True), _cast(self.reference, dtype, False), self.labels)


def _cast(hidden: Hidden, dtype: torch.dtype, trainable: bool) -> Hidden:
    def fresh(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_(trainable)

    head = hidden.head
    bias = None if head.bias is None else fresh(head.bias)
    return Hidden(fresh(hidden.states), replace(head, weight=fresh(head.weight), bias=bias))


def head_problem(
    seed: int = 0,
    tokens: int = 7,
    width: int = 5,
    vocab: int = 11,
    ref_width: int | None = None,
    bias: bool = False,
    scale: float = 1.0,
    soft_cap: float | None = None,
    dtype: torch.dtype = torch.float64,
    spread: float = 1.0,
    closeness: float | None = None,
) -> HeadProblem:
    """Draws states and heads; with ``closeness`` the reference is the policy plus noise of that size."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return spread * torch.randn(*shape, generator=generator, dtype=torch.float64)

    states, weight, offset = normal(tokens, width), normal(vocab, width), normal(vocab) if bias else None
    if closeness is None:
        ref_width = ref_width or width
        ref_states, ref_weight, ref_offset = (
            normal(tokens, ref_width),
            normal(vocab, ref_width),
            normal(vocab) if bias else None,
        )
    else:
        ref_states, ref_weight = states + closeness * normal(tokens, width), weight + closeness * normal(vocab, width)
        ref_offset = None if offset is None else offset + closeness * normal(vocab)
    labels = torch.randint(vocab, (tokens,), generator=generator)
    problem = HeadProblem(
        Hidden(states, Head(weight, offset, scale, soft_cap)),
        Hidden(ref_states, Head(ref_weight, ref_offset, scale, soft_cap)),
        labels,
    )
    return problem.cast(dtype)


def plain_logits(hidden: Hidden) -> Tensor:
    """Computes logits of a head in the dtype of its inputs, the way a model's own forward makes them."""
    head = hidden.head
    logits = head.scale * F.linear(hidden.states, head.weight, head.bias)
    return logits if head.soft_cap is None else head.soft_cap * torch.tanh(logits / head.soft_cap)


def plain_token_stats(logits: Tensor, ref_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes (logp, ref_logp, KL(reference || policy)) of the labels from logits, by the definitions."""
    logp, ref_logp = logits.log_softmax(-1), ref_logits.detach().log_softmax(-1)
    rows = torch.arange(len(labels))
    return (
        logp[rows, labels],
        ref_logp[rows, labels],
        F.kl_div(logp, ref_logp, log_target=True, reduction="none").sum(-1),
    )


def plain_pair_loss(name: str, stats: PairStats, beta: float, alpha: float = 0.0) -> Tensor:
    """Computes the loss of each pair by the papers' formulas: DPO eq. 7, TDPO eq. 15, TDPO eq. 17."""
    score = stats.chosen_logratio - stats.rejected_logratio
    if name == "tdpo1":
        score = score - (stats.rejected_kl - stats.chosen_kl)
    if name == "tdpo2":
        score = score - alpha * (stats.rejected_kl - stats.chosen_kl.detach())
    return -torch.log(torch.sigmoid(beta * score))


def plain_pair_stats(policy: nn.Module, reference: nn.Module, pairs: Sequence[TokenisedPair]) -> PairStats:
    """Computes pair statistics from the models' own ``.logits``, one unpadded sequence at a time."""
    columns: list[list[Tensor]] = [[], [], [], []]
    for pair in pairs:
        for side, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
            ids = torch.tensor([[*pair.prompt_ids, *response]])
            start = len(pair.prompt_ids) - 1
            logits = policy(input_ids=ids, use_cache=False).logits[0, start:-1]
            with torch.no_grad():
                ref_logits = reference(input_ids=ids, use_cache=False).logits[0, start:-1]
            logp, ref_logp, kl = plain_token_stats(logits, ref_logits, torch.tensor(response))
            columns[side].append((logp - ref_logp).sum())
            columns[2 + side].append(kl.sum())
    return PairStats(*(torch.stack(column) for column in columns))


def random_pairs(seed: int = 0, count: int = 3, vocab: int = 50, longest: int = 7) -> list[TokenisedPair]:
    """Draws pairs of random ids with uneven lengths, prompts from 1 to ``longest`` tokens."""
    generator = torch.Generator().manual_seed(seed)

    def ids() -> list[int]:
        length = int(torch.randint(1, longest + 1, (), generator=generator))
        return torch.randint(vocab, (length,), generator=generator).tolist()

    return [TokenisedPair(ids(), ids(), ids(), row=row + 1) for row in range(count)]


def tiny_llama(seed: int = 0, vocab: int = 50, dtype: torch.dtype = torch.float64, **overrides: object) -> nn.Module:
    """Builds a random Llama of two layers and width 16, in evaluation mode."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides))).to(dtype).eval()


def moved(model: nn.Module, seed: int = 1, step: float = 0.05) -> nn.Module:
    """Returns a copy of the model with noise on every parameter: a policy that differs from its reference."""
    policy = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += step * noise.to(parameter.dtype)
    return policy


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    """Computes the gradient of a scalar in every parameter by name; zeros where there is none."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in model.named_parameters()
    }


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor], rtol: float) -> None:
    """Asserts that gradients agree within ``rtol`` of each parameter's largest entry, and that some is not zero."""
    assert ours.keys() == theirs.keys()
    largest = max(gradient.abs().max().item() for gradient in theirs.values())
    assert largest > 1e-6, "the comparison would be empty: no gradient at all"
    for name, gradient in theirs.items():
        bound = rtol * max(gradient.abs().max().item(), 1e-3 * largest)
        error = (ours[name] - gradient).abs().max().item()
        assert error <= bound, f"{name}: gradients differ by {error:.2e}, allowed are {bound:.2e}"
