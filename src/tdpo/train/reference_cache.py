"""Fills a cache with the hidden states of a reference, for the trainer and for ``tdpo cache-reference``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from rich.console import Console

from tdpo.data.pack import pack_padded
from tdpo.errors import UserError
from tdpo.models.fingerprint import config_hash, weights_hash
from tdpo.models.neighbours import neighbour_plan
from tdpo.models.policy import causal_lm
from tdpo.models.probe import evaluating
from tdpo.models.reference import AdapterOff, Reference
from tdpo.models.store import CachedHidden, CacheKey, HiddenStore, pairs_hash
from tdpo.train.progress import bar
from tdpo.types import PackedBatch, TokenisedPair

SHARD_BYTES = 128 << 20
"""States are written to disk in pieces of about this size; an interruption loses at most one in each process."""


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


def cached_reference(
    reference: Reference,
    folder: Path,
    pairs: Sequence[TokenisedPair],
    pack: Callable[[Sequence[TokenisedPair]], PackedBatch],
    run: FillOptions,
) -> CachedHidden:
    """Fills the cache of a reference, or completes it, verifies it and returns the reference that reads from it.

    Raises:
        UserError: if the folder was filled for another reference, dtype or layout, or for other pairs.
    """
    store = HiddenStore(folder, cache_key(reference, pack, run))
    missing = store.missing(pairs)
    if missing and store.filled_for not in ("", pairs_hash(pair.key for pair in pairs)):
        raise UserError(store.lacks([pair.row for pair in missing], len(pairs)))
    fill(store, reference, pairs, pack, run)
    with torch.no_grad():
        return CachedHidden(store, reference.head())


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
        weights=weights_hash(model, with_adapter=not without_adapter),
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
