"""Sampling: reproducible, greedy results independent of the batch, ended at the end token, no side effects."""

from __future__ import annotations

import math
import threading
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import write_jsonl
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from tdpo import UserError
from tdpo.config.row_spec import RowSpec
from tdpo.evaluate import generate
from tdpo.evaluate.generate import Sampling, sample_ids
from tdpo.evaluate.prompts import read_prompts
from tdpo.models.probe import evaluating

VOCAB, EOS = 19, 3
PROMPTS = [[5, 6, 7, 8, 9], [4], [10, 11], [12, 13, 14], [15, 4]]


def llama(seed: int = 0, spread: float = 0.3) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=spread, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2(seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.3, bos_token_id=EOS,
        eos_token_id=EOS,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def always(token: int) -> LlamaForCausalLM:
    """A model that is sure of one token whatever comes before."""
    model = llama()
    with torch.no_grad():
        model.model.norm.weight.zero_()
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.nn.functional.one_hot(torch.tensor(token), VOCAB).float() * 100)
    return model


def greedy_by_hand(model: torch.nn.Module, prompt: list[int], steps: int) -> list[int]:
    """Argmax decoding without cache, padding or batch."""
    ids = list(prompt)
    for _ in range(steps):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == EOS:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_greedy_equals_decoding_by_hand_in_input_order_whatever_the_batch(make, batch_size):
    model = make()
    sampling = Sampling(max_new_tokens=12, temperature=0, batch_size=batch_size)
    found = sample_ids(model, PROMPTS, sampling, EOS)
    assert [samples[0] for samples in found] == [greedy_by_hand(model, prompt, 12) for prompt in PROMPTS]


def test_a_seed_reproduces_and_another_differs():
    model = llama(spread=0.05)
    draw = [sample_ids(model, PROMPTS, Sampling(max_new_tokens=20, num_samples=3, seed=s), EOS) for s in (1, 1, 2)]
    assert draw[0] == draw[1]
    assert draw[0] != draw[2]
    assert [len(samples) for samples in draw[0]] == [3] * 5
    assert len({tuple(sample) for samples in draw[0] for sample in samples}) > 10


def test_ends_at_the_first_end_token_and_keeps_it():
    model = llama(spread=0.02)  # nearly uniform: the end token comes after 19 tokens on average
    samples = [
        s for found in sample_ids(model, PROMPTS, Sampling(max_new_tokens=30, num_samples=20), EOS) for s in found
    ]
    ended = [s for s in samples if s[-1] == EOS]
    assert 0.6 * len(samples) < len(ended) < len(samples)  # expected 1 - (18/19)^30 = 0.80
    assert all(EOS not in s[:-1] for s in samples)
    assert all(len(s) == 30 for s in samples if s[-1] != EOS)


def test_several_end_tokens_and_none():
    assert sample_ids(always(7), [[4, 5]], Sampling(max_new_tokens=6), [EOS, 7]) == [[[7]]]
    assert sample_ids(always(7), [[4, 5]], Sampling(max_new_tokens=6), EOS) == [[[7] * 6]]
    assert sample_ids(always(EOS), [[4, 5]], Sampling(max_new_tokens=6), None) == [[[EOS] * 6]]


def test_the_checkpoints_own_generation_defaults_change_nothing():
    model = llama(spread=0.02)
    plain = sample_ids(model, PROMPTS, Sampling(max_new_tokens=20, num_samples=4), EOS)
    defaults = GenerationConfig(
        do_sample=True, top_k=1, temperature=0.1, repetition_penalty=5.0, min_p=0.9, max_length=7, eos_token_id=4
    )
    model.generation_config = defaults
    assert sample_ids(model, PROMPTS, Sampling(max_new_tokens=20, num_samples=4), EOS) == plain
    assert model.generation_config is defaults


def test_draws_follow_the_models_distribution_without_a_hidden_top_k():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=80, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=16, initializer_range=1e-4, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    count = 8000
    drawn = sample_ids(model, [[1, 2]], Sampling(max_new_tokens=1, num_samples=count, batch_size=4000), None)[0]
    frequency = torch.bincount(torch.tensor(drawn)[:, 0], minlength=80) / count
    error = math.sqrt(1 / 80 / count)
    assert frequency.min() > 1 / 80 - 5 * error  # transformers' default top_k of 50 would leave 30 tokens at 0
    assert frequency.max() < 1 / 80 + 5 * error


def test_temperature_top_k_and_top_p_narrow_the_draws():
    model = llama(spread=0.3)
    with torch.no_grad():
        ranked = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1].argsort(descending=True).tolist()

    def drawn(**how: float) -> set[int]:
        found = sample_ids(model, PROMPTS[:1], Sampling(max_new_tokens=1, num_samples=400, batch_size=400, **how), EOS)
        return {sample[0] for sample in found[0]}

    assert drawn(top_k=2) == set(ranked[:2])
    assert drawn(temperature=1e-4) == drawn(top_p=1e-6) == set(ranked[:1])
    assert len(drawn()) > 8


