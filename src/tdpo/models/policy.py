"""From a causal language model to the final hidden states of response tokens, and the head that goes with them.

The model's body runs; its head is only described (:class:`~tdpo.types.Head`). Nothing here knows an architecture by
name: the conventions transformers models share are used, and :func:`prove_head` checks them on the loaded model.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.errors import UserError
from tdpo.ops.numerics import finish_logits, head_logits
from tdpo.types import Head

PROBE_SIZES = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""Sizes of the logits a probe's positions get: a soft cap shows in the large ones, an added constant in the small."""

# What configs call a factor or a bound of the logits. A name alone decides nothing: logits_scaling divides in one model
# and multiplies in another, and logit_scale may be there unused. `prove_head` finds out which reading is the model's.
DIVISORS = ("logits_scaling",)
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
ABSENT = torch.finfo(torch.float16).min
"""Logits down here are vocabulary entries the model leaves out."""

_proven: weakref.WeakKeyDictionary[nn.Module, tuple[float, float | None]] = weakref.WeakKeyDictionary()


def causal_lm(model: Any) -> Any:
    """The causal language model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def head_of(model: nn.Module) -> Head:
    """Describes the model's head: weight, bias, and the scale and soft-cap :func:`prove_head` found.

    Raises:
        UserError: as :func:`prove_head`, which it calls for a model that has not been through it.
    """
    lm = causal_lm(model)
    prove_head(lm)
    return _plain_head(lm, *_proven[lm])


def _plain_head(lm: Any, scale: float = 1.0, soft_cap: float | None = None) -> Head:
    output = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if output is None or getattr(output, "weight", None) is None:
        raise UserError(f"{type(lm).__name__} has no language-model head; tdpo needs a causal language model")
    if getattr(output, "base_layer", None) is not None:
        raise UserError(
            f"{type(lm).__name__} has an adapter on its language-model head; tdpo reads the head's weight alone, so "
            "the adapter would never be trained. Leave the head out of target_modules, or name it in modules_to_save"
        )
    return Head(output.weight, getattr(output, "bias", None), scale, soft_cap)


def body_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Hidden states after the final norm, ``[R, T, D]``: the model without its head."""
    lm = causal_lm(model)
    body: Any = lm.base_model
    if body is lm:  # some multimodal models hold a complete causal language model
        inner = lm.get_decoder()
        body = inner.base_model if inner.base_model is not inner else getattr(inner, "model", None)
    if body is None or body is lm:
        raise UserError(f"{type(lm).__name__} does not keep its body apart from its head; tdpo cannot run it")
    return body(use_cache=False, **inputs).last_hidden_state


def prove_head(model: nn.Module) -> None:
    """Finds out, once per model, how its logits follow from its body and head, and that tdpo can do the same.

    One forward pass compares the head's output with hidden states times weight, then hands the rest of the model
    made-up outputs of many sizes and compares what becomes of them with every scale and soft-cap the config may mean.

    Raises:
        UserError: if no reading fits, which would make every statistic wrong without a sign, or the model is no causal
            language model.
    """
    lm = causal_lm(model)
    if lm in _proven:
        return
    if getattr(lm.config, "is_encoder_decoder", False):
        raise UserError(f"{type(lm).__name__} is an encoder-decoder; tdpo needs a causal language model")
    head = _plain_head(lm)
    ids = (torch.arange(len(PROBE_SIZES), device=head.weight.device) + 3)[None] % head.vocab_size
    outputs: list[Tensor] = []
    probe = torch.tensor(PROBE_SIZES)[:, None] * torch.cos(2.4 * torch.arange(head.vocab_size))

    def swap(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        outputs.append(output[0])
        return probe.to(output, copy=True)[None]  # some models write into their logits

    # Past whatever an earlier trainer wrapped around the forward (autocast, say), body and head are held together.
    with evaluating(lm), torch.no_grad(), torch.autocast(head.weight.device.type, enabled=False):
        handle = lm.get_output_embeddings().register_forward_hook(swap)
        try:
            logits = type(lm).forward(lm, input_ids=ids, use_cache=False).logits[0]
        except ValueError as missing:  # an encoder's or an image's input
            raise UserError(f"{type(lm).__name__} does not run on text alone: {missing}") from missing
        finally:
            handle.remove()
        states = body_states(lm, input_ids=ids)[0]
        ours = head_logits(states, head)
        changed = ids.clone()
        changed[0, -1] = (ids[0, -1] + 1) % head.vocab_size
        future = _difference(body_states(lm, input_ids=changed)[0, :-1], states[:-1])
    if not logits.isfinite().any() or not states.isfinite().all():
        raise UserError(f"{type(lm).__name__}: its weights give hidden states or logits that are not finite")
    # A model that never calls its head's layer makes its logits some other way; then only those can be compared.
    error = _difference(ours, outputs[0]) if outputs else 0.0
    finish = probe.to(outputs[0]).to(ours.dtype) if outputs else ours
    readings = {reading: _difference(finish_logits(finish, *reading), logits) for reading in _readings(lm.config)}
    half = {head.weight.dtype, logits.dtype} & {torch.float16, torch.bfloat16}  # the logits' own under autocast
    tolerance = 5e-2 if half else 1e-3
    if future > tolerance:
        raise UserError(f"{type(lm).__name__} lets a token see those after it; tdpo needs a causal language model")
    fitting = [reading for reading, misfit in readings.items() if misfit < tolerance]
    if not (error < tolerance and fitting):
        raise UserError(
            f"{type(lm).__name__}: hidden states times head differ from the model's own logits by "
            f"{max(error, min(readings.values())):.1e} (relative); it does something to its logits that tdpo does not "
            "know, so its statistics would be wrong"
        )
    _proven[lm] = fitting[0]


def _readings(config: Any) -> list[tuple[float, float | None]]:
    """Every (scale, soft-cap) of the logits that the config may mean, the likeliest first."""
    text = config.get_text_config()

    def numbers(names: tuple[str, ...]) -> list[float]:
        values = (getattr(text, name, None) for name in names)
        return [float(value) for value in values if isinstance(value, (int, float)) and value > 0]

    scales = [*(1 / value for value in numbers(DIVISORS)), *numbers(FACTORS), 1.0]
    return list(itertools.product(scales, [*numbers(CAPS), None]))


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference within a row over the row's largest entry; entries absent on both sides agree."""
    absent = (ours <= ABSENT) & (theirs <= ABSENT)
    ours, theirs = (logits.to(torch.float32).masked_fill(absent, 0.0) for logits in (ours, theirs))
    error = ((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1).clamp(min=1e-6)).max().item()
    return error if error == error else float("inf")


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode (no dropout) inside; afterwards every module gets back the mode it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: the log-ratio compares two models, not two dropout masks."""
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        # Many models keep the probability as a number (dropout, hidden_dropout, attn_pdrop) for functional dropout.
        for name, value in list(vars(module).items()):
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def position_limit(*models: nn.Module) -> int | None:
    """How many positions all of the models have, None where no config says."""
    configs = [causal_lm(model).config.get_text_config() for model in models]
    limits = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min((limit for limit in limits if isinstance(limit, int) and limit > 0), default=None)
