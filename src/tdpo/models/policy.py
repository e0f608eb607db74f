"""From a causal language model to the final hidden states of response tokens, and the head that goes with them.

The model's body runs; its head is only described (:class:`~tdpo.types.Head`). Nothing here knows an architecture by
name: the conventions transformers models share are used, and :func:`prove_head` checks them on the loaded model.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
HALF = (torch.float16, torch.bfloat16)
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
ABSENT = torch.finfo(torch.float16).min
"""Logits down here are vocabulary entries the model leaves out."""


@dataclass(frozen=True)
class _Proof:
    """How a model's logits follow from its body's states, as :func:`prove_head` measured it.

    Attributes:
        state: What the measurement depends on; see :func:`_state_of`.
        factor: Constant that the model multiplies its states by between body and head.
        scale: Constant factor on the logits.
        soft_cap: Bound of the logits, or None.
    """

    state: tuple[Any, ...]
    factor: float
    scale: float
    soft_cap: float | None


_proven: weakref.WeakKeyDictionary[nn.Module, _Proof] = weakref.WeakKeyDictionary()


def unwrapped(model: Any) -> Any:
    """Returns the model that ``torch.compile(model)`` wraps, or the model itself."""
    return getattr(model, "_orig_mod", model)


def causal_lm(model: Any) -> Any:
    """Returns the causal language model inside the wrappers of peft and ``torch.compile``, or the model itself."""
    model = unwrapped(model)
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        model = unwrapped(model.get_base_model())
    return model


def head_of(model: nn.Module) -> Head:
    """Describes the model's head: weight, bias, and the scale and soft-cap :func:`prove_head` found.

    Raises:
        UserError: as :func:`prove_head`, which it calls for a model that has not been through it.
    """
    lm = causal_lm(model)
    # What was proven stays: within a forward, wrappers may have put weights of fewer bits in place.
    if lm not in _proven:
        prove_head(lm)
    proof = _proven[lm]
    return _scaled_states(_plain_head(lm, proof.scale, proof.soft_cap), proof.factor)


def _scaled_states(head: Head, factor: float) -> Head:
    """Returns the head that gives for ``states`` what ``head`` gives for ``factor * states``."""
    if factor == 1.0:
        return head
    bias = None if head.bias is None else head.bias / factor
    return replace(head, bias=bias, scale=head.scale * factor)


def _plain_head(lm: Any, scale: float = 1.0, soft_cap: float | None = None) -> Head:
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
    return Head(output.weight, getattr(output, "bias", None), scale, soft_cap)


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
    """Hidden states after the final norm, ``[R, T, D]``: the model without its head."""
    return body_of(model)(use_cache=False, **inputs).last_hidden_state


@contextmanager
def probing(model: nn.Module) -> Iterator[None]:
    """Raises whatever a model raises on a probe as one message that names the model.

    Raises:
        UserError: with the first line of the error.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        name, line = type(causal_lm(model)).__name__, next(iter(str(error).splitlines()), "")
        raise UserError(f"{name} fails on a short probe: {type(error).__name__}: {line}") from error


