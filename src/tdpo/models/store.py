"""Keeps the reference's hidden states on disk, found by the tokens of a pair and bound to one reference.

A folder holds ``manifest.json`` with the key (:class:`CacheKey`) and shards in safetensors. Shards are written
atomically, and their names are hashes of their content, so processes never write the same file for different content.
Pairs are found by :attr:`tdpo.types.TokenisedPair.key`: order, subsets and batches do not matter, and a pair whose
tokens changed is another pair, which the cache lacks.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from typing_extensions import override

from tdpo.errors import UserError
from tdpo.files import PARTIAL, atomic_write
from tdpo.models.fingerprint import tensors_hash
from tdpo.models.reference import Reference
from tdpo.types import Head, PackedBatch, TokenisedPair

FORMAT = 2
MANIFEST = "manifest.json"
SHARDS = "hidden-*.safetensors"
TENSORS = ("pairs", "lengths", "hidden")
"""Tensors of a shard: keys ``[P]``, lengths ``[P, 2]`` of chosen and rejected, states ``[N, D]``."""
NAMED_ROWS = 10


@dataclass(frozen=True)
class CacheKey:
    """Identifies the reference that states belong to: everything they depend on beside the pairs.

    Attributes:
        weights: Hash of the reference's weights.
        config: Hash of its config.
        dtype: Dtype the states are kept in.
        precision: Mixed precision the reference ran in: ``no``, ``bf16`` or ``fp16``.
        attention: Attention implementation.
        layout: ``tree`` or ``padded``; both give the same states up to rounding, and a cache is exact.
        library: Version of transformers, whose code computed them.
        format: Version of the files.
    """

    weights: str
    config: str
    dtype: str
    precision: str
    attention: str
    layout: str
    library: str
    format: int = FORMAT

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the states."""
        return getattr(torch, self.dtype)


