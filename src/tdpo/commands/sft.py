"""``tdpo sft``: fine-tunes a model on responses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tdpo.commands.common import console, user_errors
from tdpo.commands.training import run_training
from tdpo.config import AdapterOptions, EvalDataConfig, ModelConfig, SFTConfig
from tdpo.models.load import load_model
from tdpo.train.sft import SFTTrainer

OPTIONS = (ModelConfig, AdapterOptions, EvalDataConfig, SFTConfig)


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    run_training("sft", OPTIONS, argv, _make_trainer, _show)


def _make_trainer(options: tuple[Any, ...], datasets: tuple[Any, Any], tokenizer: Any) -> SFTTrainer:
    model_config, adapter, _, args = options
    model = load_model(model_config, trainable=True, quantization=adapter.quantization())
    with user_errors():
        return SFTTrainer(model, args, *datasets, tokenizer, peft_config=adapter.peft_config())


def _show(metrics: dict[str, float], rows: int) -> None:
    console().print(f"held-out loss {metrics['loss']:.4f} nats per token", soft_wrap=True)
