"""Hashes a reference's weights and the entries of its config that hidden states depend on."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from tdpo.models.adapters import base_tensors, has_adapter
from tdpo.models.policy import causal_lm

PIECE = 16 << 20
"""Bytes hashed at a time by one thread."""
WITHOUT_EFFECT = {
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "id2label", "label2id", "pad_token_id",
    "problem_type", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip
"""Config entries that no hidden state depends on, and that saving, loading or a trainer may rewrite. So are those of
dropout: a reference has none, and a policy that reads them at every call gets them set to 0."""
ADAPTER_WITHOUT_EFFECT = {"base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"}


def weights_hash(model: Any, with_adapter: bool = True) -> str:
    """Computes :func:`tensors_hash` of a model's state, or of its base's, which is that from before the adapter."""
    state = causal_lm(model).state_dict().items()
    return tensors_hash(state if with_adapter else base_tensors(model, state))


def config_hash(model: Any, with_adapter: bool = True) -> str:
    """Computes the SHA-256 of the config's relevant entries, and of the adapter's where it belongs to the reference."""
    entries = {"model": _without(causal_lm(model).config.to_dict(), WITHOUT_EFFECT)}
    if with_adapter and has_adapter(model):
        entries["adapter"] = {
            name: _without(config.to_dict(), ADAPTER_WITHOUT_EFFECT) for name, config in model.peft_config.items()
        }
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=_plain).encode()).hexdigest()


def tensors_hash(named: Iterable[tuple[str, Any]]) -> str:
    """Computes the SHA-256 of names, dtypes, shapes and bytes of tensors, as hexadecimal digits.

    Pieces are hashed on several threads, so it runs at the speed of memory or of the cores, whichever is less.
    """
    total = hashlib.sha256()
    known: dict[tuple[Any, ...], list[str]] = {}
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for name, tensor in sorted((item for item in named if isinstance(item[1], Tensor)), key=lambda item: item[0]):
            memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
            if memory not in known:  # tied weights are there under two names
                known[memory] = list(pool.map(lambda piece: hashlib.sha256(piece).hexdigest(), _pieces(tensor)))
            total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape), known[memory]]).encode())
    return total.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Any]:
    flat = tensor.detach().reshape(-1)
    step = max(1, PIECE // max(flat.element_size(), 1))
    for start in range(0, flat.numel(), step):
        yield flat[start : start + step].contiguous().view(torch.uint8).cpu().numpy().data


def _without(entries: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Drops the named entries and those without effect, in nested configs too."""
    return {
        str(key): _without(value, names) if isinstance(value, dict) else value
        for key, value in entries.items()
        if key not in names and not str(key).startswith("_attn") and "drop" not in str(key)
    }


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)
