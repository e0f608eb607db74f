"""The metrics of training on held-out pairs, outside of a trainer."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from rich.console import Console
from torch import nn

from tdpo import ops
from tdpo.errors import UserError
from tdpo.models.probe import evaluating
from tdpo.models.reference import check_comparable
from tdpo.objectives import Objective, weighted
from tdpo.score import LayoutChoice, packer, score_batch
from tdpo.train.metrics import Sums, pair_columns, pair_means
from tdpo.train.progress import bar, figures
from tdpo.types import TokenisedPair


def evaluate_pairs(
    policy: nn.Module,
    reference: nn.Module | None,
    pairs: Sequence[TokenisedPair],
    objective: Objective,
    batch_size: int = 8,
    layout: LayoutChoice = "auto",
    backend: ops.BackendName = "auto",
    logits_budget: int | None = None,
    progress: bool = False,
    token_weights: str | None = None,
) -> dict[str, float]:
    """Scores pairs in batches of similar length, without gradient, both models in evaluation mode.

    Args:
        policy: Causal language model; its training mode is restored.
        reference: The same for the reference; None for an objective without one.
        pairs: At least one pair.
        objective: Decides ``loss`` and ``rewards/*``.
        batch_size: Pairs at a time; no figure depends on it beyond rounding.
        layout: See :func:`tdpo.score_pairs`.
        backend: See :func:`tdpo.ops.token_stats`.
        logits_budget: See :func:`tdpo.ops.response_stats`.
        progress: Whether to show a bar on a terminal's standard error.
        token_weights: Weights by position, as in training; see :class:`tdpo.objectives.PositionWeights`.

    Returns:
        Means over the pairs under the names of training (:mod:`tdpo.train.metrics`), the number of ``pairs``, and
        the binomial standard errors of the accuracies.

    Raises:
        UserError: without pairs, or if the vocabularies differ.
    """
    if not pairs:
        raise UserError("there are no pairs to evaluate")
    models = [policy] if reference is None else [policy, reference]
    if reference is not None:
        check_comparable(policy, reference)
    ordered = sorted(pairs, key=lambda p: len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)), reverse=True)
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    pack = weighted(packer(layout, models), token_weights)
    device = next(policy.parameters()).device
    sums = Sums()
    shown = bar(Console(stderr=True, quiet=not progress), transient=True)
    with evaluating(*models), torch.no_grad(), shown:
        task = shown.add_task("evaluating", total=len(batches), figures="")
        for batch in batches:
            packed = pack(batch).to(device)
            scores = score_batch(policy, reference, packed, objective, backend, logits_budget)
            sums.add(pair_columns(scores, objective))
            so_far = pair_means(sums.state()) if shown.console.is_terminal else {}
            shown.update(task, advance=1, figures=figures(so_far))
    metrics = pair_means(sums.state())
    for name in ("rewards", "implicit_rewards"):
        if f"{name}/accuracies" not in metrics:
            continue
        p = metrics[f"{name}/accuracies"]
        metrics[f"{name}/accuracies_stderr"] = math.sqrt(p * (1 - p) / len(pairs))
    return {**metrics, "pairs": float(len(pairs))}
