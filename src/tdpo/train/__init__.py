"""Training on the transformers Trainer."""

from tdpo.config import SFTConfig, TDPOConfig
from tdpo.train.sft import SFTTrainer
from tdpo.train.trainer import TDPOTrainer

__all__ = ["SFTConfig", "SFTTrainer", "TDPOConfig", "TDPOTrainer"]
