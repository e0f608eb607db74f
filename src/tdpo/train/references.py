"""Chooses the reference of a run.

``auto`` chooses the cheapest form of the reference: the adapter switched off where the policy's start is its base, a
frozen copy elsewhere, and a cache where a folder for one is named.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import nn

from tdpo.config import TDPOConfig
from tdpo.errors import UserError
from tdpo.models.adapters import KEEPING_INITS, check_tunes_weights, equals_base, has_adapter, with_adapter
from tdpo.models.neighbours import neighbour_plan
from tdpo.models.policy import causal_lm, prove_head
from tdpo.models.reference import AdapterOff, FrozenCopy, LiveReference, NoReference, Reference, check_comparable
from tdpo.objectives import Objective
from tdpo.train.base import place

logger = logging.getLogger("tdpo")
DEFAULT_CACHE = "_reference-cache"
"""Name of the cache in the output folder; transformers uploads nothing whose name begins so."""


def prepare_models(
    policy: Any, ref_model: nn.Module | None, peft_config: Any, args: TDPOConfig, objective: Objective
) -> tuple[Any, Reference, str, Path | None]:
    """Adds the adapter to the policy and chooses the reference.

    Returns:
        The policy in its adapter, the reference, a line for the log with the strategy and its reason, and the folder
        of the cache that is to replace the reference (None for no cache).

    Raises:
        UserError: for options and models that contradict each other, naming both.
    """
    if peft_config is not None and has_adapter(policy):  # with_adapter checks it too, after a copy is made
        raise UserError("model has an adapter already; leave peft_config (--use_peft) out to continue training it")
    check_tunes_weights(policy)
    for model in (policy, ref_model):
        if model is not None:
            place(model, args)
            prove_head(model)
    if ref_model is not None:
        check_comparable(policy, ref_model)
    if not objective.uses_reference:
        _check_without(objective, ref_model, args)
        if peft_config is not None:
            policy = with_adapter(policy, peft_config)
        return policy, NoReference(), f"reference: none ({objective.spelling()} compares without one)", None
    strategy, why = _choose(policy, ref_model, peft_config, args)
    reason = neighbour_plan(policy).reason
    if reason and strategy != "cached":  # fill() refuses that
        logger.warning("%s: %s; losses depend on how batches are made up", type(causal_lm(policy)).__name__, reason)
    cache = None
    if strategy == "cached":
        cache = Path(args.reference_cache or Path(str(args.output_dir)) / DEFAULT_CACHE).expanduser()
    # A copy is made before the adapter is added: some initialisations change the weights under it.
    copied = FrozenCopy(ref_model) if ref_model is not None else None
    keeps = peft_config is None or _keeps_base(peft_config)
    if copied is None and (strategy == "frozen" or (strategy == "cached" and not keeps)):
        copied = FrozenCopy.of(policy)
    if peft_config is not None:
        policy = with_adapter(policy, peft_config)
    reference: Reference
    if copied is not None:
        reference = copied
    elif strategy == "adapter_off" or peft_config is not None:
        reference = AdapterOff(policy)
    else:
        reference = LiveReference(policy)
    return policy, reference, f"reference: {strategy} ({why})", cache


def _check_without(objective: Objective, ref_model: Any, args: TDPOConfig) -> None:
    """Refuses options of a reference for an objective that has none."""
    given = {
        "a reference model (--ref_model_name_or_path, ref_model)": ref_model is not None,
        f"--reference {args.reference}": args.reference != "auto",
        "--reference_cache": args.reference_cache is not None,
        "--sync_ref_model": args.sync_ref_model,
    }
    for option in filter(given.get, given):
        raise UserError(f"{option} contradicts --objective {objective.spelling()}, which has no reference")


def _choose(policy: Any, ref_model: Any, peft_config: Any, args: TDPOConfig) -> tuple[str, str]:
    """Returns the strategy and its reason, for the log line."""
    loaded = has_adapter(policy)
    origin = "the model named as reference" if ref_model is not None else "the policy as it is before training"
    if args.reference == "adapter_off":
        if ref_model is not None:
            raise UserError(
                "--reference adapter_off is the policy without its adapter; a reference model beside it "
                "(--ref_model_name_or_path, ref_model) contradicts that"
            )
        if peft_config is None and not loaded:
            raise UserError("--reference adapter_off needs an adapter: --use_peft, or a model that has one")
        return "adapter_off", "the base of the adapter, without a second copy of it"
    if args.reference == "frozen":
        return "frozen", origin
    if args.reference == "cached" or args.reference_cache:
        asked = "asked for" if args.reference == "cached" else "--reference_cache names a folder"
        return "cached", f"{asked}; hidden states of {origin}"
    if ref_model is None and peft_config is not None:
        if _keeps_base(peft_config):
            return "adapter_off", "the adapter is new, so the policy without it is the policy as it is before training"
        return "frozen", "a copy from before the adapter, whose configuration changes or trains the base"
    if ref_model is None and loaded and equals_base(policy):
        return "adapter_off", "the adapter changes nothing yet, so the policy without it is the policy before training"
    if ref_model is None and loaded:
        return "frozen", "a copy of the policy with its adapter as loaded; --reference adapter_off takes its base"
    return "frozen", origin


def _keeps_base(peft_config: Any) -> bool:
    """Returns whether a new adapter of this configuration leaves its base unchanged."""
    return (
        getattr(peft_config, "init_lora_weights", True) in KEEPING_INITS
        and not getattr(peft_config, "layer_replication", None)
        and getattr(peft_config, "bias", "none") == "none"
    )
