"""What TRL's trainers take is taken or refused by name, in Python as on the command line."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from conftest import make_model, preference_rows, write_jsonl
from tiny_training import tiny_config, tiny_trainer, weights
from transformers import TrainingArguments

from tdpo import SFTConfig, SFTTrainer, TDPOConfig, TDPOTrainer, UserError
from tdpo.config.arguments import FIXED
from tdpo.data.tokenise import Lengths
from tdpo.train.preflight import UNAVAILABLE

TOKENISED = {"prompt_ids": [5, 6], "chosen_ids": [7, 8, 0], "rejected_ids": [9, 0]}
OTHER_VALUES = {
    bool: lambda value: not value,
    float: lambda value: value + 0.1,
    str: lambda value: value + "x",
    list: lambda value: ["loss"],
}
HONOURED = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
optim_target_modules gradient_accumulation_steps max_grad_norm bf16 fp16 tf32 activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
torch_compile_backend torch_compile_mode liger_kernel_config use_cache neftune_noise_alpha
torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps logging_first_step log_on_each_node
logging_nan_inf_filter include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name
project trackio_space_id trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay
per_device_eval_batch_size prediction_loss_only eval_on_start eval_accumulation_steps save_only_model save_strategy
save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token hub_private_repo
hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end metric_for_best_model
greater_is_better ignore_data_skip restore_callback_states_from_checkpoint full_determinism seed data_seed use_cpu
accelerator_config dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order train_sampling_strategy
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp
fsdp_config deepspeed debug skip_memory_metrics do_train do_eval resume_from_checkpoint local_rank
"""
"""Fields that do what transformers says they do.

``prediction_loss_only`` and ``eval_accumulation_steps`` ask for what always holds: nothing but the metrics is kept.
``liger_kernel_config`` belongs to ``use_liger_kernel``, which is refused, and has no effect without it.
``do_train`` and ``do_eval`` are what the commands do anyway, the second wherever there is held-out data.
"""


def sft(folder: Path, tokenizer: Any, data: Any, **options: Any) -> SFTTrainer:
    defaults = {"max_steps": 2, "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = SFTConfig(output_dir=str(folder), **{**defaults, **options})
    return SFTTrainer(make_model(len(tokenizer)), args, data, processing_class=tokenizer)


def endless() -> Iterator[dict[str, str]]:
    return itertools.cycle(preference_rows())


def test_every_field_of_training_arguments_has_a_verdict() -> None:
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    honoured = set(HONOURED.split())
    assert set(FIXED) | honoured == fields and not set(FIXED) & honoured
    defaults = {field.name: field for field in dataclasses.fields(TDPOConfig)}
    for name, (value, _) in FIXED.items():
        field = defaults[name]
        assert value == (field.default_factory() if callable(field.default_factory) else field.default), name  # type: ignore[misc]


@pytest.mark.parametrize("name", sorted(FIXED))
def test_a_field_that_has_one_value_is_refused_with_another(tmp_path: Path, name: str) -> None:
    value, _ = FIXED[name]
    other = {"rope": True} if value is None else OTHER_VALUES[type(value)](value)
    with pytest.raises(UserError, match=rf"--{name} (has no effect|cannot be on|cannot be off|is not av|casts)"):
        tiny_config(tmp_path, **{name: other})


@pytest.mark.parametrize("counted", ["all", "non_padding"])
def test_tokens_seen_are_those_of_the_batches(tmp_path: Path, tokenizer: Any, counted: str) -> None:
    options = {"max_steps": -1, "num_train_epochs": 1, "layout": "padded", "include_num_input_tokens_seen": counted}
    trainer = tiny_trainer(tmp_path, tokenizer, **options)
    trainer.train()
    pairs = trainer.train_dataset
    real = sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)
    seen = trainer.state.num_input_tokens_seen
    assert seen == real if counted == "non_padding" else seen > real


