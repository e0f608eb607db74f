"""Every option, once: dataclasses that the trainers take and the command line parses.

Defaults live here and nowhere else. What the docstring of a class says of an option is what ``tdpo <command> --help``
prints.
"""

from tdpo.config.checks import seconds
from tdpo.config.data import EvalDataConfig, FormatOptions, PairOptions, SplitOptions
from tdpo.config.models import AdapterOptions, ModelConfig, ReferenceConfig
from tdpo.config.run import APPLIED, RunOptions
from tdpo.config.training import LayoutOptions, ObjectiveOptions, ScoringOptions, SFTConfig, TDPOConfig

__all__ = [
    "APPLIED", "AdapterOptions", "EvalDataConfig", "FormatOptions", "LayoutOptions", "ModelConfig",
    "ObjectiveOptions", "PairOptions", "ReferenceConfig", "RunOptions", "SFTConfig",
    "ScoringOptions", "SplitOptions", "TDPOConfig", "seconds",
]  # fmt: skip
