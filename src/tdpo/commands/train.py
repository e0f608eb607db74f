"""``tdpo train``: aligns a model with preference pairs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from tdpo.commands import launch
from tdpo.commands.common import (
    TellSharding,
    clear_earlier_run,
    console,
    metric_table,
    prepare_output,
    quieten,
    read_dataset,
    run_options,
    told_in_words,
)
from tdpo.config import AdapterOptions, EvalDataConfig, ModelConfig, ReferenceConfig, TDPOConfig
from tdpo.data.dataset import PairDataset, prepare_pairs
from tdpo.data.sources import Source
from tdpo.models.load import adapter_base, load_model, load_tokenizer, same_model
from tdpo.train.stopping import listening
from tdpo.train.trainer import TDPOTrainer

OPTIONS = (ModelConfig, ReferenceConfig, AdapterOptions, EvalDataConfig, TDPOConfig)


def run(argv: Sequence[str]) -> None:
    """Runs the command: options, data, then weights, so that mistakes show before anything is loaded."""
    options = partial(run_options, "train", OPTIONS, argv)
    launch.apply(argv, "train", options)
    model_config, ref, adapter, data, args = options()
    reading = args.reading()
    quieten()
    checkpoint = prepare_output(
        args, model_config.model_name_or_path, model_config.tokenizer_name_or_path, ref.ref_model_name_or_path
    )
    ref_name = _second_model(model_config, ref, adapter, args)
    out = console()
    tokenizer = load_tokenizer(model_config)
    tokeniser = args.tokeniser(tokenizer)

    def prepare(rows: Source) -> PairDataset:
        return prepare_pairs(rows, tokeniser, reading, args.on_bad_row, cache=args.pair_cache())

    train = read_dataset(data.open_training(reading), prepare)
    aside = data.open_held_out(reading)
    held_out = None if aside is None else read_dataset(aside, prepare)
    trainer = _trainer(model_config, ref_name, adapter, args, (train, held_out), tokenizer)
    out.print(f"objective {trainer.objective}, {trainer.layout}", soft_wrap=True)
    out.print(trainer.reference_line, soft_wrap=True)
    with told_in_words(trainer), listening(trainer.stop_request):
        clear_earlier_run(args)
        result = trainer.train(resume_from_checkpoint=checkpoint)
    trainer.raise_if_stopped()
    with told_in_words(trainer):
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        if held_out is not None:
            metrics = trainer.evaluate()
            trainer.save_metrics("eval", metrics)
            shown = {name.removeprefix("eval_"): value for name, value in metrics.items()}
            out.print(metric_table(shown, f"held out: {len(held_out)} pairs"))
        trainer.save_state()
    out.print(f"saved to {args.output_dir}", soft_wrap=True)


def _trainer(
    model_config: ModelConfig,
    ref_name: str | None,
    adapter: AdapterOptions,
    args: TDPOConfig,
    data: tuple[PairDataset, PairDataset | None],
    tokenizer: Any,
) -> TDPOTrainer:
    """Loads the models and makes the trainer, which alone keeps them: a cached reference's body is let go."""
    quantization = adapter.quantization()
    model = load_model(model_config, trainable=True, quantization=quantization)
    reference = load_model(model_config, ref_name, quantization=quantization) if ref_name else None
    with told_in_words():
        return TDPOTrainer(
            model, reference, args, None, *data, tokenizer, [TellSharding()], peft_config=adapter.peft_config()
        )


def _second_model(
    model_config: ModelConfig, ref: ReferenceConfig, adapter: AdapterOptions, args: TDPOConfig
) -> str | None:
    """The reference model that has to be loaded, if any; under ``auto`` the adapter's base is there already.

    Raises:
        UserError: for a model in few bits without an adapter to train.
    """
    name = ref.ref_model_name_or_path
    base = adapter_base(model_config.model_name_or_path, model_config.model_revision)
    adapter.check_trains(loaded=base is not None)
    if base is None and adapter.use_peft:
        base = model_config.model_name_or_path
    if name and base and args.reference == "auto" and not args.reference_cache and same_model(name, base):
        args.reference = "adapter_off"
        return None
    return name