def test_random_state_modes_and_gradients_are_left_as_they_were():
    model = llama().train()
    model.model.layers[1].eval()
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    sample_ids(model, PROMPTS, Sampling(max_new_tokens=4), EOS)
    assert torch.equal(torch.rand(4), expected)
    assert [model.training, model.model.layers[0].training, model.model.layers[1].training] == [True, True, False]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_modes_come_back_after_an_exception():
    model = llama().train()
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        assert not model.training
        raise RuntimeError("stop")
    assert model.training


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([[1], []], "prompt 2 has no tokens"), ([[1] * 60], "prompt 1 has 60 tokens; .* exceeds the 64 positions")],
)
def test_refuses_prompts_it_cannot_continue(prompts, message):
    with pytest.raises(UserError, match=message):
        sample_ids(llama(), prompts, Sampling(max_new_tokens=5), EOS)


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"num_samples": 0}, {"batch_size": 0}, {"top_p": 0.0}, {"top_p": 1.5},
              {"temperature": -1.0}, {"top_k": -1}],
)  # fmt: skip
def test_refuses_impossible_options(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))}"):
        Sampling(**wrong)


def test_no_prompts_give_no_samples():
    assert sample_ids(llama(), [], Sampling(), EOS) == []


def test_an_interrupted_draw_continues_with_the_same_responses(tmp_path, monkeypatch):
    model, sampling = llama(spread=0.05), Sampling(max_new_tokens=12, num_samples=3, batch_size=4)
    whole = sample_ids(model, PROMPTS, sampling, EOS)
    kept = replace(sampling, samples_dir=str(tmp_path))
    real, calls = generate._generate, []

    def fails_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(generate, "_generate", fails_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        sample_ids(model, PROMPTS, kept, EOS)
    (path,) = tmp_path.glob("*.jsonl")
    path.write_bytes(path.read_bytes() + b"[[1, 2")  # a batch that was being written
    assert sample_ids(model, PROMPTS, kept, EOS) == whole
    assert len(calls) == 3 + 2
    assert sample_ids(model, PROMPTS, kept, EOS) == whole
    assert len(calls) == 5
    assert sample_ids(llama(1, spread=0.05), PROMPTS, kept, EOS) != whole  # other weights have their own file
    sample_ids(model, PROMPTS, replace(kept, seed=1), EOS)
    assert len(list(tmp_path.glob("*.jsonl"))) == 3
    path.write_text("[[1, 2]]\n")
    with pytest.raises(UserError, match="is damaged; remove it"):
        sample_ids(model, PROMPTS, kept, EOS)


def test_processes_that_draw_the_same_samples_keep_them_once(tmp_path, monkeypatch):
    model, kept = llama(spread=0.05), Sampling(max_new_tokens=4, batch_size=1, samples_dir=str(tmp_path))
    real, waiting = generate._generate, []

    def another_begins(*args):
        if not waiting:
            waiting.append(threading.Thread(target=sample_ids, args=(model, PROMPTS, kept, EOS)))
            waiting[0].start()
            waiting[0].join(0.3)  # it has drawn by then, unless it waits
        return real(*args)

    monkeypatch.setattr(generate, "_generate", another_begins)
    whole = sample_ids(model, PROMPTS, kept, EOS)
    waiting[0].join()
    assert sample_ids(model, PROMPTS, kept, EOS) == whole
    (path,) = tmp_path.glob("*.jsonl")
    assert len(path.read_text().splitlines()) == len(PROMPTS)


def test_a_model_that_diverged_is_sampled():
    model = llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    assert all(1 <= len(ids) <= 3 for (ids,) in sample_ids(model, PROMPTS, Sampling(max_new_tokens=3), EOS))


def test_a_prompt_that_comes_back_later_is_asked_once(tmp_path):
    rows = [{"prompt": f"{name} ", "chosen": "x", "rejected": "y"} for name in "abac"]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    tokeniser = SimpleNamespace(rendering=SimpleNamespace(special_tokens=True))
    asked = read_prompts(str(path), "test", None, RowSpec(), tokeniser)
    assert [turns.prompt for turns in asked] == ["a ", "b ", "c "]


def test_columns_to_ignore_are_ignored_beside_prompts_too(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "Why?"}], "system": "Be terse."}]
    path = write_jsonl(tmp_path / "prompts.jsonl", rows)
    tokeniser = SimpleNamespace(rendering=SimpleNamespace(special_tokens=True))
    (asked,) = read_prompts(str(path), "test", None, RowSpec(), tokeniser)
    assert [message["content"] for message in asked.prompt] == ["Be terse.", "Why?"]
    (asked,) = read_prompts(str(path), "test", None, RowSpec(ignore_columns=("system",)), tokeniser)
    assert [message["content"] for message in asked.prompt] == ["Why?"]
