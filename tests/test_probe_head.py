"""The head is proven by what it receives and gives, and a proof holds for the state it was made in."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from conftest import make_model, preference_rows
from numeric_worlds import assert_same_gradients, gradients, moved, plain_pair_loss, plain_pair_stats, random_pairs
from numeric_worlds import tiny_llama as llama
from test_architectures import LLAMA_LIKE
from tiny_training import tiny_config, tiny_trainer
from torch import Tensor, nn

from tdpo import SFTConfig, SFTTrainer, TDPOTrainer, UserError, objectives, score_pairs
from tdpo.config import ModelConfig
from tdpo.models.load import load_model
from tdpo.models.policy import head_of, prove_head

VOCAB = 53


class Between(hf.LlamaForCausalLM):
    """A Llama that does something to its states between body and head."""

    between: Any = staticmethod(lambda states: states)

    def forward(self, input_ids: Tensor, use_cache: bool = False, **kwargs: Any) -> Any:
        states = self.model(input_ids=input_ids, use_cache=use_cache, **kwargs).last_hidden_state
        return hf.modeling_outputs.CausalLMOutputWithPast(logits=self.lm_head(self.between(states)))


def between(change: Any, dtype: torch.dtype = torch.float64, **config: Any) -> Between:
    torch.manual_seed(0)
    model = Between(hf.LlamaConfig(**LLAMA_LIKE))
    for name, value in config.items():
        setattr(model.config, name, value)
    model.between = change
    return model.to(dtype).eval()


def with_bias() -> Between:
    model = between(lambda states: states / 3.2)
    own = model.lm_head
    model.lm_head = nn.Linear(own.in_features, own.out_features, dtype=torch.float64)
    return model


def minicpm3() -> Any:
    torch.manual_seed(0)
    config = hf.MiniCPM3Config(
        **{**LLAMA_LIKE, "num_key_value_heads": 2}, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8,
        qk_rope_head_dim=4, v_head_dim=8, dim_model_base=5,
    )  # fmt: skip
    return hf.MiniCPM3ForCausalLM(config).double().eval()


DIVIDING = {
    "minicpm3": (minicpm3, 1 / 3.2),
    "a factor the config does not name": (lambda: between(lambda states: 0.37 * states), 0.37),
    "a divisor under any name": (lambda: between(lambda states: states / 7.0, some_width_ratio=7.0), 1 / 7),
    "a bias behind it": (with_bias, 1 / 3.2),
}


@pytest.mark.parametrize("backend", ["auto", "naive"])
@pytest.mark.parametrize("what", DIVIDING)
def test_a_constant_between_body_and_head_is_measured(what: str, backend: Any) -> None:
    make, factor = DIVIDING[what]
    reference = make()
    assert head_of(reference).scale == pytest.approx(factor, rel=1e-7)
    policy, pairs = moved(reference), random_pairs(seed=4, count=3, vocab=VOCAB, longest=8)
    scores = score_pairs(policy, reference, pairs, objectives.tdpo1(0.3), backend=backend)
    plain = plain_pair_stats(policy, reference, pairs)
    assert plain.chosen_kl.min() > 1e-5
    for column in ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"):
        torch.testing.assert_close(getattr(scores.stats, column), getattr(plain, column), rtol=1e-6, atol=1e-8)
    theirs = gradients(plain_pair_loss("tdpo1", plain, 0.3).sum(), policy)
    assert_same_gradients(gradients(scores.loss.sum(), policy), theirs, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_in_few_bits_the_configs_number_is_taken(dtype: torch.dtype) -> None:
    assert head_of(minicpm3().to(dtype)).scale == 1 / 3.2
    plain = between(lambda states: states, dtype, some_number=1.003)
    assert head_of(plain).scale == 1.0


@pytest.mark.parametrize(
    "change",
    [
        torch.tanh,
        lambda states: states / states.norm(dim=-1, keepdim=True),
        lambda states: states + 0.1,
        lambda states: states.flip(-1),
        lambda states: -states,
        lambda states: 0 * states,
    ],
    ids=["tanh", "norm", "constant", "order", "sign", "zero"],
)
def test_any_other_change_between_body_and_head_is_refused(change: Any) -> None:
    with pytest.raises(UserError, match="Between: hidden states times head differ from the model's own logits"):
        prove_head(between(change))


def test_a_proof_is_repeated_when_what_it_depends_on_changed() -> None:
    model, pairs = minicpm3(), random_pairs(vocab=VOCAB)
    assert head_of(model).scale == 1 / 3.2
    model.config.dim_model_base = 8  # logits_scaling is now 16 / 8
    policy = moved(model)
    scores = score_pairs(policy, model, pairs, objectives.dpo(0.3))
    assert head_of(model).scale == 0.5
    plain = plain_pair_stats(policy, model, pairs)
    torch.testing.assert_close(scores.stats.chosen_logratio, plain.chosen_logratio, rtol=1e-7, atol=1e-9)
    llama_model = llama(dtype=torch.float32)
    prove_head(llama_model)
    llama_model.lm_head = nn.Sequential(nn.Linear(16, 50, bias=False), nn.Tanh())
    llama_model.lm_head.weight = llama_model.lm_head[0].weight
    with pytest.raises(UserError, match="differ from the model's own logits"):
        score_pairs(llama_model, llama(), random_pairs(), objectives.dpo(0.3))


# --- what is not a causal language model, and what is wrapped -------------------------------------------------------

SMALL = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def t5() -> Any:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    )


OTHERS = {
    "an encoder and a decoder": t5,
    "a masked language model": lambda: hf.BertForMaskedLM(hf.BertConfig(**SMALL, intermediate_size=16)),
    "another masked language model": lambda: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(vocab_size=VOCAB, dim=16, n_layers=1, n_heads=2, hidden_dim=16)
    ),
    "a body without a head": lambda: hf.LlamaModel(hf.LlamaConfig(**LLAMA_LIKE)),
    "a classifier": lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA_LIKE)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_is_not_a_causal_language_model_is_refused_in_one_message(
    tmp_path: Path, tokenizer: Any, what: str
) -> None:
    torch.manual_seed(0)
    model = OTHERS[what]()
    for use in (
        lambda: score_pairs(model, llama(), random_pairs(), objectives.dpo(0.1)),
        lambda: tiny_trainer(tmp_path, tokenizer, model, rows=preference_rows(4)),
        lambda: tiny_trainer(tmp_path, tokenizer, make_model(VOCAB), ref_model=model, rows=preference_rows(4)),
        lambda: SFTTrainer(model, tiny_config(tmp_path, SFTConfig), preference_rows(4), processing_class=tokenizer),
    ):
        with pytest.raises(UserError, match="is not a causal language model") as error:
            use()
        assert "\n" not in str(error.value)


def test_the_name_of_another_kind_of_model_is_refused_in_one_message(tmp_path: Path) -> None:
    t5().save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match="not a causal language model") as error:
        load_model(ModelConfig(str(tmp_path / "t5")))
    assert "\n" not in str(error.value) and len(str(error.value)) < 250 + len(str(tmp_path))


def in_place(model: Any) -> Any:
    model.compile()
    return model


def test_a_compiled_model_under_an_adapter_is_saved_under_its_own_names(tmp_path: Path, tokenizer: Any) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(torch.compile(make_model(len(tokenizer))), lora)
    trainer = tiny_trainer(tmp_path, tokenizer, model, rows=preference_rows(8))
    assert not any("_orig_mod" in name for name, _ in trainer.model.named_parameters())
    assert trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader()))).item() == pytest.approx(
        math.log(2), abs=1e-6
    )


def test_a_compiled_model_is_trained_as_the_model_inside(tmp_path: Path, tokenizer: Any) -> None:
    trajectories = []
    for wrap in (lambda model: model, torch.compile, in_place):
        args = tiny_config(tmp_path, learning_rate=1e-2)
        trainer = TDPOTrainer(wrap(make_model(len(tokenizer))), None, args, None, preference_rows(8), None, tokenizer)
        trainer.train()
        assert type(trainer.model).__name__ == "LlamaForCausalLM"
        trajectories.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert trajectories[0] == trajectories[1] == trajectories[2] and trajectories[0][0] == pytest.approx(
        math.log(2), abs=1e-6
    )
    model = llama(dtype=torch.float32)
    ours, theirs = (
        score_pairs(policy, reference, random_pairs(), objectives.tdpo1(0.3))
        for policy, reference in (
            (torch.compile(moved(model)), torch.compile(copy.deepcopy(model))),
            (moved(model), model),
        )
    )
    assert torch.equal(ours.loss, theirs.loss)
    SFTTrainer(torch.compile(make_model(len(tokenizer))), tiny_config(tmp_path, SFTConfig), preference_rows(4),
               processing_class=tokenizer).train()  # fmt: skip


def test_a_distributed_wrapper_is_named(tmp_path: Path, tokenizer: Any) -> None:
    wrapped = nn.DataParallel(make_model(len(tokenizer)))
    with pytest.raises(UserError, match=r"wrapped in DataParallel; pass the LlamaForCausalLM inside it"):
        tiny_trainer(tmp_path, tokenizer, wrapped, rows=preference_rows(4))
    with pytest.raises(UserError, match="wrapped in DataParallel"):
        score_pairs(wrapped, make_model(VOCAB), random_pairs(), objectives.dpo(0.1))