def prove_head(model: nn.Module) -> None:
    """Measures how the model's logits follow from its body and head, and proves that tdpo computes the same.

    One forward pass compares the head's output with hidden states times weight, then hands the rest of the model
    made-up outputs of many sizes and compares what becomes of them with every scale and soft-cap the config may mean.
    A model is measured again when its dtype, its head or the numbers in its config changed.

    Raises:
        UserError: if no reading fits, which would make every statistic wrong without a sign, or the model is not a
            causal language model.
    """
    lm = causal_lm(model)
    head = _plain_head(lm)
    if head.weight.is_meta:
        raise UserError(
            f"{type(lm).__name__} is on the meta device and has no weights there: load or initialise it first, without "
            "offloading"
        )
    keep_gradients(lm)
    state = _state_of(lm)
    if lm in _proven and _proven[lm].state == state:
        return
    ids = (torch.arange(len(PROBE_SIZES), device=head.weight.device) + 3)[None] % head.vocab_size
    probe = torch.tensor(PROBE_SIZES)[:, None] * torch.cos(2.4 * torch.arange(head.vocab_size))
    # Past whatever an earlier trainer wrapped around the forward (autocast, say), body and head are compared.
    device = head.weight.device.type
    with probing(lm), evaluating(lm), torch.no_grad(), torch.autocast(device, enabled=False):
        tolerance, leak = (5e-2, 5e-2) if head.weight.dtype in HALF else (1e-3, 1e-4)
        states = _causal_states(lm, ids, head.vocab_size, leak)
        if states.shape[-1] != head.weight.shape[-1]:
            raise UserError(
                f"{type(lm).__name__}: its hidden states have {states.shape[-1]} entries, its head takes "
                f"{head.weight.shape[-1]}; it does something between body and head that tdpo does not know"
            )
        seen, logits = _observed_forward(lm, ids, probe)
        own, passed_on = seen.get("body", (states, states))
        head_input, head_output = seen.get("head", (passed_on, None))
        factor = _factor(passed_on, head_input, lm.config)
        ours = head_logits(passed_on, _scaled_states(head, factor))
    if not logits.isfinite().any():
        raise UserError(f"{type(lm).__name__}: its weights give logits that are not finite")
    error = max(relative_difference(states, own), relative_difference(factor * passed_on, head_input))
    finish = ours
    if head_output is not None:
        error = max(error, relative_difference(ours, head_output))
        finish = probe.to(head_output).to(ours.dtype)
    # A model that never calls its head's layer makes its logits some other way; then only those can be compared.
    readings = {
        reading: relative_difference(finish_logits(finish, *reading), logits) for reading in _readings(lm.config)
    }
    if logits.dtype in HALF:  # the logits' own under autocast
        tolerance = 5e-2
    fitting = [reading for reading, misfit in readings.items() if misfit < tolerance]
    if not (error < tolerance and fitting):
        raise UserError(
            f"{type(lm).__name__}: hidden states times head differ from the model's own logits by "
            f"{max(error, min(readings.values())):.1e} (relative); it does something to its logits that tdpo does not "
            "know, so its statistics would be wrong"
        )
    _proven[lm] = _Proof(state, factor, *fitting[0])


def keep_gradients(lm: nn.Module) -> None:
    """Keeps 4-bit weights on a CPU in the form that gradients flow through.

    bitsandbytes repacks them at their first pass in evaluation mode, for inference only, and every gradient through
    them is silently zero from then on.
    """
    for module in lm.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def _state_of(lm: Any) -> tuple[Any, ...]:
    """Returns what a proof depends on: dtype and identity of the head, and the numbers of the config."""
    output, text = lm.get_output_embeddings(), lm.config.get_text_config()
    numbers = tuple((name, value) for name, value in sorted(vars(text).items()) if isinstance(value, float))
    return output.weight.dtype, id(output), tuple(_readings(lm.config)), numbers


def _causal_states(lm: Any, ids: Tensor, vocab_size: int, tolerance: float) -> Tensor:
    """Returns the hidden states ``[T, D]`` of one sequence.

    Raises:
        UserError: if its last token changes the states before it, or the body does not run like that of a decoder.
    """
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % vocab_size
    try:
        states, others = (body_states(lm, input_ids=sequence)[0] for sequence in (ids, changed))
    except ValueError as missing:  # an encoder's or an image's input
        raise UserError(f"{type(lm).__name__} does not run on text alone: {missing}") from missing
    except TypeError as error:
        raise UserError(f"{type(lm).__name__} is not a causal language model: {str(error).splitlines()[0]}") from error
    if not states.isfinite().all():
        raise UserError(f"{type(lm).__name__}: its weights give hidden states that are not finite")
    if relative_difference(others[:-1], states[:-1]) > tolerance:
        if relative_difference(body_states(lm, input_ids=ids)[0], states) > tolerance:
            raise UserError(
                f"{type(lm).__name__}: two passes over the same tokens in evaluation mode give different states; "
                "remove what adds noise in evaluation mode (a hook, a layer that ignores eval())"
            )
        raise UserError(f"{type(lm).__name__} is not a causal language model: it lets a token see those after it")
    return states


