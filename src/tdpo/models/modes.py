"""Compares training mode with evaluation mode on the loaded model.

A policy trains in training mode and its reference runs in evaluation mode. Where a model computes something else in
training (dropout, noise on a router's inputs, layers with another arithmetic), policy and reference differ before the
first step. Which models do is measured with a few small forward passes in both modes.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.errors import UserError
from tdpo.models.policy import body_states, causal_lm, disable_dropout, position_limit
from tdpo.models.probe import (
    MODEL_ERRORS,
    evaluating,
    measured,
    probe_ids,
    probing,
    relative_difference,
    tolerance,
)

logger = logging.getLogger("tdpo")
PROBED_TOKENS = 61
"""A prime number, since some models take only multiples of a chunk in training mode (Reformer)."""
MANY_ROWS = 16
"""Sequences run where random numbers are drawn without an effect on one, as for experts that are nearly equal."""


@dataclass(frozen=True)
class ModeGap:
    """Differences of a model's final hidden states, relative to the largest entry of each position.

    Attributes:
        noise: Between two passes in training mode; 0 where training mode draws no random numbers.
        arithmetic: Between training mode and evaluation mode, both without gradients.
        gradient: Between training mode with gradients and without.
    """

    noise: float
    arithmetic: float
    gradient: float

    @property
    def steady(self) -> bool:
        """Returns whether training mode is another arithmetic without being random."""
        return self.arithmetic > 0 and not self.noise


_kept_in_evaluation: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Policies that are trained in evaluation mode."""
_followers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""References that run in the policy's mode at this moment."""


def prepare_training_mode(policy: nn.Module, disable: bool) -> ModeGap:
    """Switches off dropout and other noise of training mode, and measures what differs from evaluation mode then.

    Args:
        policy: The policy in its adapter, before any wrapper.
        disable: Whether noise is to be switched off; otherwise it is only reported.

    Raises:
        UserError: for 4-bit weights that were repacked for inference, which no gradient flows through.
    """
    if any(
        getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False) for weight in policy.parameters()
    ):
        raise UserError(
            "bitsandbytes has repacked the policy's 4-bit weights for inference, in a pass in evaluation mode on the "
            "CPU, and no gradient flows through them now: load the model again and train it before any such pass"
        )
    if disable:
        disable_dropout(policy)
    gap = mode_gap(policy, again=True)
    if disable and gap.noise:
        changed = _switch_off(causal_lm(policy))
        gap = mode_gap(policy, again=True)
        if changed:
            logger.info("--disable_dropout: set to 0 in the loaded model: %s", ", ".join(changed))
    if gap.noise and not disable:
        logger.info(
            "--disable_dropout false: the policy's hidden states differ by %.1e between two passes in training mode",
            gap.noise,
        )
    return gap


def prepare_reference_mode(policy: nn.Module, reference: Sequence[nn.Module], cached: bool, disable: bool) -> None:
    """Makes policy and reference compute the same in training as long as their weights are equal.

    Where training mode still differs from evaluation mode after :func:`prepare_training_mode`, the reference runs in
    training mode with the policy. If that mode is random although noise is to be switched off, or differs from
    a cached reference by more than rounding, the policy stays in evaluation mode, where gradients are computed as well.

    Args:
        policy: The policy in its adapter, before any wrapper.
        reference: The models that run for the reference.
        cached: Whether the reference's states are read from a cache.
        disable: Whether the policy is to train without noise.
    """
    lm, gap = causal_lm(policy), prepare_training_mode(policy, disable)
    name, limit = type(lm).__name__, tolerance(next(lm.parameters()).dtype)
    _kept_in_evaluation.discard(lm)
    if (gap.noise and disable) or (cached and not gap.noise and gap.arithmetic > limit):
        _kept_in_evaluation.add(lm)
        logger.warning(
            "%s computes something else in training mode (its hidden states differ by %.1e), and no setting switches "
            "that off: the policy is trained in evaluation mode, so that it starts equal to its reference. Gradient "
            "checkpointing has no effect in that mode",
            name,
            max(gap.noise, gap.arithmetic),
        )
    elif not gap.noise and gap.gradient > limit:
        logger.warning(
            "%s computes something else where gradients are recorded (its hidden states differ by %.1e); the "
            "reference runs without, so the KL does not start at 0",
            name,
            gap.gradient,
        )
    if gap.steady and lm not in _kept_in_evaluation:
        for model in reference:
            disable_dropout(model)  # a copy from before the policy's was switched off may run in training mode now
            mode_gap(model, again=model is not policy)


