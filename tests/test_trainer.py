"""Training: the step is the objective's, accumulation equals the large batch, and what is saved is what was trained."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, preference_rows
from tiny_training import tiny_config, tiny_trainer, train_tiny, weights
from transformers import AutoModelForCausalLM, TrainerCallback

import tdpo
from tdpo import TDPOTrainer, UserError
from tdpo.data.dataset import prepare_pairs
from tdpo.data.tokenise import Lengths, Tokeniser
from tdpo.evaluate.preference import evaluate_pairs
from tdpo.models.redirect import run_in_forward
from tdpo.train.step import NonFiniteLoss


@pytest.mark.parametrize("max_grad_norm", [0.0, 1e6])
def test_the_first_step_is_gradient_descent_on_the_loss_written_out(
    tmp_path: Path, tokenizer: Any, max_grad_norm: float
) -> None:
    """One SGD step against another model as reference, so that the KL term has a value and a gradient."""
    start, other = make_model(len(tokenizer)), make_model(len(tokenizer), seed=1)
    fields = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.5, "max_grad_norm": max_grad_norm}
    fields |= {"objective": "tdpo1", "beta": 0.3, "per_device_train_batch_size": 24}
    trainer = train_tiny(tmp_path, tokenizer, copy.deepcopy(start), ref_model=copy.deepcopy(other), **fields)

    def sums(prompt: list[int], response: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes log-ratio and sequential KL(reference || policy) of one response."""
        ids, at = torch.tensor([prompt + response]), slice(len(prompt) - 1, -1)
        logp, ref_logp = start(ids).logits[0, at].log_softmax(-1), other(ids).logits[0, at].log_softmax(-1).detach()
        tokens = torch.tensor(response)[:, None]
        return (logp - ref_logp).gather(1, tokens).sum(), (ref_logp.exp() * (ref_logp - logp)).sum()

    losses = []
    for pair in prepare_pairs(preference_rows(), Tokeniser(tokenizer, Lengths(96, 48))):
        (chosen, chosen_kl), (rejected, rejected_kl) = (
            sums(pair.prompt_ids, ids) for ids in (pair.chosen_ids, pair.rejected_ids)
        )
        losses.append(-torch.nn.functional.logsigmoid(0.3 * (chosen - rejected - (rejected_kl - chosen_kl))))
    loss = torch.stack(losses).mean()
    loss.backward()
    with torch.no_grad():
        for parameter in start.parameters():
            parameter -= 0.5 * parameter.grad
    torch.testing.assert_close(weights(trainer.model), weights(start), rtol=1e-4, atol=1e-5)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "tdpo1", "tdpo2"])
@pytest.mark.parametrize(("micro", "steps"), [(4, 2), (2, 4)])
def test_accumulation_equals_the_large_batch(
    tmp_path: Path, tokenizer: Any, objective: str, micro: int, steps: int
) -> None:
    options = {"objective": objective, "train_sampling_strategy": "sequential", "optim": "sgd", "learning_rate": 0.1}
    whole = train_tiny(tmp_path / "whole", tokenizer, **options)
    parts = train_tiny(
        tmp_path / "parts", tokenizer, per_device_train_batch_size=micro, gradient_accumulation_steps=steps, **options
    )
    torch.testing.assert_close(weights(parts.model), weights(whole.model), rtol=1e-4, atol=1e-6)
    for ours, theirs in zip(parts.state.log_history[:3], whole.state.log_history[:3], strict=True):
        for name in (
            "loss",
            "grad_norm",
            "rewards/margins",
            "implicit_rewards/chosen",
            "kl/rejected",
            "kl_per_token/chosen",
        ):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), name


def test_a_short_last_accumulation_still_averages_over_its_own_pairs(tmp_path: Path, tokenizer: Any) -> None:
    """20 pairs in micro-batches of 8: the last step holds 4 pairs, not a fraction of a full one."""
    rows = preference_rows(20)
    options = {"max_steps": -1, "num_train_epochs": 1, "train_sampling_strategy": "sequential", "optim": "sgd"}
    histories = []
    for name, extra in (("a", {"gradient_accumulation_steps": 2}), ("b", {"per_device_train_batch_size": 16})):
        args = tiny_config(tmp_path / name, **{**options, **extra})
        model = make_model(len(tokenizer))
        trainer = TDPOTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        histories.append((weights(model), [log["loss"] for log in trainer.state.log_history if "loss" in log]))
    torch.testing.assert_close(histories[0][0], histories[1][0], rtol=1e-4, atol=1e-6)
    assert histories[0][1] == pytest.approx(histories[1][1], rel=1e-5)
    assert len(histories[0][1]) == 2


