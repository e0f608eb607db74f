"""From a causal language model to the final hidden states of response tokens, and the head that goes with them.

The model's body runs; its head is only described (:class:`~tdpo.types.Head`). Nothing here knows an architecture by
name: the conventions transformers models share are used, and :func:`prove_head` checks them on the loaded model.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.errors import UserError, first_line
from tdpo.models.probe import HALF, causal_lm, measured, probe_ids, probing, relative_difference, tolerance
from tdpo.ops.numerics import finish_logits, head_logits
from tdpo.types import Head

PROBE_SIZES = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
"""Sizes of the logits a probe's positions get: a soft cap shows in the large ones, an added constant in the small."""

# What configs call a factor or a bound of the logits. A name alone decides nothing: logits_scaling divides in one model
# and multiplies in another, and logit_scale may be there unused. `prove_head` finds out which reading is the model's.
DIVISORS = ("logits_scaling",)
FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier", "logits_scaling")
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


def head_of(model: nn.Module) -> Head:
    """Describes the model's head: weight, bias, and the scale and soft-cap :func:`prove_head` found.

    Raises:
        UserError: as :func:`prove_head`, which it calls for a model that has not been through it.
    """
    lm = causal_lm(model)
    return _described_head(lm, *prove_head(lm, latest=True))


def _described_head(lm: Any, factor: float = 1.0, scale: float = 1.0, soft_cap: float | None = None) -> Head:
    """Describes a head whose input is ``factor`` times the body's states, as a head of the states themselves."""
    config = getattr(lm, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{type(lm).__name__} is not a causal language model: it is an encoder-decoder. tdpo trains "
            "decoders alone, models that transformers' AutoModelForCausalLM loads"
        )
    inner = getattr(lm, "module", None)
    if config is None and isinstance(inner, nn.Module):
        raise UserError(
            f"the model is wrapped in {type(lm).__name__}; pass the {type(inner).__name__} inside it (model.module). "
            "The trainer distributes it itself"
        )
    output = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if output is None or getattr(output, "weight", None) is None:
        raise UserError(
            f"{type(lm).__name__} is not a causal language model: it has no language-model head. Load the checkpoint "
            "with transformers' AutoModelForCausalLM"
        )
    if getattr(output, "base_layer", None) is not None:
        raise UserError(
            f"{type(lm).__name__} has an adapter on its language-model head; tdpo reads the head's weight alone, so "
            "the adapter would never be trained. Leave the head out of target_modules, or name it in modules_to_save"
        )
    bias = getattr(output, "bias", None)
    if bias is not None and factor != 1.0:
        bias = bias / factor
    return Head(output.weight, bias, scale * factor, soft_cap)


def body_of(model: nn.Module) -> Any:
    """Returns the module that computes the final hidden states: the model without its head.

    It is the ``base_model`` of transformers. Where the class names none, it is the part that holds the embedding but
    not the head.

    Raises:
        UserError: for a model that has no such part.
    """
    lm: Any = causal_lm(model)
    if lm.base_model is not lm:
        return lm.base_model
    body, embedding, head = lm, lm.get_input_embeddings(), lm.get_output_embeddings()
    while body is not None and head in body.modules():
        parts = (part for part in body.children() if part is not embedding and embedding in part.modules())
        body = next(parts, None)
    if body is None:
        raise UserError(f"{type(lm).__name__} does not keep its body apart from its head; tdpo cannot run it")
    return body


