"""Every option, once: dataclasses that the trainers take and the command line parses.

Defaults live here and nowhere else; help texts are what ``tdpo <command> --help`` prints.
"""

from tdpo.config.arguments import FIXED, HONOURED, Fixed
from tdpo.config.checks import check_at_least, check_choices, option, seconds
from tdpo.config.data import (
    DATASET_HELP,
    EvalDataConfig,
    FormatOptions,
    LengthOptions,
    PairOptions,
    SplitOptions,
)
from tdpo.config.models import AdapterOptions, ModelConfig, ReferenceConfig
from tdpo.config.run import APPLIED, RunOptions
from tdpo.config.training import (
    CACHE_DTYPE,
    CACHE_HELP,
    LayoutOptions,
    ObjectiveOptions,
    ScoringOptions,
    SFTConfig,
    TDPOConfig,
)

__all__ = [
    "APPLIED",
    "CACHE_DTYPE",
    "CACHE_HELP",
    "DATASET_HELP",
    "FIXED",
    "HONOURED",
    "AdapterOptions",
    "EvalDataConfig",
    "Fixed",
    "FormatOptions",
    "LayoutOptions",
    "LengthOptions",
    "ModelConfig",
    "ObjectiveOptions",
    "PairOptions",
    "ReferenceConfig",
    "RunOptions",
    "SFTConfig",
    "ScoringOptions",
    "SplitOptions",
    "TDPOConfig",
    "check_at_least",
    "check_choices",
    "option",
    "seconds",
]