def test_training_learns_and_the_saved_folder_reproduces_its_evaluation(tmp_path: Path, tokenizer: Any) -> None:
    start = make_model(len(tokenizer))
    reference = copy.deepcopy(start)
    args = tiny_config(tmp_path / "out", max_steps=12, eval_strategy="steps", eval_steps=12, eval_on_start=True)
    rows = preference_rows()
    trainer = TDPOTrainer(start, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
    trainer.train()
    history = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert history[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert history[0]["eval_kl/chosen"] == 0 and history[0]["eval_rewards/accuracies"] == 0.5
    assert history[-1]["eval_loss"] < 0.4 and history[-1]["eval_implicit_rewards/accuracies"] == 1.0
    metrics = trainer.evaluate()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    pairs = prepare_pairs(rows, Tokeniser(tokenizer, Lengths(96, 48)))
    again = evaluate_pairs(loaded, reference, pairs, tdpo.objectives.tdpo2(0.1, 0.5), batch_size=5)
    for name, value in again.items():
        if f"eval_{name}" in metrics:
            assert value == pytest.approx(metrics[f"eval_{name}"], rel=1e-4, abs=1e-5), name
    assert {f"eval_{n}" for n in again} - set(metrics) == {
        "eval_pairs",
        "eval_rewards/accuracies_stderr",
        "eval_implicit_rewards/accuracies_stderr",
    }


def test_metrics_carry_trls_names_in_training_and_evaluation(tmp_path: Path, tokenizer: Any) -> None:
    trainer = train_tiny(tmp_path, tokenizer, max_steps=1)
    parts = {
        **dict.fromkeys(("rewards", "implicit_rewards"), ("chosen", "rejected", "accuracies", "margins")),
        **dict.fromkeys(("kl", "kl_per_token"), ("chosen", "rejected", "margin")),
        "logps": ("chosen", "rejected"),
    }
    wanted = {f"{name}/{part}" for name, each in parts.items() for part in each}
    assert wanted <= set(trainer.state.log_history[0])
    assert {f"eval_{name}" for name in wanted} <= set(trainer.evaluate(trainer.train_dataset))


def test_the_reference_is_the_policy_as_handed_over_and_never_moves(tmp_path: Path, tokenizer: Any) -> None:
    start = make_model(len(tokenizer))
    with torch.no_grad():
        start.lm_head.weight.mul_(1.5)  # differs from anything a name could reload
    before = weights(start).clone()
    trainer = train_tiny(tmp_path, tokenizer, start)
    assert torch.equal(weights(trainer.reference.model), before)
    assert not torch.equal(weights(trainer.model), before)
    assert not any(p.requires_grad for p in trainer.reference.model.parameters())


def test_a_reference_of_ones_own_is_used(tmp_path: Path, tokenizer: Any) -> None:
    other = make_model(len(tokenizer), seed=1)
    args = tiny_config(tmp_path, max_steps=1)
    trainer = TDPOTrainer(make_model(len(tokenizer)), other, args, None, preference_rows(), None, tokenizer)
    trainer.train()
    assert trainer.state.log_history[0]["kl/chosen"] > 0.1


def test_dropout_is_off_by_default_and_can_be_kept(tmp_path: Path, tokenizer: Any) -> None:
    def model() -> Any:
        made = make_model(len(tokenizer))
        made.model.layers[0].self_attn.attention_dropout = 0.5
        return made

    assert train_tiny(tmp_path / "a", tokenizer, model(), max_steps=1).state.log_history[0]["kl/chosen"] == 0
    kept = train_tiny(tmp_path / "b", tokenizer, model(), max_steps=1, disable_dropout=False)
    assert kept.state.log_history[0]["kl/chosen"] > 0


def test_resuming_from_a_checkpoint_gives_the_uninterrupted_weights(tmp_path: Path, tokenizer: Any) -> None:
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole = train_tiny(tmp_path / "whole", tokenizer, **options)
    args = tiny_config(tmp_path / "whole", **options)
    again = TDPOTrainer(
        make_model(len(tokenizer)), args=args, train_dataset=preference_rows(), processing_class=tokenizer
    )
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(weights(again.model), weights(whole.model))


def test_rmsprop_is_selectable(tmp_path: Path, tokenizer: Any) -> None:
    trainer = train_tiny(tmp_path, tokenizer, optim="rmsprop", max_steps=1)
    assert isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), torch.optim.RMSprop)