def test_predicting_gives_the_metrics_of_evaluating(tmp_path: Path, tokenizer: Any) -> None:
    other = make_model(len(tokenizer), seed=1)
    trainer = tiny_trainer(tmp_path, tokenizer, ref_model=other)
    evaluated = trainer.evaluate(preference_rows(5))
    output = trainer.predict(preference_rows(5))
    assert output.predictions is None and output.label_ids is None
    compared = [name for name in trainer.metric_names() if f"eval_{name}" in evaluated]
    assert "loss" in compared and "kl/chosen" in compared
    for name in compared:
        assert output.metrics[f"test_{name}"] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-6), name
    assert trainer.predict(preference_rows(5), metric_key_prefix="held").metrics["held_loss"] > 0


def test_supervised_rows_are_evaluated_and_predicted_as_they_are_trained_on(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "The river", "completion": f" is near the {word}."} for word in ("garden", "window", "engine")]
    trainer = sft(tmp_path, tokenizer, rows)
    assert trainer.predict(rows).metrics["test_loss"] == pytest.approx(trainer.evaluate(rows)["eval_loss"])
    assert set(trainer.evaluate({"a": rows, "b": rows[:1]})) >= {"eval_a_loss", "eval_b_loss"}


@pytest.mark.parametrize(
    "stream",
    [
        pytest.param(lambda: endless(), id="generator"),
        pytest.param(lambda: datasets.IterableDataset.from_generator(endless), id="IterableDataset"),
    ],
)
def test_of_an_endless_stream_the_run_takes_what_its_steps_need(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, stream: Any
) -> None:
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2, "max_steps": 4}
    with caplog.at_level(logging.WARNING, logger="tdpo"):
        trainer = tiny_trainer(tmp_path, tokenizer, rows=stream(), **options)
    assert len(trainer.train_dataset) == 24
    assert "train_dataset is a stream: 24 rows were read, for 4 steps of 6" in [r.getMessage() for r in caplog.records]
    assert trainer.train().global_step == 4
    same = tiny_trainer(tmp_path, tokenizer, rows=preference_rows(24), **options)
    same.train()
    assert torch.equal(weights(trainer.model), weights(same.model))


def test_a_stream_reads_on_where_rows_are_dropped(tmp_path: Path, tokenizer: Any) -> None:
    def stream() -> Iterator[dict[str, str]]:
        for row in endless():
            yield row
            yield {**row, "rejected": row["chosen"]}

    trainer = tiny_trainer(tmp_path, tokenizer, rows=stream(), per_device_train_batch_size=8, max_steps=2)
    assert len(trainer.train_dataset) == 16


def test_a_stream_that_ends_early_is_used_to_its_end(tmp_path: Path, tokenizer: Any) -> None:
    trainer = tiny_trainer(tmp_path, tokenizer, rows=iter(preference_rows(5)), per_device_train_batch_size=4)
    assert len(trainer.train_dataset) == 5 and trainer.train().global_step == 3
    rows = ({"prompt": "The river", "completion": f" is {number}."} for number in itertools.count())
    assert len(sft(tmp_path, tokenizer, rows, per_device_train_batch_size=4).train_dataset) == 8


