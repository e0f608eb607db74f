"""From a causal language model to the final hidden states of response tokens, and the head that goes with them.

The model's body runs; its head is only described (:class:`~tdpo.types.Head`). Nothing here knows an architecture by
name: the conventions transformers models share are used, and :func:`prove_head` checks them on the loaded model.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from tdpo.errors import UserError
from tdpo.ops.numerics import head_logits
from tdpo.types import Head, Hidden, PackedBatch

PROBE_LENGTH = 6

_proven: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def causal_lm(model: Any) -> Any:
    """The causal language model inside a peft wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def head_of(model: nn.Module) -> Head:
    """Describes the model's head: weight, bias, and what its config says is done to the logits.

    Raises:
        UserError: if the model has no output embeddings, so is no causal language model.
    """
    lm = causal_lm(model)
    output = lm.get_output_embeddings() if hasattr(lm, "get_output_embeddings") else None
    if output is None or getattr(output, "weight", None) is None:
        raise UserError(f"{type(lm).__name__} has no language-model head; tdpo needs a causal language model")
    config = lm.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    cap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)  # Gemma
    return Head(output.weight, getattr(output, "bias", None), scale, cap)


def body_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Hidden states after the final norm, ``[R, T, D]``: the model without its head."""
    lm = causal_lm(model)
    body: Any = lm.base_model
    if body is lm:
        raise UserError(f"{type(lm).__name__} does not keep its body apart from its head; tdpo cannot run it")
    return body(use_cache=False, **inputs).last_hidden_state


def response_hidden(model: nn.Module, batch: PackedBatch) -> Hidden:
    """The hidden states ``[N, D]`` that predict the response tokens of a batch, and the model's head.

    Differentiable in the model's parameters when gradients are on.
    """
    if batch.layout != "padded":
        raise ValueError(f"layout {batch.layout!r} cannot be run by this version")
    # Rows are padded at the end and attention is causal: no mask is needed, which keeps the fastest attention path.
    states = body_states(model, input_ids=batch.input_ids)
    return Hidden(states.flatten(0, 1)[batch.source_index], head_of(model))


def prove_head(model: nn.Module) -> None:
    """Checks once per model that body and described head give the model's own logits.

    Raises:
        UserError: if they do not, which would make every statistic wrong without a sign.
    """
    lm = causal_lm(model)
    if lm in _proven:
        return
    head = head_of(model)
    ids = (torch.arange(PROBE_LENGTH, device=head.weight.device) + 3)[None] % head.vocab_size
    was_training = lm.training
    lm.eval()
    with torch.no_grad():
        expected = lm(input_ids=ids, use_cache=False).logits[0].to(torch.float32)
        ours = head_logits(body_states(model, input_ids=ids)[0], head).to(torch.float32)
    lm.train(was_training)
    finite = expected > torch.finfo(torch.float16).min  # some models push padded entries to a large negative number
    tolerance = 5e-2 if head.weight.dtype in (torch.float16, torch.bfloat16) else 1e-3
    error = ((ours - expected)[finite].abs().max() / expected[finite].abs().max().clamp(min=1e-6)).item()
    if not error < tolerance:
        raise UserError(
            f"{type(lm).__name__}: hidden states times head differ from the model's own logits by {error:.1e} "
            "(relative); it does something to its logits that tdpo does not know, so its statistics would be wrong"
        )
    _proven.add(lm)


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout probability to 0: the log-ratio compares two models, not two dropout masks."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"):
        for module in model.modules():
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