@measured
def mode_gap(lm: Any) -> ModeGap:
    """Runs a short sequence in evaluation mode and in training mode and compares the hidden states."""
    cuda = lm.get_input_embeddings().weight.device.type == "cuda"
    random_state = torch.cuda.get_rng_state if cuda else torch.get_rng_state
    with probing(lm):
        quiet = [_states(lm), _states(lm)]
        _set_mode(lm, True)
        loud, drawn = [_states(lm), _states(lm)], random_state()
        recorded = _states(lm, gradients=True)
        noise, arithmetic = relative_difference(*loud), relative_difference(loud[0], quiet[0])
        if not noise and not torch.equal(drawn, random_state()):  # they may matter to few tokens only
            noise = relative_difference(_states(lm, MANY_ROWS), _states(lm, MANY_ROWS))
    unsteady = 10 * relative_difference(*quiet)  # kernels may add up in any order
    return ModeGap(
        noise if noise > unsteady else 0.0,
        arithmetic if arithmetic > unsteady else 0.0,
        relative_difference(recorded, loud[0]),
    )


def _states(lm: Any, rows: int = 1, gradients: bool = False) -> Tensor:
    """Returns the hidden states ``[R * T, D]`` of short sequences, in the mode the model is in."""
    ids = probe_ids(lm, rows, min(PROBED_TOKENS, position_limit(lm) or PROBED_TOKENS))
    with torch.set_grad_enabled(gradients):
        return body_states(lm, input_ids=ids).detach().flatten(0, 1)


def _set_mode(model: nn.Module, training: bool) -> None:
    """Sets the mode of all modules but the embedding, whose noise in training is added on purpose (NEFTune)."""
    model.train(training)
    causal_lm(model).get_input_embeddings().eval()


@contextmanager
def policy_mode(model: nn.Module) -> Iterator[None]:
    """Leaves the policy in its mode, or in evaluation mode where :func:`prepare_reference_mode` decided so."""
    lm = causal_lm(model)
    if lm not in _kept_in_evaluation:
        yield
        return
    embedding, training = lm.get_input_embeddings(), lm.training
    with evaluating(model):
        embedding.train(training)
        yield


def reference_mode(model: nn.Module) -> Any:
    """Returns a context of evaluation mode; a reference that :func:`same_mode` put in the policy's mode stays in it."""
    return nullcontext() if model in _followers else evaluating(model)


@contextmanager
def same_mode(policy: nn.Module, reference: Any) -> Iterator[None]:
    """Puts a reference's models in training mode with the policy where that mode differs without being random."""
    differs = policy.training and causal_lm(policy) not in _kept_in_evaluation and mode_gap(policy, latest=True).steady
    followers = [model for model in reference.models() if mode_gap(model, latest=True).steady] if differs else []
    with evaluating(*followers):
        for model in followers:
            _set_mode(model, True)
        _followers.update(followers)
        try:
            yield
        finally:
            _followers.difference_update(followers)


def _switch_off(lm: Any) -> list[str]:
    """Sets dropout in the configs, which some models read at every call, and jitter in the modules to 0.

    Numbers that evaluation mode depends on stay as they were.

    Returns:
        The names that were set.
    """
    configs = [lm.config]
    for config in configs:  # grows by the configs within it
        configs += [value for value in vars(config).values() if hasattr(value, "to_dict")]
    found: dict[str, list[tuple[Any, str, float]]] = {}
    searched = [(config, "drop", "config.") for config in configs]
    for owner, word, prefix in [*searched, *((module, "jitter", "") for module in lm.modules())]:
        for name, value in vars(owner).items():
            if word in name and type(value) in (int, float) and value > 0:
                found.setdefault(prefix + name, []).append((owner, name, value))
    unused = []
    with evaluating(lm):
        before = _states(lm)
        for name, values in found.items():
            for owner, attribute, _ in values:  # torch checks a probability's range in any mode
                setattr(owner, attribute, 0.9 if "drop" in attribute else math.nan)
            try:
                used = not torch.equal(_states(lm), before)
            except MODEL_ERRORS:
                used = True
            for owner, attribute, value in values:
                setattr(owner, attribute, value if used else type(value)(0))
            if not used:
                unused.append(name)
    return unused