def test_a_stream_without_max_steps_is_one_message(tmp_path: Path, tokenizer: Any) -> None:
    stream = datasets.IterableDataset.from_generator(endless)
    with pytest.raises(
        UserError, match=r"train_dataset is a stream of unknown length \(IterableDataset\): set max_steps"
    ):
        tiny_trainer(tmp_path, tokenizer, rows=stream, max_steps=-1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("pairs.jsonl", r"train_dataset is the text 'pairs\.jsonl': pass the rows themselves"),
        (Path("pairs.jsonl"), r"train_dataset is the text 'pairs\.jsonl'"),
        (
            datasets.DatasetDict(
                {"train": datasets.Dataset.from_list([TOKENISED]), "test": datasets.Dataset.from_list([])}
            ),
            r"train_dataset is a DatasetDict of the splits train, test: pass one of them, such as data\['train'\]",
        ),
        (
            {"prompt": ["a"], "chosen": ["b"]},
            r"train_dataset is of type dict, with the keys prompt, chosen: .*from_dict",
        ),
        (datasets.Dataset.from_list([TOKENISED]).to_pandas(), r"train_dataset is a DataFrame: .*from_pandas"),
        (torch.utils.data.DataLoader([1, 2]), "train_dataset is a DataLoader: pass its dataset"),
        (17, "train_dataset is of type int: pass rows"),
    ],
)
def test_what_is_no_dataset_of_rows_is_named(tmp_path: Path, tokenizer: Any, data: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_trainer(tmp_path, tokenizer, rows=data)
    with pytest.raises(UserError, match=message):
        sft(tmp_path, tokenizer, data)
    with pytest.raises(UserError, match=message.replace("train_dataset", r"eval_dataset\['a'\]")):
        tiny_trainer(tmp_path, tokenizer, eval_rows={"a": data})


def test_a_dataset_dict_to_evaluate_on_is_several_datasets(tmp_path: Path, tokenizer: Any) -> None:
    parts = {name: datasets.Dataset.from_list(preference_rows(size)) for name, size in (("near", 3), ("far", 5))}
    data = datasets.DatasetDict(parts)
    trainer = tiny_trainer(tmp_path, tokenizer, eval_rows=data)
    assert set(trainer.evaluate()) >= {"eval_near_loss", "eval_far_loss"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": "x"}, "tokenizer is called processing_class"),
        ({"beta": 0.2}, r"beta is a field of TDPOConfig: pass args=TDPOConfig\(beta=...\)"),
        ({"max_length": 100}, "max_length is a field of TDPOConfig"),
        ({"train_data": []}, r"unknown argument 'train_data'\. Did you mean 'train_dataset'"),
        (
            {"args": TrainingArguments(output_dir="x", use_cpu=True)},
            r"args is a .*TrainingArguments: pass a tdpo\.TDPO",
        ),
        ({"args": {"beta": 0.1}}, r"args is a builtins\.dict"),
        (
            {"processing_class": "gpt2"},
            r"processing_class is the text 'gpt2': .*AutoTokenizer.from_pretrained\('gpt2'\)",
        ),
        ({"model": Lengths()}, "model is of type Lengths: pass a causal language model, or its name"),
        ({"ref_model": 3}, "ref_model is of type int: pass a causal language model, or its name"),
        *(({name: object()}, f"{name} is not available: ") for name in UNAVAILABLE),
    ],
)
def test_arguments_of_other_trainers_are_refused_by_name(
    tmp_path: Path, tokenizer: Any, arguments: dict[str, Any], message: str
) -> None:
    good = {"args": tiny_config(tmp_path), "train_dataset": preference_rows(), "processing_class": tokenizer}
    model = make_model(len(tokenizer))
    with pytest.raises(UserError, match=message):
        TDPOTrainer(**{"model": model, **good, **arguments})
    if "ref_model" not in arguments:
        good["args"] = SFTConfig(output_dir=str(tmp_path), use_cpu=True)
        with pytest.raises(UserError, match=message.replace("TDPO", "SFT") if "beta" not in arguments else "beta"):
            SFTTrainer(**{"model": model, **good, **arguments})


def test_trls_configuration_is_not_taken_for_ours(tmp_path: Path, tokenizer: Any) -> None:
    trl = pytest.importorskip("trl")
    args = trl.DPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(UserError, match=r"args is a trl\..*DPOConfig: pass a tdpo\.TDPOConfig"):
        TDPOTrainer(make_model(len(tokenizer)), args=args, train_dataset=preference_rows(), processing_class=tokenizer)


def test_every_argument_of_trls_trainer_has_a_verdict() -> None:
    trl = pytest.importorskip("trl")
    known = set(inspect.signature(TDPOTrainer).parameters) | set(UNAVAILABLE)
    assert set(inspect.signature(trl.DPOTrainer).parameters) <= known


def test_a_class_of_optimizer_may_be_given(tmp_path: Path, tokenizer: Any) -> None:
    trainer = TDPOTrainer(
        make_model(len(tokenizer)),
        args=tiny_config(tmp_path, max_steps=1),
        train_dataset=preference_rows(),
        processing_class=tokenizer,
        compute_metrics=None,
        optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.25}),
    )
    trainer.train()
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.25


