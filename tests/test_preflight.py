"""What can only fail at the end of a run is tried before its first step; the saved model ends where responses do."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import END, make_model, make_tokenizer, preference_rows, write_jsonl
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_training import tiny_config, tiny_trainer, weights
from transformers import AutoModelForCausalLM, GenerationConfig

from tdpo import SFTConfig, SFTTrainer, UserError
from tdpo.cli import main
from tdpo.models.generation import repair_generation_config

LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
TURN_END = "<|im_end|>"


def contradicting(vocab_size: int) -> Any:
    model = make_model(vocab_size)
    model.generation_config.temperature, model.generation_config.top_p = 0.9, 0.6
    model.generation_config.length_penalty = 2.0
    return model


def warnings_with(caplog: pytest.LogCaptureFixture, words: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if words in record.getMessage()]


@pytest.mark.parametrize("kind", ["train", "sft", "checkpoint"])
def test_a_generation_config_that_cannot_be_saved_is_repaired_before_training(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    model = contradicting(len(tokenizer))
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.validate(strict=True)
    with caplog.at_level(logging.WARNING, logger="tdpo"):
        if kind == "sft":
            args = SFTConfig(output_dir=str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True, save_strategy="no")
            rows = [{"prompt": "The river", "completion": " is near."}] * 8
            made: Any = SFTTrainer(model, args, rows, processing_class=tokenizer)
        else:
            made = tiny_trainer(
                tmp_path, tokenizer, model, max_steps=1, save_strategy="steps" if kind != "train" else "no"
            )
    assert len(warnings_with(caplog, "temperature=0.9, top_p=0.6, length_penalty=2.0")) == 1
    made.train()
    made.save_model()
    folder = tmp_path / "checkpoint-1" if kind == "checkpoint" else tmp_path
    saved = GenerationConfig.from_pretrained(folder)
    assert saved.temperature in (None, 1.0) and saved.length_penalty in (None, 1.0) and not saved.do_sample


def test_a_generation_config_that_no_reset_repairs_is_an_error(tokenizer: Any) -> None:
    model = make_model(len(tokenizer))
    model.generation_config.num_return_sequences = 3
    with pytest.raises(UserError, match="cannot be saved; correct it before training: Greedy methods"):
        repair_generation_config(model)


def test_a_sound_generation_config_stays_as_it_is(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = make_model(len(tokenizer))
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.9
    before = model.generation_config.to_dict()
    repair_generation_config(model)
    assert model.generation_config.to_dict() == before and not caplog.records


def test_merging_repairs_it_too(tmp_path: Path, tokenizer: Any) -> None:
    base = tmp_path / "base"
    make_model(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    content = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**content, "do_sample": False, "temperature": 0.9}))
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LORA)
    adapted.generation_config.eos_token_id = [0, 7]  # changed since it was loaded: saving is strict
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.generation_config.temperature = 1.0
    adapted.generation_config.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    words = ["merge", "--model_name_or_path", tmp_path / "adapter", "--output_dir", tmp_path / "merged"]
    assert main([str(word) for word in words]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [0, 7]


def test_whatever_cannot_be_saved_is_named_before_training(tmp_path: Path, tokenizer: Any) -> None:
    class Broken(type(tokenizer)):
        def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no such converter")

    broken = copy.deepcopy(tokenizer)
    broken.__class__ = Broken
    with pytest.raises(UserError, match="Broken cannot be saved, so the trained model could not be: no such converter"):
        tiny_trainer(tmp_path, broken)
    model = make_model(len(tokenizer))
    model.config.note = object()
    with pytest.raises(UserError, match="the model's config cannot be saved"):
        tiny_trainer(tmp_path, tokenizer, model)
    model = make_model(len(tokenizer))
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    with pytest.raises(UserError, match=r"the model cannot be saved.*layers\.1\.mlp\.up_proj"):
        tiny_trainer(tmp_path, tokenizer, model)


@pytest.mark.parametrize("batch", [25, 64])
def test_a_batch_larger_than_the_data_is_refused_under_drop_last(tmp_path: Path, tokenizer: Any, batch: int) -> None:
    with pytest.raises(UserError, match=rf"a batch of {batch} takes {batch} rows, and there are 24"):
        tiny_trainer(tmp_path, tokenizer, dataloader_drop_last=True, per_device_train_batch_size=batch)
    assert (
        tiny_trainer(tmp_path, tokenizer, dataloader_drop_last=True, per_device_train_batch_size=24).train().global_step
    )


def test_a_step_larger_than_the_data_still_trains_under_drop_last(tmp_path: Path, tokenizer: Any) -> None:
    options = {"gradient_accumulation_steps": 8, "max_steps": -1, "num_train_epochs": 1}
    made = tiny_trainer(tmp_path, tokenizer, dataloader_drop_last=True, per_device_train_batch_size=10, **options)
    before = weights(made.model).clone()
    assert made.train().global_step == 1
    assert not torch.equal(weights(made.model), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_steps": 0}, "--max_steps 0 trains nothing"),
        ({"max_steps": -1, "num_train_epochs": 0}, "--num_train_epochs 0 trains nothing"),
        ({"max_steps": -1, "num_train_epochs": -2.5}, "--num_train_epochs -2.5 trains nothing"),
    ],
)
def test_no_steps_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, **options)


def test_a_model_or_an_optimizer_that_trains_nothing_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no parameter of the model takes a gradient"):
        tiny_trainer(tmp_path, tokenizer, make_model(len(tokenizer)).requires_grad_(False))
    other = torch.optim.SGD(make_model(len(tokenizer)).parameters(), lr=0.1)
    with pytest.raises(UserError, match="the optimizer has no parameter of the model"):
        tiny_trainer(tmp_path, tokenizer, optimizers=(other, None))


def test_a_metric_that_no_evaluation_reports_is_named_before_training(tmp_path: Path, tokenizer: Any) -> None:
    options = {"eval_strategy": "steps", "eval_steps": 2, "greater_is_better": True}
    with pytest.raises(
        UserError, match=r"rewards/accuracy: no such metric. Did you mean 'rewards/accuracies'.*eval_loss, "
    ):
        tiny_trainer(
            tmp_path, tokenizer, eval_rows=preference_rows(4), metric_for_best_model="rewards/accuracy", **options
        )
    sets = {"near": preference_rows(4), "far": preference_rows(6)}
    with pytest.raises(UserError, match="There are eval_near_loss"):
        tiny_trainer(tmp_path, tokenizer, eval_rows=sets, metric_for_best_model="loss", **options)
    made = tiny_trainer(tmp_path, tokenizer, eval_rows=sets, metric_for_best_model="far_rewards/margins", **options)
    made.train()
    assert made.state.best_metric == made.state.log_history[-2]["eval_far_rewards/margins"]
    reported = {name.removeprefix("eval_") for name in made.evaluate(preference_rows(4))}
    assert set(made.metric_names()) <= reported


def test_an_evaluation_without_data_is_refused_before_anything_is_loaded(
    tmp_path: Path, tokenizer: Any, pairs_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"--eval_strategy epoch needs held-out data.*--eval_dataset_name"):
        tiny_trainer(tmp_path, tokenizer, eval_strategy="epoch")
    with pytest.raises(UserError, match="--eval_on_start needs held-out data"):
        tiny_trainer(tmp_path, tokenizer, eval_on_start=True)
    words = ["--model_name_or_path", "no/such-model", "--dataset_name", str(pairs_file), "--output_dir", str(tmp_path)]
    for command in ("train", "sft"):
        assert main([command, *words, "--eval_strategy", "steps"]) == 2
        assert "--eval_strategy steps needs held-out data: name it with --eval_dataset_name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["default", "mine"])
def test_the_best_model_is_found_again_also_of_a_named_adapter(tmp_path: Path, tokenizer: Any, name: str) -> None:
    model = get_peft_model(make_model(len(tokenizer)), LORA, adapter_name=name)
    options = {
        "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 3,
        "load_best_model_at_end": True, "metric_for_best_model": "logps/chosen", "greater_is_better": False,
        "objective": "dpo", "learning_rate": 0.1, "save_total_limit": 3,
    }  # fmt: skip
    made = tiny_trainer(tmp_path, tokenizer, model, eval_rows=preference_rows(6), **options)
    made.train()
    measured = [log["eval_logps/chosen"] for log in made.state.log_history if "eval_logps/chosen" in log]
    assert abs(measured[-1] - min(measured)) > 1e-3, "the last must not be the best, or the test shows nothing"
    assert made.evaluate()["eval_logps/chosen"] == pytest.approx(min(measured), rel=1e-5)


def chatty() -> tuple[Any, list[dict[str, str]]]:
    """A tokenizer whose chat template ends turns with a token that is not its own end of sequence."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", TURN_END]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows = preference_rows(8)
    return tokenizer, [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }
        for row in rows
    ]


