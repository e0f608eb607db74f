"""The types of the data flow, in its order. Every stage takes one of them and returns the next.

Shape legend, used as suffixes of tensor names throughout the package:
    R rows of a packed batch, T positions of a row, N response tokens of a batch, P preference pairs,
    D width of the hidden states, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

Message = dict[str, Any]
Text = str | list[Message]
Layout = Literal["padded", "tree"]
WEIGHTS = ("chosen_weights", "rejected_weights", "chosen_kl_weights", "rejected_kl_weights")
"""Columns and fields with token weights."""
LARGEST_WEIGHT = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class PreferenceRecord:
    """One preference as a person would read it.

    Attributes:
        prompt: Plain text, or a list of chat messages (``{"role": ..., "content": ...}``).
        chosen: The preferred response, of the same kind as ``prompt``.
        rejected: The other response.
        source: The file or dataset the record was read from, for messages.
        row: Its row there, counted from 1 as an editor counts lines.
        tools: Tools the chat template shows the model, as JSON schemas; only for chats.
        chat_template_kwargs: Further arguments of the chat template; only for chats.
        truncation_mode: Which part of the prompt stays when it is cut, where the source says so; None is the run's.
        weights: Token weights by column, of :data:`WEIGHTS`: one number per token of the response, or
            ``[start, end, weight]`` for spans of characters of its text.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    source: str = "memory"
    row: int = 0
    tools: list[Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    truncation_mode: Literal["keep_end", "keep_start"] | None = None
    weights: dict[str, list[Any]] | None = None


@dataclass(frozen=True)
class TokenisedPair:
    """One preference as token ids. Responses include their end token unless truncation removed it.

    Attributes:
        prompt_ids: Ids of the prompt, a beginning-of-sequence token included where the tokenizer adds one.
        chosen_ids: Ids of the preferred response.
        rejected_ids: Ids of the other response.
        row: Row number in the source, 0 if unknown; only used to name the pair in messages.
        chosen_weights: Weight of each token of ``chosen_ids`` on its log-ratio in the objective; None for 1 everywhere.
        rejected_weights: The same of ``rejected_ids``.
        chosen_kl_weights: Weight of each token of ``chosen_ids`` on its KL; None for 1 everywhere.
        rejected_kl_weights: The same of ``rejected_ids``.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    row: int = 0
    chosen_weights: list[float] | None = dataclasses.field(default=None, repr=False)
    rejected_weights: list[float] | None = dataclasses.field(default=None, repr=False)
    chosen_kl_weights: list[float] | None = dataclasses.field(default=None, repr=False)
    rejected_kl_weights: list[float] | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name in ("prompt_ids", "chosen_ids", "rejected_ids"):
            if not len(getattr(self, name)):
                raise ValueError(
                    f"TokenisedPair (row {self.row}): {name} is empty; every response needs a prompt token to be "
                    "predicted from and at least one token of its own"
                )
        for name in WEIGHTS:
            weights = getattr(self, name)
            ids = self.chosen_ids if name.startswith("chosen") else self.rejected_ids
            if weights is not None and (wrong := wrong_weights(weights, len(ids))):
                raise ValueError(f"TokenisedPair (row {self.row}): {name} {wrong}")

    @property
    def key(self) -> int:
        """Hash of the pair's ids, 64 bits, the same on every machine.

        Examples:
            >>> pair = TokenisedPair([1], [2], [3, 4], row=7)
            >>> pair.key == TokenisedPair([1], [2], [3, 4]).key, pair.key == TokenisedPair([1], [2, 3], [4]).key
            (True, False)
        """
        parts = (self.prompt_ids, self.chosen_ids, self.rejected_ids)
        numbers = array("q", [*map(len, parts), *(token for part in parts for token in part)])
        if sys.byteorder == "big":
            numbers.byteswap()
        return int.from_bytes(hashlib.blake2b(numbers.tobytes(), digest_size=8).digest(), "little", signed=True)

    @property
    def swapped(self) -> TokenisedPair:
        """The same pair with the preference turned around."""
        weights = self.rejected_weights, self.chosen_weights, self.rejected_kl_weights, self.chosen_kl_weights
        return TokenisedPair(self.prompt_ids, self.rejected_ids, self.chosen_ids, self.row, *weights)


def wrong_weights(weights: Sequence[float], tokens: int) -> str:
    """Describes what is wrong with the weights of a response; empty if they can be used.

    Examples:
        >>> wrong_weights([0.5, 1.0], 2), wrong_weights([0.5], 2), wrong_weights([0.0, 0.0], 2)
        ('', 'has 1 numbers for 2 tokens', 'is 0 for every token')
    """
    if len(weights) != tokens:
        return f"has {len(weights)} numbers for {tokens} tokens"
    for number, weight in enumerate(weights, 1):
        if not 0 <= weight <= LARGEST_WEIGHT:
            return f"has {weight} for token {number}; a weight is a finite number of at least 0"
    return "" if any(weights) else "is 0 for every token"


@dataclass(frozen=True)
class PackedBatch:
    """P pairs laid out in R rows for one forward pass, with the location of every response token.

    Attributes:
        input_ids: ``[R, T]`` int64.
        position_ids: ``[R, T]`` int64, the position each token has in its own sequence.
        tree_ids: ``[R, T]`` int64, which tree (pair or single sequence) of the row a position is in; -1 is padding.
        branch_ids: ``[R, T]`` int64: 0 prompt, 1 chosen, 2 rejected, -1 padding. A position attends to earlier
            positions of its own tree that are prompt or of its own branch; see :meth:`attends`.
        source_index: ``[N]`` int64, flat position in ``[R * T]`` whose hidden state predicts the response token.
        labels: ``[N]`` int64, the response tokens.
        sequence_ids: ``[N]`` int64, ``2p`` for chosen and ``2p + 1`` for rejected tokens of pair p; a pair's
            tokens are contiguous.
        pair_rows: ``[P]`` int64, source row of each pair (0 if unknown).
        lengths: 2P token counts on the host: chosen and rejected response of each pair in turn.
        layout: ``"padded"``: one sequence a row, so a causal mask is enough. ``"tree"``: the mask is needed.
        pair_keys: P numbers on the host, :attr:`TokenisedPair.key` of each pair; empty for sequences of other origin.
        weights: ``[2, N]`` float32: of each response token, the weight on its log-probability and on its KL in the
            objective; None for 1 everywhere.
    """

    input_ids: Tensor
    position_ids: Tensor
    tree_ids: Tensor
    branch_ids: Tensor
    source_index: Tensor
    labels: Tensor
    sequence_ids: Tensor
    pair_rows: Tensor
    lengths: tuple[int, ...] = ()
    layout: Layout = "padded"
    pair_keys: tuple[int, ...] = ()
    weights: Tensor | None = None

    @property
    def num_pairs(self) -> int:
        """P, the number of preference pairs."""
        return self.pair_rows.numel()

    def attends(self) -> Tensor:
        """Computes the attention mask, ``[R, T, T]`` bool: query position i (dim 1) sees key position j (dim 2)."""
        length = self.input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=self.input_ids.device).tril()
        same_tree = (self.tree_ids[:, :, None] == self.tree_ids[:, None, :]) & (self.tree_ids[:, None, :] >= 0)
        visible = (self.branch_ids[:, None, :] == 0) | (self.branch_ids[:, :, None] == self.branch_ids[:, None, :])
        return causal & same_tree & visible

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name, without those that are None: the form in which data loaders move a batch."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in fields.items() if value is not None}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PackedBatch:
        """Builds a batch from what :meth:`as_dict` returned."""
        return cls(**fields)

    def to(self, device: torch.device | str) -> PackedBatch:
        """Returns the same batch with every tensor on ``device``."""
        moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in self.as_dict().items()}
        return PackedBatch.from_dict(moved)


@dataclass(frozen=True)
class Head:
    """The language-model head, which turns a hidden state into a row of logits.

    ``logits = cap(scale * (hidden @ weight.T + bias))`` with ``cap(z) = soft_cap * tanh(z / soft_cap)`` where given.

    Attributes:
        weight: ``[V, D]``.
        bias: ``[V]`` or None.
        scale: Constant factor on the logits (Cohere multiplies, Granite divides).
        soft_cap: Bound of the logits (Gemma 2), or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @property
    def vocab_size(self) -> int:
        """V, rows of the weight."""
        return self.weight.shape[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Head:
        """Returns the same head with its tensors changed."""
        bias = None if self.bias is None else change(self.bias)
        return dataclasses.replace(self, weight=change(self.weight), bias=bias)


@dataclass(frozen=True)
class Hidden:
    """Final hidden states of response positions only, and the head that turns them into logits. Never logits.

    Attributes:
        states: ``[N, D]``, after the model's final norm.
        head: The head they are meant for.
    """

    states: Tensor
    head: Head


@dataclass(frozen=True)
class TokenStats:
    """Statistics of every response token, in nats, float32 (float64 for float64 models).

    Attributes:
        logp: ``[N]``, log pi(y_t | x, y_<t) of the policy; differentiable.
        ref_logp: ``[N]``, the reference's; constant.
        kl: ``[N]``, KL(reference || policy) over the full vocabulary at the position of y_t; differentiable.
    """

    logp: Tensor
    ref_logp: Tensor
    kl: Tensor


@dataclass(frozen=True)
class PairStats:
    """Sums over the response tokens of each side of each pair, all ``[P]``, in nats.

    Attributes:
        chosen_logratio: sum_t log pi(y_t) - log pi_ref(y_t) of the chosen response.
        rejected_logratio: The same of the rejected response.
        chosen_kl: Sequential KL(reference || policy) along the chosen response.
        rejected_kl: The same along the rejected response.
        chosen_logp: sum_t log pi(y_t) of the chosen response; None where only the four sums above are given.
        rejected_logp: The same of the rejected response.
        chosen_length: Number of tokens of the chosen response, in the dtype of the sums.
        rejected_length: The same of the rejected response.
    """

    chosen_logratio: Tensor
    rejected_logratio: Tensor
    chosen_kl: Tensor
    rejected_kl: Tensor
    chosen_logp: Tensor | None = None
    rejected_logp: Tensor | None = None
    chosen_length: Tensor | None = None
    rejected_length: Tensor | None = None


@dataclass(frozen=True)
class PairTokens:
    """The statistics of the N response tokens of P pairs as an objective sees them, in nats.

    Attributes:
        logratio: ``[N]``, log pi(y_t) - log pi_ref(y_t), times the token's weight.
        kl: ``[N]``, KL(reference || policy) at the position of y_t, times the token's KL weight.
        logp: ``[N]``, log pi(y_t), times the token's weight.
        sequence_ids: ``[N]`` int64 in ascending order, ``2p`` for chosen and ``2p + 1`` for rejected tokens of pair p.
        num_pairs: P.
    """

    logratio: Tensor
    kl: Tensor
    logp: Tensor
    sequence_ids: Tensor
    num_pairs: int

    @classmethod
    def of(
        cls, tokens: TokenStats, sequence_ids: Tensor, num_pairs: int, weights_2N: Tensor | None = None
    ) -> PairTokens:
        """Builds the statistics of pairs from those of tokens.

        Args:
            tokens: Statistics ``[N]``.
            sequence_ids: ``[N]``, the response of each token.
            num_pairs: P.
            weights_2N: Weights on log-probabilities and on KL; None for 1 everywhere.
        """
        logratio, kl, logp = tokens.logp - tokens.ref_logp, tokens.kl, tokens.logp
        if weights_2N is not None:
            weights, kl_weights = weights_2N.to(logp.dtype)
            logratio, kl, logp = weights * logratio, kl_weights * kl, weights * logp
        return cls(logratio, kl, logp, sequence_ids, num_pairs)

    @cached_property
    def sums(self) -> PairStats:
        """Sums over each response; a length is the number of its tokens, whatever their weights."""
        columns = (self.logratio, self.kl, self.logp, torch.ones_like(self.logp))
        summed = (self.per_response(column).view(-1, 2).t() for column in columns)
        return PairStats(*(side for sides in summed for side in sides))

    @cached_property
    def offsets(self) -> Tensor:
        """``[2P + 1]`` int64, the first token of each response, and N."""
        ids = self.sequence_ids
        if ids.device.type == "cpu" and (ids.diff() < 0).any():  # a GPU would be waited for
            raise ValueError("sequence_ids must be in ascending order")
        return torch.searchsorted(ids, torch.arange(2 * self.num_pairs + 1, device=ids.device))

    def per_response(self, values_N: Tensor) -> Tensor:
        """Sums values over each response, ``[2P]``, in an order that does not change from run to run on a GPU."""
        if values_N.device.type not in ("cpu", "cuda", "meta"):
            return values_N.new_zeros(2 * self.num_pairs).index_add(0, self.sequence_ids, values_N)
        return torch.segment_reduce(values_N, "sum", offsets=self.offsets, unsafe=True)


@dataclass(frozen=True)
class PairLoss:
    """Loss and rewards of each pair, all ``[P]``.

    Attributes:
        loss: The pair's loss; differentiable in the statistics.
        chosen_reward: The objective's own implicit reward of the chosen response; carries no gradient.
        rejected_reward: The same of the rejected response.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
