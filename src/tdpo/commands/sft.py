"""``tdpo sft``: fine-tunes a model on responses."""

from __future__ import annotations

from collections.abc import Sequence

from tdpo.cli import COMMANDS
from tdpo.commands import launch
from tdpo.commands.common import (
    OUTPUT,
    clear_earlier_run,
    console,
    prepare_output,
    quieten,
    read_dataset,
    told_in_words,
)
from tdpo.commands.options import parse
from tdpo.config import EvalDataConfig, ModelConfig, SFTConfig
from tdpo.data.sft import SFTDataset, prepare_sft
from tdpo.data.sources import SourceRow
from tdpo.data.tokenise import Tokeniser
from tdpo.models.load import check_vocabulary, load_model, load_tokenizer
from tdpo.train.interrupts import listening
from tdpo.train.sft import SFTTrainer


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    launch.apply(argv, "sft")
    model_config, data, args = parse("sft", COMMANDS["sft"], (ModelConfig, EvalDataConfig, SFTConfig), argv, OUTPUT)
    quieten()
    checkpoint = prepare_output(args, model_config.model_name_or_path, model_config.tokenizer_name_or_path)
    out = console()
    tokenizer = load_tokenizer(model_config)
    tokeniser = Tokeniser(tokenizer, args.lengths())

    def prepare(rows: list[SourceRow]) -> SFTDataset:
        return prepare_sft(rows, tokeniser, args.on_bad_row)

    train = read_dataset(data.dataset_name, data.dataset_train_split, data.dataset_config, prepare)
    held_out = None
    if data.eval_dataset_name:
        held_out = read_dataset(data.eval_dataset_name, data.dataset_test_split, data.dataset_config, prepare)
    model = load_model(model_config)
    check_vocabulary(model, tokenizer)
    with told_in_words():
        trainer = SFTTrainer(model, args, train, held_out, tokenizer)
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
