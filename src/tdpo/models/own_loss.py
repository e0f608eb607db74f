"""Terms of a model's own loss beyond the cross-entropy of its logits: the router loss, and a probe for all others.

A mixture-of-experts model adds ``coefficient * aux_loss`` to its loss, so that its routers use all experts (Fedus et
al. 2021, arXiv 2101.03961, eq. 4). The term comes from the model's own code; only its coefficient is chosen here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdpo.errors import UserError
from tdpo.models.policy import body_of, causal_lm, head_of
from tdpo.models.probe import HALF, probe_ids, probing
from tdpo.models.redirect import redirect_forward
from tdpo.types import PackedBatch

logger = logging.getLogger("tdpo")
BALANCING = "load_balancing_loss_func"
"""What transformers calls the function in the module of every such model."""
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What configs call the coefficient."""
PROBED_TOKENS = 8
Balance = Callable[[tuple[Tensor, ...], PackedBatch], Tensor]


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a model's routers.

    Attributes:
        coefficient: Its factor in the loss.
        of_batch: Computes the unweighted loss, a scalar, from the router logits of all layers and the batch that ran;
            every position but padding counts once.
    """

    coefficient: float
    of_batch: Balance


@contextmanager
def collect_router_logits(model: nn.Module) -> Iterator[list[tuple[Tensor, ...]]]:
    """Collects the router logits of every pass through the model's body, the latest last."""
    head_of(model)  # proves a model that is new, whose probes would be collected too
    body, collected = body_of(model), list[Any]()
    forward = body.forward

    def _collect(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **{**kwargs, "output_router_logits": True})
        collected.append(getattr(output, "router_logits", None))
        return output

    with redirect_forward(body, _collect):
        yield collected


def find_router_loss(model: nn.Module, coefficient: float | None = None) -> RouterLoss | None:
    """Finds the model's router loss and proves on a small input that it is the one of the model's own forward.

    Args:
        model: A causal language model.
        coefficient: The factor; 0 leaves the loss out, None takes the config's where its ``output_router_logits`` is
            set, which is when the model's own loss has the term.

    Returns:
        None for a model without the term.

    Raises:
        UserError: for a coefficient the model has no use for, or a term that is computed in an unknown way.
    """
    lm = causal_lm(model)
    text = lm.config.get_text_config()
    asked = getattr(text, "output_router_logits", None)
    if coefficient == 0 or (coefficient is None and asked is None):
        return None
    own = _own_coefficient(text)
    if coefficient is None and not (own and asked):
        # Some configs have a coefficient that no forward uses (Llama 4).
        with suppress(UserError):
            if own and not asked and _prove_balance(lm):
                logger.warning(
                    "%s: the load-balancing loss of its routers is left out, since output_router_logits is off in its "
                    "config; --router_aux_loss_coef %g adds it with the config's coefficient, as TRL does, and 0 "
                    "leaves it out without this warning",
                    type(lm).__name__, own,
                )  # fmt: skip
        return None
    balance = None if asked is None else _prove_balance(lm)
    if balance is None and coefficient is not None:
        raise UserError(
            f"--router_aux_loss_coef {coefficient:g}: {type(lm).__name__} is not a mixture-of-experts model with "
            "a load-balancing loss of its routers; leave the option out"
        )
    return None if balance is None else RouterLoss(own if coefficient is None else coefficient, balance)


def _own_coefficient(*owners: Any) -> float:
    values = (getattr(owner, name, None) for owner in owners for name in COEFFICIENTS)
    return next((float(value) for value in values if isinstance(value, int | float)), 0.0)


def _prove_balance(lm: Any) -> Balance | None:
    """Returns the model's own function with the sizes its forward passes, checked against the forward's result.

    None where the forward has no such result.
    """
    unknown = UserError(
        f"{type(lm).__name__} computes the load-balancing loss of its routers in a way that is not known; "
        "--router_aux_loss_coef 0 trains without it"
    )
    ids = probe_ids(lm, 1, PROBED_TOKENS)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, "output_router_logits": True, "use_cache": False}
    modules = [sys.modules[cls.__module__] for cls in type(lm).__mro__]
    module: Any = next((module for module in modules if hasattr(module, BALANCING)), SimpleNamespace())
    function: Any = getattr(module, BALANCING, None)
    calls: list[tuple[Any, ...]] = []

    def _record(*args: Any) -> Any:
        calls.append(args)
        return function(*args)

    try:
        with probing(lm), collect_router_logits(lm) as collected:
            setattr(module, BALANCING, _record)
            theirs = getattr(type(lm).forward(lm, **inputs), "aux_loss", None)
    except UserError as error:  # the model cannot compute one from these inputs
        raise unknown from error
    finally:
        setattr(module, BALANCING, function)
    if theirs is None:
        return None
    if len(calls) == 1 and isinstance(theirs, Tensor) and collected and isinstance(collected[-1], tuple):
        _, *sizes, _ = calls[0]
        if torch.allclose(function(collected[-1], *sizes, mask), theirs, rtol=1e-3):
            return lambda router_logits, batch: function(router_logits, *sizes, (batch.tree_ids >= 0).long())
    raise unknown


def warn_of_other_terms(model: nn.Module) -> None:
    """Warns where the model's own loss on a small input differs from the cross-entropy of its logits.

    The router loss is known and does not count. Training mode decides, since some terms exist in it alone; a model that
    cannot compute a loss of its own is passed over.
    """
    lm = causal_lm(model)
    ids = probe_ids(lm, 1, PROBED_TOKENS)
    try:
        with probing(lm):
            lm.train()
            output = type(lm).forward(lm, input_ids=ids, labels=ids, use_cache=False)
    except UserError as error:
        logger.debug("no loss of the model's own to compare with: %s", error)
        return
    if not isinstance(output.loss, Tensor) or output.logits.shape[:2] != ids.shape:
        return
    entropy = F.cross_entropy(output.logits[0, :-1].float(), ids[0, 1:])
    aux = getattr(output, "aux_loss", None)
    known = _own_coefficient(lm, lm.config.get_text_config()) * aux if isinstance(aux, Tensor) else 0.0
    other = float(output.loss - entropy - known)
    limit = 2e-2 if output.logits.dtype in HALF else 1e-4
    if abs(other) > limit * max(1.0, float(entropy)):
        logger.warning(
            "%s: its own loss has a term beyond the cross-entropy of its logits (%.3g on a probe), which this training "
            "leaves out",
            type(lm).__name__, other,
        )  # fmt: skip
