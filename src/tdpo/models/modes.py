"""Keeps policy and reference comparable if a model computes different results in training and evaluation mode.

By default a policy trains in training mode and its reference runs in evaluation mode. If the modes differ (dropout,
noise on a router's inputs, layers that use another algorithm), policy and reference differ before the first step. The
difference is measured by running the model on a short input in both modes.
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
"""Tokens of the short input. A prime: models that need a multiple of some chunk length in training mode (Reformer)
raise an error for it, and are refused."""
MANY_ROWS = 16
"""Sequences of a second measurement, made if random numbers were drawn but did not affect the first sequence."""


@dataclass(frozen=True)
class ModeGap:
    """Differences between a model's final hidden states, relative to the largest absolute value at their position.

    Attributes:
        noise: Between two passes in training mode; 0 if two passes in evaluation mode differ about as much.
        arithmetic: Between training mode and evaluation mode, both without gradients; includes the noise.
        gradient: Between training mode with and without gradients; includes the noise.
    """

    noise: float
    arithmetic: float
    gradient: float

    @property
    def deterministic(self) -> bool:
        """True if training mode differs from evaluation mode, and is not random."""
        return self.arithmetic > 0 and not self.noise


_kept_in_evaluation: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Policies that are trained in evaluation mode."""
_in_policy_mode: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models of references that :func:`same_mode` currently runs in the policy's mode."""


def prepare_training_mode(policy: nn.Module, disable: bool) -> ModeGap:
    """Switches off dropout and other noise of training mode if ``disable`` is set, and measures what still differs.

    Args:
        policy: The policy, with its adapter if it has one, not yet wrapped by DDP or FSDP.
        disable: Whether to switch noise off; otherwise it is only logged.

    Returns:
        The remaining differences between training mode and evaluation mode.

    Raises:
        UserError: for 4-bit weights that were repacked for inference, through which no gradient flows.
    """
    if any(
        getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False) for weight in policy.parameters()
    ):
        raise UserError(
            "bitsandbytes has repacked the policy's 4-bit weights for inference, during a pass in evaluation mode on "
            "the CPU, and no gradient flows through them now: load the model again and train it before any such pass"
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

    The policy is trained in evaluation mode in two cases: noise remains that should be off; or training mode differs by
    more than rounding and the reference is read from a cache, which was computed in evaluation mode. Gradients are
    computed as usual. Otherwise, if training mode differs without being random, the reference runs in training mode
    together with the policy (:func:`same_mode`).

    Args:
        policy: The policy, with its adapter if it has one, not yet wrapped by DDP or FSDP.
        reference: The models that run for the reference.
        cached: Whether the reference's states are read from a cache.
        disable: Whether the policy should train without noise.
    """
    lm, gap = causal_lm(policy), prepare_training_mode(policy, disable)
    name, limit = type(lm).__name__, tolerance(next(lm.parameters()).dtype)
    _kept_in_evaluation.discard(lm)
    if (gap.noise and disable) or (cached and not gap.noise and gap.arithmetic > limit):
        _kept_in_evaluation.add(lm)
        why = "which no setting switches off" if gap.noise else "and the cached reference ran in evaluation mode"
        logger.warning(
            "%s computes other hidden states in training mode (they differ by %.1e), %s: the policy is trained in "
            "evaluation mode, so that it starts equal to its reference. Gradient checkpointing then has no effect",
            name, max(gap.noise, gap.arithmetic), why,
        )  # fmt: skip
    elif not gap.noise and gap.gradient > limit:
        logger.warning(
            "%s computes other hidden states when gradients are on (they differ by %.1e); the reference runs without "
            "gradients, so the KL does not start at 0",
            name, gap.gradient,
        )  # fmt: skip
    if gap.deterministic and lm not in _kept_in_evaluation:
        for model in reference:
            disable_dropout(model)  # a separate reference may run in training mode from now on
            mode_gap(model, again=model is not policy)


@measured
def mode_gap(lm: Any) -> ModeGap:
    """Compares a model's hidden states in evaluation mode and in training mode, in a few short passes.

    The decorator stores the result for each model: ``again=True`` measures again, ``latest=True`` returns the
    stored result in any case.
    """
    cuda = lm.get_input_embeddings().weight.device.type == "cuda"
    random_state = torch.cuda.get_rng_state if cuda else torch.get_rng_state
    with probing(lm):
        evaluation = [_states(lm), _states(lm)]
        _set_mode(lm, True)
        training, drawn = [_states(lm), _states(lm)], random_state()
        with torch.enable_grad():
            with_gradients = _states(lm)
        noise, arithmetic = relative_difference(*training), relative_difference(training[0], evaluation[0])
        if not noise and not torch.equal(drawn, random_state()):  # no effect on one sequence: try more
            noise = relative_difference(_states(lm, MANY_ROWS), _states(lm, MANY_ROWS))
    nondeterminism = 10 * relative_difference(*evaluation)  # GPU kernels may sum in any order
    noise, arithmetic = (gap if gap > nondeterminism else 0.0 for gap in (noise, arithmetic))
    return ModeGap(noise, arithmetic, relative_difference(with_gradients, training[0]))


def _states(lm: Any, rows: int = 1) -> Tensor:
    """Returns the hidden states ``[rows * tokens, D]`` of short sequences, in the model's current mode."""
    ids = probe_ids(lm, rows, min(PROBED_TOKENS, position_limit(lm) or PROBED_TOKENS))
    return body_states(lm, input_ids=ids).detach().flatten(0, 1)


def _set_mode(model: nn.Module, training: bool) -> None:
    """Sets the mode of all modules except the input embedding, in which NEFTune adds noise on purpose."""
    model.train(training)
    causal_lm(model).get_input_embeddings().eval()


@contextmanager
def policy_mode(model: nn.Module) -> Iterator[None]:
    """Runs the policy in its current mode, or in evaluation mode if :func:`prepare_reference_mode` chose that."""
    lm = causal_lm(model)
    if lm not in _kept_in_evaluation:
        yield
        return
    embedding, training = lm.get_input_embeddings(), lm.training
    with evaluating(model):
        embedding.train(training)  # NEFTune stays on
        yield


def reference_mode(model: nn.Module) -> Any:
    """Returns the context to run a reference in: evaluation mode, or unchanged inside :func:`same_mode`."""
    return nullcontext() if model in _in_policy_mode else evaluating(model)


@contextmanager
def same_mode(policy: nn.Module, reference: Any) -> Iterator[None]:
    """Runs a reference's models in training mode if the policy is and both differ in it without being random."""
    trains = policy.training and causal_lm(policy) not in _kept_in_evaluation
    differs = trains and mode_gap(policy, latest=True).deterministic
    models = [model for model in reference.models() if mode_gap(model, latest=True).deterministic] if differs else []
    with evaluating(*models):
        for model in models:
            _set_mode(model, True)
        _in_policy_mode.update(models)
        try:
            yield
        finally:
            _in_policy_mode.difference_update(models)


def _switch_off(lm: Any) -> list[str]:
    """Sets numbers named "drop" in the config and "jitter" in modules to 0 if evaluation mode does not use them.

    Some models read dropout from the config at every call. A number is unused if the hidden states of evaluation mode
    stay bit-equal when it changes.

    Returns:
        The names that were set to 0.
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
            for owner, attribute, value in values:  # a probability must stay in range: torch checks that in any mode
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
