"""``tdpo train``: aligns a model with preference pairs."""

from __future__ import annotations

from collections.abc import Sequence

from tdpo.cli import COMMANDS
from tdpo.commands import launch
from tdpo.commands.common import (
    OUTPUT,
    clear_earlier_run,
    console,
    metric_table,
    prepare_output,
    quieten,
    read_dataset,
    told_in_words,
)
from tdpo.commands.options import parse
from tdpo.config import EvalDataConfig, ModelConfig, ReferenceConfig, TDPOConfig
from tdpo.data.dataset import PairDataset, prepare_pairs
from tdpo.data.sources import SourceRow
from tdpo.data.tokenise import Tokeniser
from tdpo.models.load import check_vocabulary, load_model, load_tokenizer
from tdpo.train.interrupts import listening
from tdpo.train.trainer import TDPOTrainer


def run(argv: Sequence[str]) -> None:
    """Runs the command: options, data, then weights, so that mistakes show before anything is loaded."""
    launch.apply(argv, "train")
    model_config, ref, data, args = parse(
        "train", COMMANDS["train"], (ModelConfig, ReferenceConfig, EvalDataConfig, TDPOConfig), argv, OUTPUT
    )
    quieten()
    checkpoint = prepare_output(
        args, model_config.model_name_or_path, model_config.tokenizer_name_or_path, ref.ref_model_name_or_path
    )
    out = console()
    tokenizer = load_tokenizer(model_config)
    tokeniser = Tokeniser(tokenizer, args.lengths())

    def prepare(rows: list[SourceRow]) -> PairDataset:
        return prepare_pairs(rows, tokeniser, args.dataset_format, args.on_bad_row)

    train = read_dataset(data.dataset_name, data.dataset_train_split, data.dataset_config, prepare)
    held_out = None
    if data.eval_dataset_name:
        held_out = read_dataset(data.eval_dataset_name, data.dataset_test_split, data.dataset_config, prepare)
    model = load_model(model_config)
    check_vocabulary(model, tokenizer)
    reference = load_model(model_config, ref.ref_model_name_or_path) if ref.ref_model_name_or_path else None
    with told_in_words():
        trainer = TDPOTrainer(model, reference, args, None, train, held_out, tokenizer)
    held_against = ref.ref_model_name_or_path or "a frozen copy of the policy"
    out.print(f"objective {trainer.objective}, reference: {held_against}, {trainer.layout}", soft_wrap=True)
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