def body_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Computes the hidden states after the final norm, ``[R, T, D]``, by the model without its head."""
    return body_of(model)(use_cache=False, **inputs).last_hidden_state


@measured
def prove_head(lm: Any) -> tuple[float, float, float | None]:
    """Measures how a model's logits follow from its body and head, and proves that tdpo computes the same.

    One forward pass compares the head's output with hidden states times weight, then hands the rest of the model
    made-up outputs of many sizes and compares what becomes of them with every scale and soft-cap the config may mean.

    Returns:
        The factor between body and head, and the scale and the soft-cap of the logits.

    Raises:
        UserError: if no reading fits, which would make every statistic wrong without a sign, or the model is not a
            causal language model.
    """
    name, head = type(lm).__name__, _described_head(lm)
    if head.weight.is_meta:
        raise UserError(
            f"{name} is on the meta device and has no weights there: load or initialise it first, without offloading"
        )
    # bitsandbytes repacks 4-bit weights on a CPU at their first pass in evaluation mode, for inference only; every
    # gradient through them is silently zero from then on.
    for module in lm.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    probe = torch.tensor(PROBE_SIZES)[:, None] * torch.cos(2.4 * torch.arange(head.vocab_size))
    with probing(lm):
        try:
            states = _causal_states(lm, head)
            seen, logits = _observed_forward(lm, probe)
        except ValueError as missing:  # an encoder's or an image's input
            raise UserError(f"{name} does not run on text alone: {missing}") from missing
        own, passed_on = seen.get("body", (states, states))
        head_input, head_output = seen.get("head", (passed_on, None))
        factor = _factor(passed_on, head_input, lm.config)
        ours = head_logits(passed_on, _described_head(lm, factor))
    if not logits.isfinite().any():
        raise UserError(f"{name}: its weights give logits that are not finite")
    error = max(relative_difference(states, own), relative_difference(factor * passed_on, head_input))
    # A model that never calls its head's layer makes its logits some other way; then only those can be compared.
    unfinished = ours
    if head_output is not None:
        error = max(error, relative_difference(ours, head_output))
        unfinished = probe.to(head_output).to(ours.dtype)
    # Every (scale, soft-cap) of the logits that the config may mean, the likeliest first.
    text = lm.config.get_text_config()
    divisors, factors, caps = (
        _positive(getattr(text, name, None) for name in names) for names in (DIVISORS, FACTORS, CAPS)
    )
    readings = list(itertools.product([*(1 / value for value in divisors), *factors, 1.0], [*caps, None]))
    misfits = [relative_difference(finish_logits(unfinished, *reading), logits) for reading in readings]
    # Under autocast the logits may have fewer bits than the weights.
    limit = max(tolerance(head.weight.dtype), tolerance(logits.dtype))
    fitting = [reading for reading, misfit in zip(readings, misfits, strict=True) if misfit < limit]
    if not (error < limit and fitting):
        raise UserError(
            f"{name}: hidden states times head differ from the model's own logits by "
            f"{max(error, min(misfits)):.1e} (relative); it does something to its logits that tdpo does not know, so "
            "its statistics would be wrong"
        )
    return factor, *fitting[0]


def _positive(values: Iterable[Any]) -> list[float]:
    """Returns the positive numbers among some values of a config."""
    return [float(value) for value in values if type(value) in (int, float) and value > 0]


def _causal_states(lm: Any, head: Head) -> Tensor:
    """Returns the hidden states ``[T, D]`` of one sequence.

    Raises:
        UserError: if its last token changes the states before it, or the body does not run like that of a decoder.
    """
    name, ids = type(lm).__name__, probe_ids(lm, 1, len(PROBE_SIZES))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % head.vocab_size
    try:
        states, others = (body_states(lm, input_ids=sequence)[0] for sequence in (ids, changed))
    except TypeError as error:
        raise UserError(f"{name} is not a causal language model: {first_line(error)}") from error
    if not states.isfinite().all():
        raise UserError(f"{name}: its weights give hidden states that are not finite")
    leak = 5e-2 if head.weight.dtype in HALF else 1e-4
    if relative_difference(others[:-1], states[:-1]) > leak:
        if relative_difference(body_states(lm, input_ids=ids)[0], states) > leak:
            raise UserError(
                f"{name}: two passes over the same tokens in evaluation mode give different states; remove what adds "
                "noise in evaluation mode (a hook, a layer that ignores eval())"
            )
        raise UserError(f"{name} is not a causal language model: it lets a token see those after it")
    if states.shape[-1] != head.weight.shape[-1]:
        raise UserError(
            f"{name}: its hidden states have {states.shape[-1]} entries, its head takes {head.weight.shape[-1]}; it "
            "does something between body and head that tdpo does not know"
        )
    return states


def _factor(states: Tensor, head_input: Tensor, config: Any) -> float:
    """Returns the constant that turns the body's states into what the head receives, 1 where there is none.

    Measured by least squares; a number of the config that is equal up to rounding is used instead.
    """
    if states.shape != head_input.shape:
        return 1.0
    ours, theirs = states.double(), head_input.double()
    measure = ((ours * theirs).sum() / (ours * ours).sum()).item()
    if not (math.isfinite(measure) and measure > 0):
        return 1.0
    text = config.get_text_config()
    numbers = _positive([*vars(text).values(), *(getattr(text, name, None) for name in (*DIVISORS, *FACTORS))])
    nearest = min([1.0, *numbers, *(1 / value for value in numbers)], key=lambda number: abs(number - measure))
    rounding = 1e-2 if head_input.dtype in HALF else 1e-4
    return nearest if abs(nearest - measure) < rounding * measure else measure


def _observed_forward(lm: Any, probe: Tensor) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Runs the model's own forward with made-up values behind its body and behind its head.

    The body's states get other sizes, because a normalisation is a constant factor for states that are normalised
    already; the head's output becomes ``probe``.

    Returns:
        The body's output and what was passed on (``body``), the head's input and output (``head``), each where the
        forward called it; and the logits.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    received: list[Tensor] = []

    def _resize(body: nn.Module, inputs: Any, output: Any) -> Any:
        states = output[0][0]
        sizes = 2.0 ** torch.arange(-2, len(states) - 2, device=states.device)[:, None]
        seen["body"] = states, states * sizes.to(states.dtype)
        resized = seen["body"][1][None]
        if isinstance(output, tuple):
            return resized, *output[1:]
        output["last_hidden_state"] = resized
        return output

    def _replace(head: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.setdefault("head", (received[0], output[0]))
        return probe.to(output, copy=True)[None]  # some models write into their logits

    head = lm.get_output_embeddings()
    handles = [
        body_of(lm).register_forward_hook(_resize),
        # Before hooks of the head change its input, which run in a forward of their own too.
        head.register_forward_pre_hook(lambda layer, inputs: received.append(inputs[0][0]), prepend=True),
        head.register_forward_hook(_replace),
    ]
    try:
        return seen, type(lm).forward(lm, input_ids=probe_ids(lm, 1, len(probe)), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


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
    """Returns the number of positions that all of the models have, None where no config states one."""
    limits = []
    for model in models:
        config = causal_lm(model).config.get_text_config()
        limit, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
        if isinstance(limit, int) and limit > 0:
            # Dynamic rotary embeddings state the length they were trained for, which is stretched.
            if isinstance(rope, dict) and rope.get("rope_type") == "dynamic":
                limit = int(limit * max(rope.get("factor") or 1.0, 1.0))
            limits.append(limit)
    return min(limits, default=None)