def test_an_adapter_trains_against_the_model_without_it(tmp_path: Path, tokenizer: Any) -> None:
    from peft import LoraConfig, PromptTuningConfig

    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    rows, args = preference_rows(), tiny_config(tmp_path, max_steps=6)
    start = make_model(len(tokenizer))
    frozen = weights(start).clone()
    trainer = TDPOTrainer(
        start, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer, peft_config=lora
    )
    assert trainer.reference_line.startswith("reference: adapter_off (the adapter is new")
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before["eval_loss"] - 0.01
    base = [p for n, p in trainer.model.named_parameters() if "lora" not in n]
    assert torch.equal(torch.cat([p.detach().flatten() for p in base]), frozen)
    trainer.save_model()
    assert (tmp_path / "adapter_model.safetensors").is_file()
    with pytest.raises(UserError, match="PromptTuningConfig changes the prompt"):
        tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        TDPOTrainer(make_model(len(tokenizer)), None, args, None, rows, None, tokenizer, peft_config=tuning)
    with pytest.raises(UserError, match=r"must be a peft.PeftConfig such as LoraConfig, found dict"):
        TDPOTrainer(make_model(len(tokenizer)), None, args, None, rows, None, tokenizer, peft_config={"r": 4})


def test_data_may_be_a_dataset_records_or_tokenised_pairs(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    rows = preference_rows()
    records = [tdpo.PreferenceRecord(**row) for row in rows]
    pairs = prepare_pairs(rows, Tokeniser(tokenizer, Lengths(96, 48)))
    columns = [{"prompt_ids": p.prompt_ids, "chosen_ids": p.chosen_ids, "rejected_ids": p.rejected_ids} for p in pairs]
    ends = []
    for number, data in enumerate((rows, datasets.Dataset.from_list(rows), records, pairs, columns)):
        model = make_model(len(tokenizer))
        tiny_trainer(tmp_path / str(number), tokenizer, model, rows=data).train()
        ends.append(weights(model))
    for end in ends[1:]:
        assert torch.equal(end, ends[0])


def test_several_evaluation_sets_are_reported_by_name(tmp_path: Path, tokenizer: Any) -> None:
    rows = preference_rows()
    sets = {"first": rows[:12], "second": rows[12:]}
    other = make_model(len(tokenizer), seed=1)
    trainer = tiny_trainer(tmp_path, tokenizer, ref_model=other, rows=rows, eval_rows=sets)
    metrics = trainer.evaluate()
    assert metrics["eval_first_kl/chosen"] != metrics["eval_second_kl/chosen"]


class Poison(TrainerCallback):
    """Calls ``spoil(model)`` at one moment of the second step, and keeps the weights of before."""

    def __init__(self, moment: str, spoil: Callable[[Any], object]) -> None:
        self.spoil = spoil
        setattr(self, moment, self._act)

    def _act(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.before = weights(model).clone()
            self.spoil(model)


NAN_IN_REFERENCE, INFINITE_GRADIENT = "the loss is nan", r"the gradient is (nan|inf)"


@pytest.mark.parametrize(
    ("moment", "what", "rows", "options"),
    [
        ("on_step_begin", NAN_IN_REFERENCE, "3, 4", {}),
        ("on_step_begin", INFINITE_GRADIENT, "3, 4", {}),
        # The step of rows 5 to 8 has two micro-batches; only the second one meets a NaN.
        *(
            (
                "on_substep_end",
                NAN_IN_REFERENCE,
                "[5-8], [5-8]",
                {"gradient_accumulation_steps": 2, "max_grad_norm": norm},
            )
            for norm in (1.0, 0.0)
        ),
    ],
)
def test_what_is_not_finite_stops_names_the_rows_and_updates_nothing(
    tmp_path: Path, tokenizer: Any, moment: str, what: str, rows: str, options: dict[str, Any]
) -> None:
    def spoil(model: Any) -> None:
        if what == NAN_IN_REFERENCE:
            trainer.reference.model.lm_head.weight.data[5, 0] = float("nan")
        else:
            next(model.parameters()).register_hook(lambda gradient: gradient * float("inf"))

    poison = Poison(moment, spoil)
    fields = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 2, **options}
    trainer = tiny_trainer(tmp_path, tokenizer, callbacks=[poison], **fields)
    with pytest.raises(NonFiniteLoss, match=rf"{what} at step 2, in the pairs of rows {rows}\. The weights"):
        trainer.train()
    assert torch.equal(weights(trainer.model), poison.before)


def test_dropped_rows_are_logged(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = preference_rows(4)
    rows[2]["rejected"] = rows[2]["chosen"]
    with caplog.at_level(logging.WARNING, logger="tdpo"):
        tiny_trainer(tmp_path, tokenizer, rows=rows)
    assert [r.message for r in caplog.records] == ["train: dropped 1, chosen and rejected are identical: row 3"]


def test_rows_handed_to_evaluate_may_be_raw(tmp_path: Path, tokenizer: Any) -> None:
    trainer = tiny_trainer(tmp_path, tokenizer)
    assert trainer.evaluate(preference_rows(3))["eval_kl/chosen"] == 0


def test_a_reference_that_shares_the_policys_weights_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    base = make_model(len(tokenizer))
    policy = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="policy and reference share weights"):
        tiny_trainer(tmp_path, tokenizer, policy, ref_model=base)


def test_training_twice_and_in_bfloat16_leaves_a_model_that_can_be_trained_again(
    tmp_path: Path, tokenizer: Any
) -> None:
    model = make_model(len(tokenizer))
    for number in range(2):
        args = tiny_config(tmp_path / str(number), bf16=True, max_steps=1)
        trainer = TDPOTrainer(model, None, args, None, preference_rows(), None, tokenizer)
        trainer.train()
        trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    assert math.isfinite(trainer.state.log_history[0]["loss"])


def test_displacement_is_warned_of_once(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A chosen response that begins the rejected one falls with it."""
    rows = [{"prompt": f"The {i}", "chosen": " engine", "rejected": " engine" * 5} for i in range(8)]
    args = tiny_config(tmp_path, max_steps=8, objective="dpo", beta=1.0, learning_rate=3e-3)
    with caplog.at_level(logging.WARNING, logger="tdpo"):
        trainer = TDPOTrainer(make_model(len(tokenizer)), None, args, None, rows, None, tokenizer)
        trainer.train()
    warnings = [record.message for record in caplog.records if "likelihood displacement" in record.message]
    assert len(warnings) == 1
    fell = trainer.state.log_history[3]
    assert f"{fell['implicit_rewards/chosen']:.3g} and {fell['implicit_rewards/rejected']:.3g}" in warnings[0]
    assert fell["implicit_rewards/margins"] > 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "dpo", "alpha": 0.5}, "--alpha 0.5 contradicts --objective dpo"),
        ({"objective": "ppo"}, "unknown objective 'ppo'; there are: dpo, tdpo1, tdpo2"),
        ({"beta": -1.0}, "beta must be a positive number"),
        ({"max_length": 10, "max_prompt_length": 10}, "--max_length 10 must be larger"),
        ({"truncation_mode": "middle"}, "--truncation_mode middle: there are keep_end, keep_start"),
        ({"label_smoothing_factor": 0.1}, "--label_smoothing_factor has no effect"),
        ({"remove_unused_columns": True}, "--remove_unused_columns cannot be on"),
        ({"train_sampling_strategy": "group_by_length"}, "--train_sampling_strategy group_by_length"),
    ],
)
def test_options_that_contradict_are_refused_at_once(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny_config(tmp_path, **options)


def test_models_and_data_that_do_not_fit_are_refused_before_the_first_step(tmp_path: Path, tokenizer: Any) -> None:
    args, rows, model = tiny_config(tmp_path), preference_rows(), make_model(len(tokenizer))
    with pytest.raises(UserError, match=r"the policy's vocabulary has \d+ entries, the reference's 50"):
        TDPOTrainer(model, make_model(50), args, None, rows, None, tokenizer)
    with pytest.raises(UserError, match="model and ref_model are one object"):
        TDPOTrainer(model, model, args, None, rows, None, tokenizer)
    big = [tdpo.TokenisedPair([1], [2], [999_999], row=4)]
    with pytest.raises(UserError, match="row 4: token id 999999 is outside the model's vocabulary"):
        TDPOTrainer(model, None, args, None, big, None, tokenizer)
    long = [tdpo.TokenisedPair([1] * 120, [2], [3] * 20, row=5)]
    with pytest.raises(UserError, match="row 5: 140 tokens, but the model has 128 positions"):
        TDPOTrainer(model, None, args, None, long, None, tokenizer)


def test_code_runs_inside_the_forward_and_copies_run_in_themselves(tokenizer: Any) -> None:
    model = make_model(len(tokenizer))
    wrapped = torch.nn.Sequential()
    wrapped.forward = lambda **kwargs: model(**kwargs)
    assert run_in_forward(wrapped, model, lambda lm: lm is model)
    copied = copy.deepcopy(model)
    assert run_in_forward(copied, copied, lambda lm: lm is copied)
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(input_ids=ids).logits, type(model).forward(model, input_ids=ids).logits)