@pytest.mark.parametrize(
    ("options", "lengths"),
    [
        ({}, (512, 256)),
        ({"max_length": 100}, (100, 50)),
        ({"max_length": 256}, (256, 128)),
        ({"max_length": 400}, (400, 256)),
        ({"max_length": 100, "max_prompt_length": 99}, (100, 99)),
        ({"max_length": 100, "max_prompt_length": None}, (100, 99)),
        ({"max_length": None}, (2**31 - 1, 256)),
        ({"max_length": None, "max_prompt_length": None}, (2**31 - 1, 2**31 - 2)),
    ],
)
def test_a_prompt_length_that_was_not_given_gives_way(tmp_path: Path, options: dict, lengths: tuple[int, int]) -> None:
    found = TDPOConfig(output_dir=str(tmp_path), use_cpu=True, **options).lengths()
    assert (found.max_length, found.max_prompt_length) == lengths


def test_one_that_was_given_does_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--max_length 100 must be larger than --max_prompt_length 256"):
        TDPOConfig(output_dir=str(tmp_path), use_cpu=True, max_length=100, max_prompt_length=256)
    assert SFTConfig(output_dir=str(tmp_path), use_cpu=True, max_length=None).lengths().max_length == 2**31 - 1


def test_without_a_limit_nothing_is_cut(tmp_path: Path, tokenizer: Any) -> None:
    long = {"prompt": "The river is near. " * 7, "chosen": "Yes." * 8, "rejected": "No." * 6}
    trainer = tiny_trainer(tmp_path, tokenizer, rows=[long] * 4, max_length=None, max_prompt_length=None)
    assert not any(trainer.train_dataset.report.truncated.values())
    assert sum(trainer.train_dataset.lengths()) // 4 > 96
    cut = tiny_trainer(tmp_path, tokenizer, rows=[long] * 4, max_length=60, max_prompt_length=None).train_dataset
    assert {len(pair.prompt_ids) + len(pair.chosen_ids) for pair in cut} == {60}


def test_a_term_that_a_subclass_adds_counts_once_however_the_step_is_split(tmp_path: Path, tokenizer: Any) -> None:
    class Decayed(TDPOTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, **kwargs)
            return loss + 0.01 * sum(parameter.square().sum() for parameter in model.parameters())

    ends, losses = [], []
    for micro, steps in ((8, 1), (4, 2), (2, 4), (3, 3)):
        options = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": steps, "optim": "sgd"}
        args = tiny_config(tmp_path, max_steps=2, train_sampling_strategy="sequential", **options)
        model, rows = make_model(len(tokenizer)), preference_rows(8) if micro * steps == 8 else preference_rows(9)
        trainer = Decayed(model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        ends.append(weights(model))
        losses.append(trainer.state.log_history[0]["loss"])
    for end, loss in zip(ends[1:3], losses[1:3], strict=True):
        torch.testing.assert_close(end, ends[0], rtol=1e-4, atol=1e-6)
        assert loss == pytest.approx(losses[0], rel=1e-5)
    assert losses[3] == pytest.approx(losses[0], rel=1e-3)  # one pair more, the term is the same


def test_the_commands_take_a_short_length_alone(tmp_path: Path, model_folder: Path) -> None:
    from tdpo.cli import main

    data = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(4))
    for command in ("train", "sft"):
        words = [command, "--model_name_or_path", model_folder, "--dataset_name", data, "--max_length", 100]
        words += ["--output_dir", tmp_path / command, "--max_steps", 1, "--use_cpu", "--disable_tqdm"]
        assert main([str(word) for word in words]) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": True},
        {"debug": "underflow_overflow"},
        {"prediction_loss_only": True, "eval_accumulation_steps": 1, "eval_strategy": "steps", "eval_steps": 1},
        {"skip_memory_metrics": False},
        {"torch_empty_cache_steps": 1},
        {"enable_jit_checkpoint": True},
        {"do_train": True, "do_eval": True},
        {"include_num_input_tokens_seen": "all"},
        {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 4},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 1, "eval_on_start": True},
        {"save_strategy": "steps", "save_steps": 1, "save_only_model": True, "save_total_limit": 1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_change_no_result_change_none(tmp_path: Path, tokenizer: Any, options: dict[str, Any]) -> None:
    ends = []
    for name, more in (("plain", {}), ("more", options)):
        model, rows = make_model(len(tokenizer)), preference_rows(8)
        args = tiny_config(tmp_path / name, max_steps=2, **more)
        TDPOTrainer(model, None, args, None, rows, rows[:3], tokenizer).train()
        ends.append(weights(model))
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
