"""Chooses the reference of a run, keeps it in sync with the policy where asked to, and fills a cache of it.

``auto`` chooses the cheapest form of the reference: the adapter switched off where the policy's start is its base, a
frozen copy elsewhere, and a cache where a folder for one is named.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback
from typing_extensions import override

from tdpo.config import TDPOConfig
from tdpo.data.pack import pack_padded
from tdpo.distributed.sharding import count_weights
from tdpo.errors import UserError
from tdpo.models.adapters import KEEPING_INITS, check_tunes_weights, equals_base, has_adapter, with_adapter
from tdpo.models.fingerprint import base_weights_hash, config_hash, weights_hash
from tdpo.models.neighbours import neighbour_plan
from tdpo.models.policy import causal_lm, prove_head
from tdpo.models.probe import evaluating
from tdpo.models.reference import AdapterOff, CachedHidden, FrozenCopy, LiveReference, Reference, check_comparable
from tdpo.models.store import CacheKey, HiddenStore, pairs_hash
from tdpo.train.progress import bar
from tdpo.types import PackedBatch, TokenisedPair

logger = logging.getLogger("tdpo")
SHARD_BYTES = 128 << 20
"""States are written to disk in pieces of about this size; an interruption loses at most one in each process."""
DEFAULT_CACHE = "reference-cache"


@dataclass(frozen=True)
class Models:
    """The models that a trainer starts from.

    Attributes:
        policy: The policy, in its adapter.
        reference: Computes the reference's hidden states.
        line: The strategy and its reason, for the log.
        cache: The folder of the cache that is to replace the reference, or None.
    """

    policy: Any
    reference: Reference
    line: str
    cache: Path | None


def prepare_models(policy: Any, ref_model: nn.Module | None, peft_config: Any, args: TDPOConfig) -> Models:
    """Adds the adapter to the policy and chooses the reference.

    Raises:
        UserError: for options and models that contradict each other, naming both.
    """
    if peft_config is not None and has_adapter(policy):  # with_adapter checks it too, after a copy is made
        raise UserError("model has an adapter already; leave peft_config (--use_peft) out to continue training it")
    check_tunes_weights(policy)
    prove_head(policy)
    if ref_model is not None:
        prove_head(ref_model)
        check_comparable(policy, ref_model)
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
    return Models(policy, reference, f"reference: {strategy} ({why})", cache)


def describe_copy(reference: Reference) -> str:
    """Describes how much of a copy is shared with the policy, to be added to the log line; empty if nothing is."""
    if not isinstance(reference, FrozenCopy) or not reference.shared:
        return ""
    copied, shared = (sum(weight.numel() for weight in part) for part in (reference.copied, reference.shared))
    return f"; {copied:,} weights are copied, {shared:,} are shared with the policy"


def warn_of_second_model(reference: Reference, policy: Any, args: TDPOConfig) -> None:
    """Warns where ``auto`` made a second model for a policy with an adapter, which is to save that memory."""
    if args.reference == "auto" and isinstance(reference, FrozenCopy) and has_adapter(policy) and not reference.shared:
        _, count = count_weights(reference.model)
        logger.warning("the reference is a second model of %s weights beside the policy with its adapter", f"{count:,}")


class ReferenceSyncCallback(TrainerCallback):
    """Moves a frozen reference toward the policy every N steps, and keeps it in checkpoints.

    Args:
        reference: The reference.
        policy: The policy, without any wrapper.
        args: ``ref_model_mixup_alpha`` sets how far, ``ref_model_sync_steps`` how often.

    Raises:
        UserError: for a reference and a policy that do not have the same parameters.
    """

    FILE = "reference.safetensors"

    def __init__(self, reference: Reference, policy: nn.Module, args: TDPOConfig) -> None:
        if isinstance(reference, FrozenCopy) and reference.sharded:
            raise UserError("--sync_ref_model needs whole weights in every process: --accelerate_config ddp or zero2")
        if not isinstance(reference, FrozenCopy) or has_adapter(policy) or _shapes(policy) != _shapes(reference.model):
            raise UserError(
                "--sync_ref_model: the reference can only follow a policy that is a whole model of the same shape, "
                "without an adapter"
            )
        self.reference, self.policy = reference, policy
        self.share, self.every = args.ref_model_mixup_alpha, args.ref_model_sync_steps

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.reference.follow(self.policy, self.share)

    def save(self, folder: Path) -> None:
        """Writes the weights of the reference."""
        weights = {name: parameter.contiguous() for name, parameter in self.reference.model.named_parameters()}
        save_file(weights, folder / self.FILE)

    def load(self, folder: Path) -> None:
        """Restores what :meth:`save` wrote.

        Raises:
            UserError: if the checkpoint has no reference.
        """
        if not (folder / self.FILE).is_file():
            raise UserError(f"{folder} has no {self.FILE}: it was written without --sync_ref_model")
        weights = load_file(folder / self.FILE)
        with torch.no_grad():
            for name, parameter in self.reference.model.named_parameters():
                parameter.copy_(weights[name])


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


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


@dataclass(frozen=True)
class FillOptions:
    """Options of filling a cache.

    Attributes:
        device: The device that the reference runs on.
        batch_size: Pairs in a batch.
        dtype: Dtype of the cache, or ``auto`` for that of the reference's states.
        precision: ``no``, ``bf16`` or ``fp16``: the mixed precision of ``autocast``.
        autocast: Returns the context that the reference runs in.
    """

    device: torch.device
    batch_size: int
    dtype: str
    precision: str
    autocast: Callable[[], AbstractContextManager[Any]]


def cached(
    models: Models,
    folder: Path,
    pairs: Sequence[TokenisedPair],
    pack: Callable[[Sequence[TokenisedPair]], PackedBatch],
    run: FillOptions,
) -> CachedHidden:
    """Fills the cache of a reference, or completes it, verifies it and returns the reference that reads from it.

    Raises:
        UserError: if the folder was filled for another reference, dtype or layout, or for other pairs.
    """
    store = HiddenStore(folder, cache_key(models.reference, pack, run))
    missing = store.missing(pairs)
    if missing and store.filled_for not in ("", pairs_hash(pair.key for pair in pairs)):
        raise UserError(store.lacks([pair.row for pair in missing], len(pairs)))
    fill(store, models.reference, pairs, pack, run)
    with torch.no_grad():
        return CachedHidden(store, models.reference.head())


def cache_key(reference: Reference, pack: Any, run: FillOptions) -> CacheKey:
    """Computes the key of a reference under these options."""
    (model,) = reference.models()
    without_adapter = isinstance(reference, AdapterOff)
    dtype = run.dtype
    if dtype == "auto":
        shortest = pack_padded([TokenisedPair([0], [0], [0])]).to(run.device)
        with torch.no_grad(), run.autocast():
            dtype = str(reference.states(shortest).dtype).removeprefix("torch.")
    lm = causal_lm(model)
    return CacheKey(
        weights=base_weights_hash(model) if without_adapter else weights_hash(model),
        config=config_hash(model, with_adapter=not without_adapter),
        dtype=dtype,
        precision=run.precision,
        attention=getattr(lm.config, "_attn_implementation", None) or "eager",
        layout="padded" if pack is pack_padded else "tree",
        library=f"transformers {transformers.__version__}",
    )


def fill(store: HiddenStore, reference: Reference, pairs: Sequence[TokenisedPair], pack: Any, run: FillOptions) -> int:
    """Computes the states of pairs that the store lacks, each process a part, and verifies the store.

    Returns:
        The number of pairs computed, over all processes.

    Raises:
        UserError: for a reference whose states depend on the other sequences of their batch.
    """
    state = PartialState()
    for model in reference.models():
        if reason := neighbour_plan(model).reason:
            raise UserError(
                f"--reference cached: {type(causal_lm(model)).__name__} cannot be read from a cache: {reason}, and a "
                "cache is filled in other batches than those of training. Use --reference frozen"
            )
    missing = store.missing(pairs)
    state.wait_for_everyone()  # all have counted before any of them adds
    if missing:
        if state.is_main_process:
            store.claim(pairs)
        state.wait_for_everyone()
        # Long pairs first, alike in length: little padding, and a batch too large for the memory fails at once.
        ordered = sorted(missing, key=lambda pair: -len(pair.prompt_ids) - len(pair.chosen_ids + pair.rejected_ids))
        batches = [ordered[start : start + run.batch_size] for start in range(0, len(ordered), run.batch_size)]
        _run(store, reference, batches[state.process_index :: state.num_processes], pack, run)
        state.wait_for_everyone()
        store.refresh()
    store.verify(state.process_index, state.num_processes)
    state.wait_for_everyone()
    return len(missing)


def _run(
    store: HiddenStore, reference: Reference, batches: Sequence[Sequence[TokenisedPair]], pack: Any, run: FillOptions
) -> None:
    """Runs batches through the reference and writes their states in shards of :data:`SHARD_BYTES`."""
    pending: list[tuple[Sequence[TokenisedPair], torch.Tensor]] = []
    console = Console(stderr=True, quiet=not PartialState().is_main_process)

    with bar(console, transient=True) as shown, torch.no_grad(), evaluating(*reference.models()):
        task = shown.add_task("caching the reference", total=len(batches), figures="")
        for number, batch in enumerate(batches, 1):
            with run.autocast():
                states = reference.states(pack(batch).to(run.device))
            pending.append((batch, states.to(store.key.torch_dtype).cpu()))
            if sum(part.nbytes for _, part in pending) >= SHARD_BYTES or number == len(batches):
                store.add([pair for done, _ in pending for pair in done], torch.cat([part for _, part in pending]))
                pending.clear()
            shown.update(task, advance=1)
