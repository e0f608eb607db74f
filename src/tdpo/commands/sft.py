"""``tdpo sft``: fine-tunes a model on responses."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from tdpo.commands import launch
from tdpo.commands.common import (
    TellSharding,
    clear_earlier_run,
    console,
    prepare_output,
    quieten,
    read_dataset,
    run_options,
    told_in_words,
)
from tdpo.config import AdapterOptions, EvalDataConfig, ModelConfig, SFTConfig
from tdpo.data.sft import SFTDataset, prepare_sft
from tdpo.data.sources import Source
from tdpo.data.tokenise import Tokeniser
from tdpo.models.load import adapter_base, load_model, load_tokenizer
from tdpo.train.sft import SFTTrainer
from tdpo.train.stopping import listening

OPTIONS = (ModelConfig, AdapterOptions, EvalDataConfig, SFTConfig)


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    options = partial(run_options, "sft", OPTIONS, argv)
    launch.apply(argv, "sft", options)
    model_config, adapter, data, args = options()
    reading = args.reading()
    quieten()
    checkpoint = prepare_output(args, model_config.model_name_or_path, model_config.tokenizer_name_or_path)
    out = console()
    tokenizer = load_tokenizer(model_config)
    tokeniser = Tokeniser(tokenizer, args.lengths(), rendering=args.rendering())

    def prepare(rows: Source) -> SFTDataset:
        return prepare_sft(rows, tokeniser, reading, args.on_bad_row, train_on=args.train_on)

    train = read_dataset(data.open_training(reading), prepare)
    aside = data.open_held_out(reading)
    held_out = None if aside is None else read_dataset(aside, prepare)
    adapter.check_trains(adapter_base(model_config.model_name_or_path, model_config.model_revision) is not None)
    model = load_model(model_config, trainable=True, quantization=adapter.quantization())
    with told_in_words():
        trainer = SFTTrainer(
            model, args, train, held_out, tokenizer, [TellSharding()], peft_config=adapter.peft_config()
        )
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
            out.print(f"held-out loss {metrics['eval_loss']:.4f} nats per token", soft_wrap=True)
        trainer.save_state()
    out.print(f"saved to {args.output_dir}", soft_wrap=True)
