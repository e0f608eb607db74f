"""``tdpo train``: aligns a model with preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tdpo.commands.common import console, metric_table, user_errors
from tdpo.commands.training import run_training
from tdpo.config import AdapterOptions, EvalDataConfig, ModelConfig, ReferenceConfig, TDPOConfig
from tdpo.models.load import adapter_base, load_model, same_model
from tdpo.train.trainer import TDPOTrainer

OPTIONS = (ModelConfig, ReferenceConfig, AdapterOptions, EvalDataConfig, TDPOConfig)


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    run_training("train", OPTIONS, argv, _make_trainer, _show)


def _make_trainer(options: tuple[Any, ...], datasets: tuple[Any, Any], tokenizer: Any) -> TDPOTrainer:
    """Loads the models and makes the trainer; a reference that is the base of the adapter is loaded once."""
    model_config, ref, adapter, _, args = options
    name, quantization = ref.ref_model_name_or_path, adapter.quantization()
    base = adapter_base(model_config.model_name_or_path, model_config.model_revision)
    if base is None and adapter.use_peft:
        base = model_config.model_name_or_path
    if name and base and args.reference == "auto" and not args.reference_cache and same_model(name, base):
        args.reference, name = "adapter_off", None
    model = load_model(model_config, trainable=True, quantization=quantization)
    reference = load_model(model_config, name, quantization=quantization) if name else None
    with user_errors():
        trainer = TDPOTrainer(model, reference, args, None, *datasets, tokenizer, peft_config=adapter.peft_config())
    console().print(f"objective {trainer.objective}, {trainer.layout}", soft_wrap=True)
    console().print(trainer.reference_line, soft_wrap=True)
    return trainer


def _show(metrics: dict[str, float], pairs: int) -> None:
    console().print(metric_table(metrics, f"held out: {pairs} pairs"))
