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
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.errors import UserError
from tdpo.models.policy import (
    HALF,
    body_states,
    causal_lm,
    disable_dropout,
    evaluating,
    position_limit,
    probing,
    relative_difference,
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


_gaps: weakref.WeakKeyDictionary[nn.Module, tuple[torch.dtype, ModeGap]] = weakref.WeakKeyDictionary()
_kept_in_evaluation: weakref.WeakSet[nn.Module] = weakref.WeakSet()


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
    gap = known_gap(policy, again=True)
    if disable and gap.noise:
        changed = _switch_off(causal_lm(policy))
        gap = known_gap(policy, again=True)
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
    training mode with the policy. If that mode is random, or the reference is read from a cache, the policy stays in
    evaluation mode instead, where gradients are computed as well.

    Args:
        policy: The policy in its adapter, before any wrapper.
        reference: The models that run for the reference.
        cached: Whether the reference's states are read from a cache.
        disable: Whether the policy is to train without noise.
    """
    lm, gap = causal_lm(policy), prepare_training_mode(policy, disable)
    name, tolerance = type(lm).__name__, 5e-2 if _dtype(lm) in HALF else 1e-3
    _kept_in_evaluation.discard(lm)
    if (gap.noise and disable) or (cached and not gap.noise and gap.arithmetic > tolerance):
        _kept_in_evaluation.add(lm)
        logger.warning(
            "%s computes something else in training mode (its hidden states differ by %.1e), and no setting switches "
            "that off: the policy is trained in evaluation mode, so that it starts equal to its reference. Gradient "
            "checkpointing has no effect in that mode",
            name,
            max(gap.noise, gap.arithmetic),
        )
    elif not gap.noise and gap.gradient > tolerance:
        logger.warning(
            "%s computes something else where gradients are recorded (its hidden states differ by %.1e); the "
            "reference runs without, so the KL does not start at 0",
            name,
            gap.gradient,
        )
    if differs_by_mode(policy):
        for model in reference:
            disable_dropout(model)  # a copy from before the policy's was switched off may run in training mode now
            known_gap(model, again=model is not policy)


def known_gap(model: nn.Module, again: bool = False) -> ModeGap:
    """Returns :func:`measure_modes` of a model, measured once for each dtype unless ``again``."""
    lm = causal_lm(model)
    known = _gaps.get(lm)
    if again or known is None or known[0] != _dtype(lm):
        known = _gaps[lm] = _dtype(lm), measure_modes(lm)
    return known[1]


def differs_by_mode(model: nn.Module) -> bool:
    """Returns whether training mode was measured to differ from evaluation mode without being random."""
    _, gap = _gaps.get(causal_lm(model)) or (None, None)
    return gap is not None and gap.arithmetic > 0 and not gap.noise


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


@contextmanager
def reference_mode(model: nn.Module) -> Iterator[None]:
    """Runs a reference in evaluation mode; one that :func:`same_mode` put in the policy's mode stays in it."""
    if _follows_policy(model):
        yield
        return
    with evaluating(model):
        yield


@contextmanager
def same_mode(policy: nn.Module, reference: Any) -> Iterator[None]:
    """Puts a reference's models in the policy's mode where training mode differs without being random."""
    training = policy.training  # before it is switched off, since the policy may be its own reference
    followers = [model for model in reference.models() if _follows_policy(model)] if _follows_policy(policy) else []
    with evaluating(*followers):
        for model in followers:
            _set_mode(model, training)
        yield


def _set_mode(model: nn.Module, training: bool) -> None:
    """Sets the mode of all modules but the embedding, whose noise in training is added on purpose (NEFTune)."""
    model.train(training)
    causal_lm(model).get_input_embeddings().eval()


def _follows_policy(model: nn.Module) -> bool:
    return differs_by_mode(model) and causal_lm(model) not in _kept_in_evaluation


def measure_modes(model: nn.Module) -> ModeGap:
    """Runs a short sequence in evaluation mode and in training mode and compares the hidden states.

    Random number generators and the modes of all modules are restored.
    """
    lm = causal_lm(model)
    device = lm.get_input_embeddings().weight.device
    with probing(lm), torch.random.fork_rng([device] if device.type == "cuda" else []), evaluating(lm):
        quiet = [_states(lm), _states(lm)]
        _set_mode(lm, True)
        loud, drawn = [_states(lm), _states(lm)], _random_state(device)
        recorded = _states(lm, gradients=True)
        noise, arithmetic = relative_difference(*loud), relative_difference(loud[0], quiet[0])
        if not noise and not torch.equal(drawn, _random_state(device)):  # they may matter to few tokens only
            noise = relative_difference(_states(lm, MANY_ROWS), _states(lm, MANY_ROWS))
    unsteady = relative_difference(*quiet)  # kernels may add up in any order
    return ModeGap(
        noise if noise > 10 * unsteady else 0.0,
        arithmetic if arithmetic > 10 * unsteady else 0.0,
        relative_difference(recorded, loud[0]),
    )


def _switch_off(lm: Any) -> list[str]:
    """Sets dropout in the configs, which some models read at every call, and jitter in the modules to 0.

    Numbers that evaluation mode depends on stay as they were.

    Returns:
        The names that were set.
    """
    owners: dict[str, list[tuple[Any, float]]] = {}
    searched = [(config, "drop", "config.") for config in _configs(lm.config)]
    for owner, word, prefix in [*searched, *((module, "jitter", "") for module in lm.modules())]:
        for name, value in vars(owner).items():
            if word in name and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0:
                owners.setdefault(prefix + name, []).append((owner, value))
    unused = [name for name, values in owners.items() if not _evaluation_uses(lm, name, values)]
    for name in unused:
        _set(name, [(owner, type(value)(0)) for owner, value in owners[name]])
    return unused


def _configs(config: Any) -> list[Any]:
    """Returns a config and the configs within it."""
    return [
        config,
        *(inner for value in vars(config).values() if hasattr(value, "to_dict") for inner in _configs(value)),
    ]


def _set(name: str, values: list[tuple[Any, Any]]) -> None:
    for owner, value in values:
        setattr(owner, name.removeprefix("config."), value)


def _evaluation_uses(lm: Any, name: str, values: list[tuple[Any, float]]) -> bool:
    """Returns whether the states of evaluation mode change when a number is replaced, by NaN where that is allowed."""
    other = 0.9 if "drop" in name else math.nan  # torch checks the range of a probability in any mode
    with evaluating(lm):
        before = _states(lm)
        _set(name, [(owner, other) for owner, _ in values])
        try:
            return not torch.equal(_states(lm), before)
        except (ArithmeticError, RuntimeError, TypeError, ValueError):
            return True
        finally:
            _set(name, values)


def _states(lm: Any, rows: int = 1, gradients: bool = False) -> Tensor:
    """Returns the hidden states ``[R * T, D]`` of short sequences, in the mode the model is in."""
    embedding = lm.get_input_embeddings().weight
    count = min(PROBED_TOKENS, position_limit(lm) or PROBED_TOKENS)
    ids = (torch.arange(rows * count, device=embedding.device).view(rows, -1) * 7919 + 3) % embedding.shape[0]
    with torch.set_grad_enabled(gradients), torch.autocast(embedding.device.type, enabled=False):
        return body_states(lm, input_ids=ids).detach().flatten(0, 1)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _dtype(lm: Any) -> torch.dtype:
    return next(lm.parameters()).dtype
