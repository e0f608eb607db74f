"""Tools of the probes that measure a loaded model: quiet passes, tokens, differences, and a memory of the results."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from tdpo.errors import UserError, first_line

HALF = (torch.float16, torch.bfloat16)
ABSENT = torch.finfo(torch.float16).min
"""Logits at or below this value are vocabulary entries that the model leaves out."""
MODEL_ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError,
                ValueError)  # fmt: skip
"""Errors that a model's code may raise for inputs it does not support."""
Result = TypeVar("Result")


def unwrapped(model: Any) -> Any:
    """Returns the model that ``torch.compile(model)`` wraps, or the model itself."""
    return getattr(model, "_orig_mod", model)


def causal_lm(model: Any) -> Any:
    """Returns the causal language model inside the wrappers of peft and ``torch.compile``, or the model itself."""
    model = unwrapped(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = unwrapped(model.get_base_model())
    return model


def measured(measure: Callable[[Any], Result]) -> Callable[..., Result]:
    """Decorates a measurement of a causal language model: its result is kept for each model and attention.

    It runs again where the dtype, the head, or numbers or layer types of the config changed, and with ``again=True``.
    With ``latest=True`` the result stays whatever changed: within a forward, wrappers may have put weights of fewer
    bits in place.
    """
    results: weakref.WeakKeyDictionary[nn.Module, dict[Any, tuple[Any, Result]]] = weakref.WeakKeyDictionary()

    @functools.wraps(measure)
    def _remembered(model: nn.Module, again: bool = False, latest: bool = False) -> Result:
        lm = causal_lm(model)
        config, head = getattr(lm, "config", None), getattr(lm, "get_output_embeddings", None)
        known, attention = results.setdefault(lm, {}), getattr(config, "_attn_implementation", None)
        if latest and attention in known:
            return known[attention][1]
        text = {} if config is None else vars(config.get_text_config())
        numbers = {k: v for k, v in text.items() if type(v) in (int, float) and not k.endswith("_id")}
        state = next(lm.parameters()).dtype, id(head and head()), numbers, str(text.get("layer_types"))
        if again or attention not in known or known[attention][0] != state:
            known[attention] = state, measure(lm)
        return known[attention][1]

    return _remembered


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Puts models in evaluation mode (no dropout) and restores the mode of every module afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def probing(lm: nn.Module, gradients: bool = False) -> Iterator[None]:
    """Runs a probe in evaluation mode and without autocast, and restores modes and random states afterwards.

    Raises:
        UserError: for anything the model raises, naming the model, with the first line of the error.
    """
    device = next(lm.parameters()).device
    # A trainer may have wrapped autocast around the forward; probes compare in the dtype of the weights.
    precision = torch.autocast(device.type, enabled=False)
    devices = [device] if device.type == "cuda" else []
    try:
        with evaluating(lm), torch.set_grad_enabled(gradients), precision, torch.random.fork_rng(devices):
            yield
    except UserError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{type(lm).__name__} fails on a short probe: {reason}") from error


def probe_ids(lm: Any, rows: int, tokens: int) -> Tensor:
    """Returns token ids ``[R, T]`` within the model's vocabulary, on the device of its embedding."""
    embedding = lm.get_input_embeddings().weight
    return (torch.arange(rows * tokens, device=embedding.device).view(rows, -1) + 3) % embedding.shape[0]


def tolerance(dtype: torch.dtype) -> float:
    """Returns the relative difference that rounding in a dtype explains."""
    return 5e-2 if dtype in HALF else 1e-3


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
    """Computes the largest difference within a row over the row's largest entry; entries absent in both agree."""
    absent = (ours <= ABSENT) & (theirs <= ABSENT)
    ours, theirs = (logits.to(torch.float32).masked_fill(absent, 0.0) for logits in (ours, theirs))
    error = ((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1).clamp(min=1e-6)).max().item()
    return error if error == error else float("inf")
