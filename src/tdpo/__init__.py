"""Token-level Direct Preference Optimization (TDPO) for Hugging Face language models.

Names are imported on first use, so that ``import tdpo`` (and ``tdpo --help``) does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from tdpo import objectives, ops
    from tdpo.config import SFTConfig, TDPOConfig
    from tdpo.errors import UserError
    from tdpo.report.inspect import inspect
    from tdpo.score import PairScores, pair_loss, score_pairs
    from tdpo.train.sft import SFTTrainer
    from tdpo.train.trainer import TDPOTrainer
    from tdpo.types import PackedBatch, PairStats, PreferenceRecord, TokenisedPair, TokenStats

_HOMES = {
    "objectives": "tdpo.objectives",
    "ops": "tdpo.ops",
    "SFTConfig": "tdpo.config",
    "SFTTrainer": "tdpo.train.sft",
    "TDPOConfig": "tdpo.config",
    "TDPOTrainer": "tdpo.train.trainer",
    "UserError": "tdpo.errors",
    "inspect": "tdpo.report.inspect",
    "PairScores": "tdpo.score",
    "pair_loss": "tdpo.score",
    "score_pairs": "tdpo.score",
    "PackedBatch": "tdpo.types",
    "PairStats": "tdpo.types",
    "PreferenceRecord": "tdpo.types",
    "TokenisedPair": "tdpo.types",
    "TokenStats": "tdpo.types",
}

__all__ = [
    "PackedBatch",
    "PairScores",
    "PairStats",
    "PreferenceRecord",
    "SFTConfig",
    "SFTTrainer",
    "TDPOConfig",
    "TDPOTrainer",
    "TokenStats",
    "TokenisedPair",
    "UserError",
    "inspect",
    "objectives",
    "ops",
    "pair_loss",
    "score_pairs",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tdpo' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    return module if name in ("objectives", "ops") else getattr(module, name)
