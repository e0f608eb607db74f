"""Keeps policy and reference comparable where training mode computes something else than evaluation mode.

By default a policy trains in training mode and its reference runs in evaluation mode. Where a model computes something
else in training (dropout, noise on a router's inputs, layers that use another algorithm), the two differ before the
first step. Which models do is measured by running the model on a short input in both modes.
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
"""Prime, so no multiple of the chunk length that some models need in training mode (Reformer), which are refused."""
MANY_ROWS = 16
"""Sequences of a second measurement, where random numbers were drawn without an effect on the first sequence."""


@dataclass(frozen=True)
class ModeGap:
    """Differences of a model's final hidden states, each divided by the largest absolute value at its position.

    Attributes:
        noise: Between two passes in training mode; 0 where it is no more than evaluation mode shows too.
        arithmetic: Between training mode and evaluation mode, both without gradients; it contains the noise.
        gradient: Between training mode with gradients and without; it contains the noise.
    """

    noise: float
    arithmetic: float
    gradient: float

    @property
    def steady(self) -> bool:
        """True where training mode computes something else without being random."""
        return self.arithmetic > 0 and not self.noise


_kept_in_evaluation: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Policies that are trained in evaluation mode."""
_followers: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""References that run in the policy's mode at this moment."""


def prepare_training_mode(policy: nn.Module, disable: bool) -> ModeGap:
    """Switches off dropout and other noise of training mode if asked to, and measures what still differs.

    Args:
        policy: The policy, with its adapter if it has one, not yet wrapped by DDP or FSDP.
        disable: Whether noise is to be switched off; otherwise it is only reported.

    Returns:
        The differences between training mode and evaluation mode that are left.

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
    """Calls :func:`prepare_training_mode` and decides the modes in which policy and reference run.

    The policy is trained in evaluation mode if noise remains that should be off, or if the reference is cached, which
    ran in evaluation mode, and training mode differs by more than rounding; gradients are the usual ones in that mode.
    Elsewhere a reference runs in training mode with the policy where that differs without being random.

    Args:
        policy: The policy, with its adapter if it has one, not yet wrapped by DDP or FSDP.
        reference: The models that run for the reference.
        cached: Whether the reference's states are read from a cache.
        disable: Whether the policy is to train without noise.
    """
    lm, gap = causal_lm(policy), prepare_training_mode(policy, disable)
    name, limit = type(lm).__name__, tolerance(next(lm.parameters()).dtype)
    _kept_in_evaluation.discard(lm)
    if (gap.noise and disable) or (cached and not gap.noise and gap.arithmetic > limit):
        _kept_in_evaluation.add(lm)
        why = "which no setting switches off" if gap.noise else "and the cached reference ran in evaluation mode"
        logger.warning(
            "%s computes something else in training mode (its hidden states differ by %.1e), %s: the policy is trained "
            "in evaluation mode, so that it starts equal to its reference. Gradient checkpointing has no effect then",
            name, max(gap.noise, gap.arithmetic), why,
        )  # fmt: skip
    elif not gap.noise and gap.gradient > limit:
        logger.warning(
            "%s computes other hidden states when gradients are on (they differ by %.1e); the reference runs without "
            "gradients, so the KL does not start at 0",
            name, gap.gradient,
        )  # fmt: skip
    if gap.steady and lm not in _kept_in_evaluation:
        for model in reference:
            disable_dropout(model)  # a separate reference may run in training mode from now on
            mode_gap(model, again=model is not policy)


@measured
def mode_gap(lm: Any) -> ModeGap:
    """Compares a model's hidden states in evaluation mode and in training mode, in a few short passes."""
    cuda = lm.get_input_embeddings().weight.device.type == "cuda"
    random_state = torch.cuda.get_rng_state if cuda else torch.get_rng_state
    with probing(lm):
        evaluation = [_states(lm), _states(lm)]
        _set_mode(lm, True)
        training, drawn = [_states(lm), _states(lm)], random_state()
        with torch.enable_grad():
            with_gradients = _states(lm)
        noise, arithmetic = relative_difference(*training), relative_difference(training[0], evaluation[0])
        if not noise and not torch.equal(drawn, random_state()):  # drawn, but one sequence shows no effect: try more
            noise = relative_difference(_states(lm, MANY_ROWS), _states(lm, MANY_ROWS))
    nondeterminism = 10 * relative_difference(*evaluation)  # GPU kernels add in varying order
    noise, arithmetic = (gap if gap > nondeterminism else 0.0 for gap in (noise, arithmetic))
    return ModeGap(noise, arithmetic, relative_difference(with_gradients, training[0]))


def _states(lm: Any, rows: int = 1) -> Tensor:
    """Returns the hidden states ``[rows * tokens, D]`` of short sequences, in the mode the model is in."""
    ids = probe_ids(lm, rows, min(PROBED_TOKENS, position_limit(lm) or PROBED_TOKENS))
    return body_states(lm, input_ids=ids).detach().flatten(0, 1)


def _set_mode(model: nn.Module, training: bool) -> None:
    """Sets the mode of all modules but the input embedding, where NEFTune adds noise on purpose."""
    model.train(training)
    causal_lm(model).get_input_embeddings().eval()


@contextmanager
def policy_mode(model: nn.Module) -> Iterator[None]:
    """Leaves the policy in its mode, or in evaluation mode if :func:`prepare_reference_mode` chose that."""
    lm = causal_lm(model)
    if lm not in _kept_in_evaluation:
        yield
        return
    embedding, training = lm.get_input_embeddings(), lm.training
    with evaluating(model):
        embedding.train(training)  # NEFTune stays on
        yield


def reference_mode(model: nn.Module) -> Any:
    """Returns the context of a reference: evaluation mode, or unchanged where :func:`same_mode` set its mode."""
    return nullcontext() if model in _followers else evaluating(model)


@contextmanager
def same_mode(policy: nn.Module, reference: Any) -> Iterator[None]:
    """Puts a reference's models in training mode with the policy where both differ in it without being random."""
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
    """Sets config numbers named "drop" and module numbers named "jitter" to 0, unless evaluation mode depends on them.

    Some models read dropout from the config at every call.

    Returns:
        The names that were set.
    """
    configs, nested = [], [lm.config]
    while nested:
        configs.append(nested.pop(0))
        nested += [value for value in vars(configs[-1]).values() if hasattr(value, "to_dict")]
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
            for owner, attribute, value in values:  # torch checks a probability's range in any mode
                setattr(owner, attribute, (1 + value) / 2 if "drop" in attribute else math.nan)
            try:
                used = not torch.equal(_states(lm), before)
            except MODEL_ERRORS:
                used = True
            for owner, attribute, value in values:
                setattr(owner, attribute, value if used else type(value)(0))
            if not used:
                unused.append(name)
    return unused