class HiddenStore:
    """Reads and writes the cached hidden states of one reference in one folder.

    Args:
        folder: The folder of the cache, which may be new.
        key: What the states must have been made with.

    Attributes:
        filled_for: :func:`pairs_hash` of the pairs the folder was filled for; empty for a new folder.

    Raises:
        UserError: if the folder holds states made with anything else, or a file that is not what it should be.
    """

    def __init__(self, folder: Path, key: CacheKey) -> None:
        self.folder, self.key = folder, key
        self.filled_for = ""
        self._shards: dict[Path, Tensor] = {}
        # Shard, first row in it, and the lengths of the chosen and the rejected response, by the pair's key.
        self._locations: dict[int, tuple[Path, int, tuple[int, int]]] = {}
        self._read_manifest()
        self.refresh()

    def __len__(self) -> int:
        return len(self._locations)

    def bytes_per_token(self) -> int:
        """Returns the bytes on disk per response token; 0 while there are none."""
        return next((states[0].nbytes for states in self._shards.values() if len(states)), 0)

    def missing(self, pairs: Iterable[TokenisedPair]) -> list[TokenisedPair]:
        """Returns the pairs that the store lacks, each once."""
        return [pair for key, pair in {pair.key: pair for pair in pairs}.items() if key not in self._locations]

    def claim(self, pairs: Iterable[TokenisedPair]) -> None:
        """Writes the manifest; one process calls it once, before the first shard.

        Args:
            pairs: The pairs that will be added.
        """
        self.filled_for = pairs_hash([*self._locations, *(pair.key for pair in pairs)])
        content = {"key": dataclasses.asdict(self.key), "pairs": self.filled_for, "torch": torch.__version__}
        self._write(MANIFEST, json.dumps(content, indent=2).encode() + b"\n")
        for left in self.folder.glob(f"*{PARTIAL}-*"):
            left.unlink(missing_ok=True)

    def add(self, pairs: Sequence[TokenisedPair], states_ND: Tensor) -> None:
        """Writes one shard.

        Args:
            pairs: The pairs.
            states_ND: States of their tokens in the order of the pairs, chosen before rejected, in the key's dtype.

        Raises:
            UserError: if the dtype cannot hold the states, or the disk is full or read-only.
        """
        if not bool(states_ND.isfinite().all()):
            raise UserError(
                f"hidden states of the reference are not finite in {self.key.dtype}; --reference_cache_dtype bfloat16 "
                "has the range of float32"
            )
        tensors = {
            "pairs": torch.tensor([pair.key for pair in pairs]),
            "lengths": torch.tensor([[len(pair.chosen_ids), len(pair.rejected_ids)] for pair in pairs]),
            "hidden": states_ND.contiguous(),
        }
        content = tensors_hash(tensors.items())
        self._write(f"hidden-{content[:24]}.safetensors", save(tensors, {"key": str(self.key), "content": content}))

    def _write(self, name: str, content: bytes) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            atomic_write(self.folder / name, content)
        except OSError as error:
            raise UserError(
                f"--reference_cache {self.folder}: cannot be written: {error.strerror or error}. Shards written before "
                "stay, and filling continues from them"
            ) from error

    def refresh(self) -> None:
        """Opens the shards that other processes wrote since the last time."""
        for path in sorted(self.folder.glob(SHARDS)):
            if path not in self._shards:
                self._open(path)

    def verify(self, rank: int = 0, processes: int = 1) -> None:
        """Compares the bytes of every shard with the hash in it; processes share the work.

        Raises:
            UserError: naming the shard that changed.
        """
        for path in sorted(self._shards)[rank::processes]:
            with safe_open(path, "pt") as file:
                if file.metadata().get("content") != tensors_hash((name, file.get_tensor(name)) for name in TENSORS):
                    raise UserError(f"{path}: its content changed since it was written; remove it and fill it again")

    def states(self, keys: Sequence[int], lengths: Sequence[int], rows: Tensor | None = None) -> Tensor:
        """Reads the states ``[N, D]`` of some pairs in their order, on the CPU, in the dtype of the cache.

        Args:
            keys: Key of each pair.
            lengths: Token counts of chosen and rejected of each pair in turn.
            rows: Source row of each pair, for messages.

        Raises:
            UserError: naming the pairs that the cache lacks.
        """
        if len(lengths) != 2 * len(keys):
            raise UserError("--reference cached: the batch does not say its pairs (a data_collator of your own?)")
        absent = [index for index, key in enumerate(keys) if key not in self._locations]
        if absent:
            raise UserError(
                self.lacks([index + 1 if rows is None else int(rows[index]) for index in absent], len(keys))
            )
        parts = []
        for index, key in enumerate(keys):
            shard, start, own = self._locations[key]
            if own != tuple(lengths[2 * index : 2 * index + 2]):
                raise UserError(f"{shard}: a pair has other lengths there than in the batch; keys collide")
            parts.append(self._shards[shard][start : start + sum(own)])
        return torch.cat(parts)

    def lacks(self, rows: Sequence[int], of: int) -> str:
        """Returns the message that names the pairs the cache lacks."""
        named = ", ".join(map(str, rows[:NAMED_ROWS])) + (", ..." if len(rows) > NAMED_ROWS else "")
        return (
            f"--reference_cache {self.folder}: it lacks {len(rows)} of {of} pairs (rows {named}): tokens changed since "
            "it was filled, or filling was interrupted. tdpo cache-reference adds pairs to it"
        )

    def _read_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.is_file():
            if any(self.folder.glob(SHARDS)):
                raise UserError(
                    f"--reference_cache {self.folder}: shards without {MANIFEST}; remove them and fill it again"
                )
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            stored, self.filled_for = dict(content["key"]), str(content["pairs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read as the manifest of a reference cache: {error}") from error
        ours = dataclasses.asdict(self.key)
        hashed = {"weights": "other weights", "config": "another config of the reference"}
        differences = [
            hashed.get(name, f"{name} {stored.get(name)} (now {value})")
            for name, value in ours.items()
            if stored.get(name) != value
        ]
        if differences:
            raise UserError(
                f"--reference_cache {self.folder} is stale: it was filled with {' and '.join(differences)}. "
                "Nothing of it was used; name another folder, or remove this one to fill it again"
            )

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                keys, lengths, hidden = (file.get_tensor(name) for name in TENSORS)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it and fill it again") from error
        if metadata.get("key") != str(self.key):
            raise UserError(f"{path}: it belongs to another reference cache; remove it")
        complete = keys.shape[:1] == lengths.shape[:1] and int(lengths.sum()) == hidden.shape[0]
        if not complete or hidden.dtype != self.key.torch_dtype:
            raise UserError(f"{path}: its tensors do not fit together; remove it and fill it again")
        start = 0
        for key, (chosen, rejected) in zip(keys.tolist(), lengths.tolist(), strict=True):
            self._locations.setdefault(key, (path, start, (chosen, rejected)))
            start += chosen + rejected
        self._shards[path] = hidden  # a view of the mapped file: read from disk when it is used


class CachedHidden(Reference):
    """Reads hidden states from disk, exactly as the reference computed them in the cache's dtype; no model runs.

    Args:
        store: Holds the states of every pair that will be asked for.
        head: The reference's head; copied, so that neither training nor a release of the model touches it.
    """

    def __init__(self, store: HiddenStore, head: Head) -> None:
        self.store, self._head = store, head.map(lambda tensor: tensor.detach().clone())

    @override
    def to(self, device: torch.device | str) -> None:
        self._head = self._head.map(lambda tensor: tensor.to(device))

    @override
    def head(self) -> Head:
        return self._head

    @override
    def states(self, batch: PackedBatch) -> Tensor:
        states = self.store.states(batch.pair_keys, batch.lengths, batch.pair_rows)
        # A cache of fewer bits than the head is widened, and the head is never cast to fewer bits.
        dtype = torch.promote_types(states.dtype, self._head.weight.dtype)
        return states.to(batch.input_ids.device, dtype)


def pairs_hash(keys: Iterable[int]) -> str:
    """Computes the SHA-256 of a set of pairs' keys, independent of their order."""
    return hashlib.sha256(" ".join(map(str, sorted(set(keys)))).encode()).hexdigest()