def _factor(states: Tensor, head_input: Tensor, config: Any) -> float:
    """Returns the constant that turns the body's states into what the head receives, 1 where there is none.

    Measured by least squares; a number of the config that is equal up to rounding is used instead.
    """
    if states.shape != head_input.shape:
        return 1.0
    ours, theirs = states.double(), head_input.double()
    measured = ((ours * theirs).sum() / (ours * ours).sum()).item()
    text = config.get_text_config()
    named = (getattr(text, name, None) for name in (*DIVISORS, *FACTORS))  # properties among them
    numbers = _positive([*vars(text).values(), *named])
    rounding = 1e-2 if head_input.dtype in HALF else 1e-4
    known = [1.0, *numbers, *(1 / number for number in numbers)]
    nearest = min(known, key=lambda number: abs(number - measured) if math.isfinite(measured) else abs(number - 1))
    close = not measured > 0 or abs(nearest - measured) < rounding * abs(measured)
    return float(nearest) if close else measured


def _observed_forward(lm: Any, ids: Tensor, probe: Tensor) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Runs the model's own forward with made-up values behind its body and behind its head.

    The body's states get other sizes, because a normalisation is a constant factor for states that are normalised
    already; the head's output becomes ``probe``.

    Returns:
        What the body gave and what was passed on, what the head received and gave, each where the forward called it;
        and the logits.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    sizes = 2.0 ** torch.arange(-2, ids.shape[1] - 2, device=ids.device)[:, None]

    def resize(body: nn.Module, inputs: Any, output: Any) -> Any:
        seen["body"] = output[0][0], output[0][0] * sizes.to(output[0].dtype)
        resized = seen["body"][1][None]
        if isinstance(output, tuple):
            return resized, *output[1:]
        output["last_hidden_state"] = resized
        return output

    def receive(layer: nn.Module, inputs: Any) -> None:
        received.append(inputs[0][0])  # before hooks of the head change it, which run in a forward of their own too

    def swap(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen.setdefault("head", (received[0], output[0]))
        return probe.to(output, copy=True)[None]  # some models write into their logits

    received: list[Tensor] = []
    handles = [
        body_of(lm).register_forward_hook(resize),
        lm.get_output_embeddings().register_forward_pre_hook(receive, prepend=True),
        lm.get_output_embeddings().register_forward_hook(swap),
    ]
    try:
        return seen, type(lm).forward(lm, input_ids=ids, use_cache=False).logits[0]
    except ValueError as missing:  # an encoder's or an image's input
        raise UserError(f"{type(lm).__name__} does not run on text alone: {missing}") from missing
    finally:
        for handle in handles:
            handle.remove()


def _positive(values: Iterable[Any]) -> list[float]:
    """Returns those entries of a config that are positive numbers."""
    return [float(value) for value in values if type(value) in (int, float) and value > 0]


def _readings(config: Any) -> list[tuple[float, float | None]]:
    """Every (scale, soft-cap) of the logits that the config may mean, the likeliest first."""
    text = config.get_text_config()

    def numbers(names: tuple[str, ...]) -> list[float]:
        return _positive(getattr(text, name, None) for name in names)

    scales = [*(1 / value for value in numbers(DIVISORS)), *numbers(FACTORS), 1.0]
    return list(itertools.product(scales, [*numbers(CAPS), None]))


def relative_difference(ours: Tensor, theirs: Tensor) -> float:
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
    limits = [_positions(causal_lm(model).config.get_text_config()) for model in models]
    return min((limit for limit in limits if limit is not None), default=None)


def _positions(config: Any) -> int | None:
    limit, rope = getattr(config, "max_position_embeddings", None), getattr(config, "rope_parameters", None)
    if not isinstance(limit, int) or limit <= 0:
        return None
    if isinstance(rope, dict) and rope.get("rope_type") == "dynamic":  # the length it was trained for, to be stretched
        return int(limit * max(rope.get("factor") or 1.0, 1.0))
    return limit
