"""``tdpo train``: aligns a model with preference pairs."""

from __future__ import annotations

from collections.abc import Sequence

from tdpo.commands.common import console, metric_table, user_errors
from tdpo.commands.training import prepare_run, train_and_save
from tdpo.config import AdapterOptions, EvalDataConfig, ModelConfig, ReferenceConfig, TDPOConfig
from tdpo.distributed.sharding import ShardingCallback
from tdpo.models.load import adapter_base, load_model, same_model
from tdpo.train.trainer import TDPOTrainer

OPTIONS = (ModelConfig, ReferenceConfig, AdapterOptions, EvalDataConfig, TDPOConfig)


def run(argv: Sequence[str]) -> None:
    """Runs the command; a reference that is the base of the policy's adapter is loaded once."""
    options, tokenizer, train, held_out = prepare_run("train", OPTIONS, argv)
    model_config, ref, adapter, _, args = options
    name, quantization = ref.ref_model_name_or_path, adapter.quantization()
    base = adapter_base(model_config.model_name_or_path, model_config.model_revision)
    if base is None and adapter.use_peft:
        base = model_config.model_name_or_path
    if name and base and args.reference == "auto" and not args.reference_cache and same_model(name, base):
        args.reference, name = "adapter_off", None
    model = load_model(model_config, trainable=True, quantization=quantization)
    reference = load_model(model_config, name, quantization=quantization) if name else None
    sharding, peft_config = ShardingCallback(), adapter.peft_config()
    with user_errors():
        trainer = TDPOTrainer(
            model, reference, args, None, train, held_out, tokenizer, [sharding], peft_config=peft_config
        )
    del model, reference  # the trainer decides what of them stays in memory
    console().print(f"objective {trainer.objective}, {trainer.layout}", soft_wrap=True)
    console().print(trainer.reference_line, soft_wrap=True)
    metrics = train_and_save(trainer)
    if metrics is not None:
        console().print(metric_table(metrics, f"held out: {len(held_out)} pairs"))
