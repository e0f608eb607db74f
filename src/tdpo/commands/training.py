"""Runs ``tdpo sft`` and ``tdpo train``: options, data, models, trainer, training, saving, evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from tdpo.cli import COMMANDS
from tdpo.commands.common import check_output, clear_earlier_run, console, quieten, read_dataset, user_errors
from tdpo.commands.options import parse
from tdpo.data.dataset import PairDataset
from tdpo.data.options import check_format, make_tokeniser, open_held_out, open_training
from tdpo.distributed import launch
from tdpo.models.load import adapter_base, load_tokenizer
from tdpo.train.preflight import check_arguments
from tdpo.train.stopping import handle_signals

if TYPE_CHECKING:
    from tdpo.data.sft import SFTDataset

Datasets = tuple["PairDataset | SFTDataset", "PairDataset | SFTDataset | None"]


def run_training(
    command: str,
    classes: tuple[type, ...],
    argv: Sequence[str],
    make_trainer: Callable[[tuple[Any, ...], Datasets, Any], Any],
    show: Callable[[dict[str, float], int], None],
) -> None:
    """Runs a training command; mistakes in options and data show before weights are loaded.

    Args:
        command: Its name.
        classes: The dataclasses of its options: of the model first; of adapter, data and run last.
        argv: Its words.
        make_trainer: Loads the models and makes the trainer, which alone keeps them; from the options, the datasets to
            train and to evaluate on, and the tokenizer.
        show: Prints the metrics of held-out data and its number of rows.
    """

    def read_options() -> tuple[Any, ...]:
        options = parse(command, COMMANDS[command], classes, argv, required=["output_dir"])
        data, args = options[-2:]
        check_format(args)
        spec = args.row_spec()
        data.check_row_spec(spec)
        open_training(data, spec)
        check_arguments(args, open_held_out(data, spec) is not None)
        return options

    launch.apply(argv, command, read_options)
    options = read_options()
    model_config, (adapter, data, args) = options[0], options[-3:]
    spec = args.row_spec()
    quieten()
    reference = [getattr(option, "ref_model_name_or_path", None) for option in options]
    inputs = model_config.model_name_or_path, model_config.tokenizer_name_or_path, *reference
    check_output(args, *inputs)
    adapter.check_trains(adapter_base(model_config.model_name_or_path, model_config.model_revision) is not None)

    tokenizer = load_tokenizer(model_config)
    read = partial(read_dataset, options=args, tokeniser=make_tokeniser(args, tokenizer))
    train, source = read(open_training(data, spec)), open_held_out(data, spec)
    held_out = None if source is None else read(source)
    trainer = make_trainer(options, (train, held_out), tokenizer)
    with user_errors(trainer), handle_signals(trainer.stop_request):
        clear_earlier_run(args)
        result = trainer.train()
    trainer.stop_request.raise_if_stopped(trainer.state)

    with user_errors(trainer):
        trainer.save_model()
        trainer.save_metrics("train", result.metrics)
        if held_out is not None:
            metrics = trainer.evaluate()
            trainer.save_metrics("eval", metrics)
            shown = {name.removeprefix("eval_"): value for name, value in metrics.items()}
            show(shown, len(held_out))
        trainer.save_state()
    console().print(f"saved to {args.output_dir}", soft_wrap=True)