@pytest.mark.parametrize("kind", ["pairs", "sft", "tokenised"])
def test_the_saved_model_ends_where_the_responses_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    tokenizer, rows = chatty()
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    model = make_model(len(tokenizer))
    options: dict[str, Any] = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    with caplog.at_level(logging.WARNING, logger="tdpo"):
        if kind == "sft":
            args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, max_length=96, **options)
            made: Any = SFTTrainer(model, args, rows, processing_class=tokenizer)
        else:
            ids = {"prompt_ids": [5, 6], "chosen_ids": [7, end], "rejected_ids": [8, 9, end]}
            data: Any = [ids] * 4 if kind == "tokenised" else rows
            made = tiny_trainer(tmp_path, tokenizer, model, rows=data, **options)
    assert (
        len(
            warnings_with(
                caplog, f"responses end with {TURN_END} ({end}), which is not among the model's end tokens [0]"
            )
        )
        == 1
    )
    made.train()
    made.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert GenerationConfig.from_pretrained(folder).eos_token_id == [0, end]


def test_an_adapter_carries_its_end_token_to_the_merged_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer, rows = chatty()
    end = tokenizer.convert_tokens_to_ids(TURN_END)
    base = tmp_path / "base"
    make_model(len(tokenizer)).save_pretrained(base)
    tokenizer.save_pretrained(base)
    data = write_jsonl(tmp_path / "pairs.jsonl", rows)
    words = ["train", "--model_name_or_path", base, "--dataset_name", data, "--output_dir", tmp_path / "out"]
    words += ["--max_steps", 1, "--use_peft", "--use_cpu", "--disable_tqdm", "--max_length", 96]
    assert main([str(word) for word in words]) == 0
    merge = ["merge", "--model_name_or_path", tmp_path / "out", "--output_dir", tmp_path / "merged"]
    assert main([str(word) for word in merge]) == 0
    assert GenerationConfig.from_pretrained(tmp_path / "merged").eos_token_id == [0, end]
    assert not (tmp_path / "out" / "config.json").exists()


def test_words_and_known_ends_add_no_end_token(
    tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    word = tokenizer.convert_tokens_to_ids("e")
    ends = {"a word, as of truncated responses": word, "the end token": tokenizer.convert_tokens_to_ids(END)}
    for ends_with in ends.values():
        rows = [{"prompt_ids": [5], "chosen_ids": [7, ends_with], "rejected_ids": [8, ends_with]}] * 4
        model = make_model(len(tokenizer))
        tiny_trainer(tmp_path, tokenizer, model, rows=rows)
        assert model.generation_config.eos_token_id == 0
    assert not warnings_with(caplog, "responses end with")


def test_a_trained_adapter_loads_with_the_base_as_before(tmp_path: Path, tokenizer: Any) -> None:
    """The generation config beside an adapter changes nothing for peft."""
    made = tiny_trainer(tmp_path, tokenizer, get_peft_model(make_model(len(tokenizer)), LORA), max_steps=1)
    made.train()
    made.save_model()
    again = PeftModel.from_pretrained(make_model(len(tokenizer)), tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(input_ids=ids).logits, made.model.eval()(input_ids=ids).logits)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match=r"taken: cannot be written: File exists"):
        tiny_trainer(tmp_path / "taken", tokenizer)
