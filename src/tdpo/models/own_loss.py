"""Terms of a model's own loss beyond the cross-entropy of its logits: the router loss, and a probe for all others.

A mixture-of-experts model adds ``coefficient * aux_loss`` to its loss, so that its routers use all experts (Fedus et
al. 2021, arXiv 2101.03961, eq. 4). The term comes from the model's own code; only its coefficient is chosen here.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tdpo.errors import UserError
from tdpo.models.policy import body_of, causal_lm, head_of
from tdpo.models.probe import HALF, probe_ids, probing
from tdpo.types import PackedBatch

logger = logging.getLogger("tdpo")
BALANCING = "load_balancing_loss_func"
"""What transformers calls the function in the module of every such model."""
COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""What configs call the coefficient."""
PROBED_TOKENS = 8


@dataclass(frozen=True)
class RouterLoss:
    """The load-balancing loss of a model's routers.

    Attributes:
        coefficient: Its factor in the loss.
        balance: Computes it from the router logits of all layers and a mask ``[R, T]`` of the positions that count.
    """

    coefficient: float
    balance: Callable[[tuple[Tensor, ...], Tensor], Tensor]

    def of_batch(self, router_logits: tuple[Tensor, ...], batch: PackedBatch) -> Tensor:
        """Computes the unweighted loss of a batch, a scalar; every position but padding counts once."""
        return self.balance(router_logits, (batch.tree_ids >= 0).long())


@contextmanager
def collect_router_logits(model: nn.Module) -> Iterator[list[tuple[Tensor, ...]]]:
    """Collects the router logits of every pass through the model's body, the latest last."""
    head_of(model)  # proves a model that is new, whose probes would be collected too
    body, collected = body_of(model), list[Any]()
    handles = [
        body.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "output_router_logits": True}), with_kwargs=True
        ),
        body.register_forward_hook(
            lambda module, args, output: collected.append(getattr(output, "router_logits", None))
        ),
    ]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


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
    own, asked = _own_coefficient(text), getattr(text, "output_router_logits", None)
    if coefficient == 0:
        return None
    if coefficient is None and not (own and asked):
        if own and asked is False and _adds_balance(lm):
            logger.warning(
                "%s: the load-balancing loss of its routers is left out, since output_router_logits is off in its "
                "config; --router_aux_loss_coef %g adds it with the config's coefficient, as TRL does, and 0 leaves it "
                "out without this warning",
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


def _adds_balance(lm: Any) -> bool:
    """Returns whether the option could add the term; some configs have a coefficient that no forward uses (Llama 4)."""
    try:
        return _prove_balance(lm) is not None
    except UserError:
        return False


def _prove_balance(lm: Any) -> Callable[[tuple[Tensor, ...], Tensor], Tensor] | None:
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
    try:
        with probing(lm), collect_router_logits(lm) as collected, _recorded_balancing(lm) as calls:
            theirs = getattr(type(lm).forward(lm, **inputs), "aux_loss", None)
    except UserError as error:  # the model cannot compute one from these inputs
        raise unknown from error
    if theirs is None:
        return None
    if len(calls) != 1 or not (isinstance(theirs, Tensor) and collected and isinstance(collected[-1], tuple)):
        raise unknown
    function, (_, *sizes, _) = calls[0]

    def balance(router_logits: tuple[Tensor, ...], mask_RT: Tensor) -> Tensor:
        return function(router_logits, *sizes, mask_RT)

    if not torch.allclose(balance(collected[-1], mask), theirs, rtol=1e-3):
        raise unknown
    return balance


@contextmanager
def _recorded_balancing(lm: Any) -> Iterator[list[tuple[Callable[..., Tensor], tuple[Any, ...]]]]:
    """Records the calls of the balancing function in the module that defines the model: function and arguments."""
    calls: list[tuple[Callable[..., Tensor], tuple[Any, ...]]] = []
    modules = [sys.modules[cls.__module__] for cls in type(lm).__mro__]
    module: Any = next((module for module in modules if hasattr(module, BALANCING)), None)
    if module is None:
        yield calls
        return
    function = getattr(module, BALANCING)

    def record(*args: Any, **kwargs: Any) -> Tensor:
        calls.append((function, inspect.signature(function).bind(*args, **kwargs).args))
        return function(*args, **kwargs)

    setattr(module, BALANCING, record)
    try:
        yield calls
    finally:
        setattr(module, BALANCING, function)


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
