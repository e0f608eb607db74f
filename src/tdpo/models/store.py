"""The reference's hidden states on disk: shards of whole pairs, found by what the pairs say, bound to one key.

A folder holds ``manifest.json`` with the key (:class:`CacheKey`) and shards in safetensors. A shard is written aside
and renamed, so it is there whole or not at all, and its name is made of its content, so processes never write the same
file for different things. Pairs are found by :attr:`tdpo.types.TokenisedPair.key`: order, subsets and the cutting into
batches do not matter, and a pair whose tokens changed is another pair, which is not there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tdpo.errors import UserError
from tdpo.files import PARTIAL, atomic_write
from tdpo.models.fingerprint import bytes_hash
from tdpo.types import TokenisedPair

FORMAT = 1
MANIFEST = "manifest.json"
SHARDS = "hidden-*.safetensors"
NAMED_ROWS = 10


@dataclass(frozen=True)
class CacheKey:
    """Everything the cached states depend on beside the pairs.

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
    def digest(self) -> str:
        """The key as one hash."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the states."""
        return getattr(torch, self.dtype)


@dataclass(frozen=True)
class _Place:
    """Where the states of a pair are: the shard, its first row there, and how long the two responses are."""

    shard: Path
    start: int
    lengths: tuple[int, int]


class HiddenStore:
    """Cached hidden states of one reference in one folder.

    Args:
        folder: Where they are, or will be.
        key: What they must have been made with.

    Raises:
        UserError: if the folder holds states made with anything else, or a file that is not what it should be.
    """

    def __init__(self, folder: Path, key: CacheKey) -> None:
        self.folder, self.key = folder, key
        self.filled_for = ""
        self._places: dict[int, _Place] = {}
        self._tensors: dict[Path, Tensor] = {}
        self._read_manifest()
        self.refresh()

    def __len__(self) -> int:
        return len(self._places)

    def bytes_per_token(self) -> int:
        """Bytes on disk per response token; 0 while there are none."""
        shards = {place.shard for place in self._places.values()}
        return self._tensors[next(iter(shards))][0].nbytes if shards else 0

    def missing(self, pairs: Iterable[TokenisedPair]) -> list[TokenisedPair]:
        """Those of the pairs the store does not hold, each once.

        Raises:
            UserError: if two pairs with different tokens have one key, which 64 bits make unlikely, not impossible.
        """
        seen: dict[int, TokenisedPair] = {}
        for pair in pairs:
            other = seen.setdefault(pair.key, pair)
            if (other.prompt_ids, other.chosen_ids, other.rejected_ids) != (
                pair.prompt_ids,
                pair.chosen_ids,
                pair.rejected_ids,
            ):
                raise UserError(f"rows {other.row} and {pair.row}: their keys collide; the cache cannot hold both")
        return [pair for key, pair in seen.items() if key not in self._places]

    def claim(self, pairs: Iterable[TokenisedPair]) -> None:
        """Writes down, once, by one process and before the first shard, what the folder is for.

        Args:
            pairs: What it is going to hold beside what it holds.
        """
        self.filled_for = pairs_hash([*self._places, *(pair.key for pair in pairs)])
        content = {"key": dataclasses.asdict(self.key), "digest": self.key.digest, "pairs": self.filled_for}
        content["versions"] = {"torch": torch.__version__}
        with _told_in_words(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(f"*{PARTIAL}-*"):
                left.unlink(missing_ok=True)
            atomic_write(self.folder / MANIFEST, json.dumps(content, indent=2) + "\n")

    def add(self, pairs: Sequence[TokenisedPair], states_ND: Tensor) -> None:
        """Writes one shard.

        Args:
            pairs: Whose states they are.
            states_ND: Their tokens in the order of the pairs, chosen before rejected, in the key's dtype.

        Raises:
            UserError: if the dtype cannot hold the states, or the disk cannot take them.
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
        told = {"key": self.key.digest, "content": _content_hash(tensors)}
        name = f"hidden-{told['content'][:24]}.safetensors"
        with _told_in_words(self.folder):
            atomic_write(self.folder / name, save(tensors, metadata=told))

    def refresh(self) -> None:
        """Looks at the folder again: shards that other processes wrote are found."""
        for path in sorted(self.folder.glob(SHARDS)):
            if path not in self._tensors:
                self._open(path)

    def verify(self, rank: int = 0, processes: int = 1) -> None:
        """Holds the bytes of every shard against the hash in it; processes share the work.

        Raises:
            UserError: naming the shard that changed.
        """
        for path in sorted(self._tensors)[rank::processes]:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in ("pairs", "lengths", "hidden")}
                if file.metadata().get("content") != _content_hash(tensors):
                    raise UserError(f"{path}: its content changed since it was written; remove it and fill anew")

    def states(self, keys: Sequence[int], lengths: Sequence[int], rows: Tensor | None = None) -> Tensor:
        """The states ``[N, D]`` of some pairs in their order, on the CPU, in the dtype of the cache.

        Args:
            keys: Key of each pair.
            lengths: Token counts of chosen and rejected of each pair in turn.
            rows: Source row of each pair, for messages.

        Raises:
            UserError: naming the pairs that are not there.
        """
        if len(lengths) != 2 * len(keys):
            raise UserError("--reference cached: the batch does not say its pairs (a data_collator of your own?)")
        absent = [number for number, key in enumerate(keys) if key not in self._places]
        if absent:
            named = [int(rows[number]) if rows is not None else number + 1 for number in absent]
            raise UserError(self.lacks(named, len(keys)))
        parts = []
        for number, key in enumerate(keys):
            place = self._places[key]
            if place.lengths != tuple(lengths[2 * number : 2 * number + 2]):
                raise UserError(f"{place.shard}: a pair has other lengths there than in the batch; keys collide")
            parts.append(self._tensors[place.shard][place.start : place.start + sum(place.lengths)])
        return torch.cat(parts)

    def lacks(self, rows: Sequence[int], of: int) -> str:
        """Says in words which pairs are not there."""
        named = ", ".join(map(str, rows[:NAMED_ROWS])) + (", ..." if len(rows) > NAMED_ROWS else "")
        return (
            f"--reference_cache {self.folder}: it lacks {len(rows)} of {of} pairs (rows {named}): tokens changed since "
            "it was filled, or it was not filled to its end. tdpo cache-reference adds pairs to it"
        )

    def _read_manifest(self) -> None:
        path = self.folder / MANIFEST
        if not path.is_file():
            if any(self.folder.glob(SHARDS)):
                raise UserError(f"--reference_cache {self.folder}: shards without {MANIFEST}; remove them to fill anew")
            return
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            stored, self.filled_for = dict(content["key"]), str(content["pairs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: cannot be read as the manifest of a reference cache: {error}") from error
        ours = dataclasses.asdict(self.key)
        other = [name for name in ours if stored.get(name) != ours[name]]
        if other:
            raise UserError(
                f"--reference_cache {self.folder} is stale: it was filled with {_differences(stored, ours, other)}. "
                "Nothing of it was used; name another folder, or remove this one to fill it anew"
            )

    def _open(self, path: Path) -> None:
        try:
            with safe_open(path, "pt") as file:
                told = file.metadata() or {}
                keys, lengths, hidden = (file.get_tensor(name) for name in ("pairs", "lengths", "hidden"))
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: cannot be read ({error}); remove it and fill anew") from error
        if told.get("key") != self.key.digest:
            raise UserError(f"{path}: it belongs to another reference cache; remove it")
        whole = keys.shape[:1] == lengths.shape[:1] and int(lengths.sum()) == hidden.shape[0]
        if not whole or hidden.dtype != self.key.torch_dtype:
            raise UserError(f"{path}: its tensors do not fit together; remove it and fill anew")
        starts = (lengths.sum(1).cumsum(0) - lengths.sum(1)).tolist()
        for key, start, (chosen, rejected) in zip(keys.tolist(), starts, lengths.tolist(), strict=True):
            self._places.setdefault(key, _Place(path, start, (chosen, rejected)))
        self._tensors[path] = hidden  # a view of the mapped file: read from disk when it is looked at


def pairs_hash(keys: Iterable[int]) -> str:
    """SHA-256 of a set of pairs' keys, whatever their order and however often each is there."""
    return hashlib.sha256(" ".join(map(str, sorted(set(keys)))).encode()).hexdigest()


def _content_hash(tensors: dict[str, Tensor]) -> str:
    return bytes_hash(tensors[name] for name in ("pairs", "lengths", "hidden"))


def _differences(stored: dict[str, Any], ours: dict[str, Any], names: Sequence[str]) -> str:
    """What differs between two keys in words; hashes are not shown, nobody can read them."""
    hashed = {"weights": "other weights", "config": "another config of the reference"}
    return " and ".join(
        hashed[name] if name in hashed else f"{name} {stored.get(name)} (now {ours[name]})" for name in names
    )


@contextlib.contextmanager
def _told_in_words(folder: Path) -> Any:
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"--reference_cache {folder}: cannot be written: {reason}. Shards written before stay, and filling goes on "
            "from them"
        ) from error
