"""``tdpo sft``: fine-tunes a model on responses."""

from __future__ import annotations

from collections.abc import Sequence

from tdpo.commands.common import console, user_errors
from tdpo.commands.train import prepare_run, train_and_save
from tdpo.config import AdapterOptions, EvalDataConfig, ModelConfig, SFTConfig
from tdpo.models.load import load_model
from tdpo.train.sft import SFTTrainer

OPTIONS = (ModelConfig, AdapterOptions, EvalDataConfig, SFTConfig)


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    (model_config, adapter, _, args), tokenizer, train, held_out = prepare_run("sft", OPTIONS, argv)
    model = load_model(model_config, trainable=True, quantization=adapter.quantization())
    with user_errors():
        trainer = SFTTrainer(model, args, train, held_out, tokenizer, peft_config=adapter.peft_config())
    del model  # the trainer decides what of it stays in memory
    metrics = train_and_save(trainer)
    if metrics is not None:
        console().print(f"held-out loss {metrics['loss']:.4f} nats per token", soft_wrap=True)
