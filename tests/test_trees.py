"""Trees equal separate sequences, values and gradients, on every architecture, or the probe refuses them."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from numeric_worlds import assert_same_gradients, gradients, moved, random_pairs, tiny_llama
from test_architectures import CONFIGS, LLAMA_LIKE, VOCAB, build
from tiny_training import train_tiny, weights
from torch import nn

from tdpo import TokenisedPair, UserError, objectives, score_pairs
from tdpo.data.pack import pack_padded, pack_trees
from tdpo.models import trees
from tdpo.models.trees import tree_plan, tree_states
from tdpo.score import packer

TAKEN = [
    "gpt2", "llama", "gpt_neox", "qwen3", "gemma2", "gemma3", "phi", "gptj", "opt", "opt_projected", "mixtral",
    "qwen3_moe", "cohere", "granite", "hyperclovax",
]  # fmt: skip
REFUSED = [name for name in CONFIGS if name not in TAKEN]
WINDOWED: dict[str, Any] = {
    "mistral": lambda: hf.MistralConfig(**LLAMA_LIKE, sliding_window=4),
    "mixtral": lambda: hf.MixtralConfig(**LLAMA_LIKE, sliding_window=4, num_local_experts=3, num_experts_per_tok=2),
    "qwen2": lambda: hf.Qwen2Config(**LLAMA_LIKE, sliding_window=4, use_sliding_window=True, max_window_layers=1),
}


# --- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0, 30, 1000])
@pytest.mark.parametrize("seed", range(6))
def test_every_response_token_sees_its_own_sequence_so_far_and_nothing_else(seed: int, capacity: int) -> None:
    pairs = random_pairs(seed, count=7, vocab=10_000)
    batch = pack_trees(pairs, capacity)
    seen, flat = batch.attends(), batch.input_ids.flatten()
    width = batch.input_ids.shape[1]
    start = 0
    for pair in pairs:
        for response in (pair.chosen_ids, pair.rejected_ids):
            for offset, token in enumerate(response):
                place = int(batch.source_index[start + offset])
                row, column = divmod(place, width)
                past = flat[row * width : (row + 1) * width][seen[row, column]].tolist()
                assert past == [*pair.prompt_ids, *response[:offset]]
                assert int(batch.labels[start + offset]) == token
                assert batch.position_ids[row, column] == len(past) - 1
            start += len(response)
    assert batch.lengths == tuple(len(ids) for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids))
    assert torch.equal(batch.sequence_ids, pack_padded(pairs).sequence_ids)
    assert torch.equal(batch.labels, pack_padded(pairs).labels)


def test_rows_hold_no_more_than_the_capacity_and_waste_little() -> None:
    pairs = [TokenisedPair([1] * n, [2, 3], [4]) for n in (30, 20, 9, 9, 9, 9, 8, 3)]
    batch = pack_trees(pairs, capacity=41)
    lengths = (batch.tree_ids >= 0).sum(1).tolist()
    assert max(lengths) <= 41 and len(lengths) == 3
    assert pack_trees(pairs).input_ids.shape[1] == 31, "without a capacity the longest tree decides"
    assert sum(lengths) == sum(len(p.prompt_ids) + 1 for p in pairs), "each prompt once, last tokens never"


def test_trees_hold_far_fewer_tokens_than_padded_rows() -> None:
    pairs = [TokenisedPair([1] * 90, [2] * n, [3] * (40 - n)) for n in (5, 10, 20, 30)]
    padded, trees = pack_padded(pairs).input_ids.numel(), pack_trees(pairs).input_ids.numel()
    assert (padded, trees) == (8 * 125, 4 * 128)


# --- models ---------------------------------------------------------------------------------------------------------


def check_trees_equal_sequences(name: str, reference: Any) -> None:
    policy = moved(reference)
    pairs = random_pairs(seed=4, count=4, vocab=VOCAB, longest=9)
    objective = objectives.tdpo1(0.3)
    trees = score_pairs(policy, reference, pairs, objective, layout="tree")
    padded = score_pairs(policy, reference, pairs, objective, layout="padded")
    assert trees.batch.layout == "tree" and trees.batch.input_ids.shape[0] < len(pairs) * 2
    rtol = 2e-5 if next(policy.parameters()).dtype == torch.float32 else 3e-6
    for column in ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"):
        ours, theirs = getattr(trees.stats, column), getattr(padded.stats, column)
        assert theirs.abs().min() > 1e-3
        assert ((ours - theirs).abs() / theirs.abs().max()).max() < rtol, column
    ours, theirs = gradients(trees.loss.sum(), policy), gradients(padded.loss.sum(), policy)
    assert_same_gradients(ours, theirs, rtol=50 * rtol)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TAKEN)
def test_trees_equal_separate_sequences(name: str, attention: str) -> None:
    model = build(name)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip(f"{type(model).__name__} has eager attention only")
    model.set_attn_implementation(attention)
    check_trees_equal_sequences(name, model)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", WINDOWED)
def test_trees_keep_to_sliding_windows(name: str, attention: str) -> None:
    model = build(name, torch.float32, WINDOWED[name]())
    model.set_attn_implementation(attention)
    check_trees_equal_sequences(name, model)


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_take_trees_are_refused_with_a_reason_and_run_padded(name: str) -> None:
    model = build(name)
    plan = tree_plan(model)
    assert plan.masks is None and len(plan.refusal) > 20
    assert packer("auto", [model]) is pack_padded
    with pytest.raises(UserError, match="--layout tree: this model does not support it"):
        packer("tree", [model])
    with pytest.raises(ValueError, match="cannot run trees"):
        tree_states(model, pack_trees(random_pairs(vocab=VOCAB)))


def test_a_planted_model_that_mixes_branches_without_a_sign_is_refused() -> None:
    """Its body shifts a little of each hidden state to the next column, as a convolution would."""

    class Mixing(nn.Module):
        def __init__(self, body: nn.Module) -> None:
            super().__init__()
            self.body = body

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = self.body(*args, **kwargs)
            states = output.last_hidden_state
            output.last_hidden_state = states + 0.1 * nn.functional.pad(states, (0, 0, 1, 0))[:, :-1]
            return output

    model = tiny_llama(dtype=torch.float32)
    assert tree_plan(model).refusal == ""
    planted = copy.deepcopy(model)
    planted.model = Mixing(planted.model)
    planted.get_input_embeddings = lambda: planted.model.body.embed_tokens
    assert "trees and separate sequences differ" in tree_plan(planted).refusal


def test_attention_that_takes_no_mask_is_refused() -> None:
    model = tiny_llama(dtype=torch.float32)
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2 takes no mask" in tree_plan(model).refusal


def test_a_window_that_short_probes_cannot_show_is_refused() -> None:
    """GPT-Neo's local attention: its window is longer than the probe, and its mask the model's own."""
    config = hf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]],
        window_size=32, max_position_embeddings=64,
    )  # fmt: skip
    model = hf.GPTNeoForCausalLM(config).eval()
    assert "window_size limits attention" in tree_plan(model).refusal
    assert packer("auto", [model]) is pack_padded


def test_another_attention_implementation_is_probed_again() -> None:
    model = build("llama", torch.float32)
    pairs, objective = random_pairs(seed=4, vocab=VOCAB), objectives.tdpo1(0.3)
    scores = []
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        scores.append(score_pairs(model, moved(model), pairs, objective, layout="tree"))
    torch.testing.assert_close(scores[1].rejected_logp, scores[0].rejected_logp, rtol=1e-5, atol=1e-5)


def test_the_probe_runs_once_and_leaves_the_model_as_it_was() -> None:
    model = tiny_llama(dtype=torch.float32).train()
    plan = tree_plan(model)
    assert tree_plan(model) is plan and model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_auto_takes_trees_but_float64_stays_padded() -> None:
    single, double = tiny_llama(dtype=torch.float32), tiny_llama(dtype=torch.float64)
    assert packer("auto", [single]) is pack_trees and packer("padded", [single]) is pack_padded
    assert packer("auto", [double]) is pack_padded and packer("tree", [double]) is pack_trees


def test_a_bfloat16_model_passes_the_probe() -> None:
    assert tree_plan(build("qwen3", torch.bfloat16)).refusal == ""


# --- training -------------------------------------------------------------------------------------------------------


def trained(folder: Path, tokenizer: Any, **fields: Any) -> tuple[torch.Tensor, list[float]]:
    trainer = train_tiny(folder, tokenizer, optim="sgd", **fields)
    return weights(trainer.model), [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize("objective", objectives.OBJECTIVES)
def test_layouts_and_backends_train_alike(tmp_path: Path, tokenizer: Any, objective: str) -> None:
    plain, losses = trained(tmp_path, tokenizer, objective=objective, layout="padded", backend="naive")
    for options in ({"layout": "tree"}, {"layout": "padded"}, {"layout": "tree", "logits_budget": 1}):
        weights, others = trained(tmp_path, tokenizer, objective=objective, **options)
        torch.testing.assert_close(weights, plain, rtol=1e-4, atol=1e-6)
        assert others == pytest.approx(losses, rel=1e-5)


def test_one_log_line_says_the_layout_and_why(tmp_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="tdpo"):
        trained(tmp_path, tokenizer)
    assert [record.message for record in caplog.records if "layout" in record.message] == ["layout: trees"]


# --- flex attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3])
def test_the_block_mask_of_flex_attention_is_the_exact_pattern(window: int | None) -> None:
    from torch.nn.attention.flex_attention import create_mask

    batch = pack_trees(random_pairs(seed=4, count=5, vocab=VOCAB, longest=9), capacity=40)
    rows, length = batch.input_ids.shape
    blocks = trees.block_mask(batch, window)
    assert blocks.shape == (rows, 1, length, length)
    ours = create_mask(blocks.mask_mod, rows, None, length, length, device="cpu")
    assert torch.equal(ours, trees.dense_mask(batch, window, None))


@pytest.mark.skipif(torch.cuda.is_available(), reason="flex attention has a backward pass on a GPU")
def test_flex_attention_is_refused_where_it_has_no_backward() -> None:
    model = build("llama", torch.float32)
    model.set_attn_implementation("flex_attention")
    assert "FlexAttention does not support backward on CPU" in tree_plan(model).refusal
    assert packer("auto", [model]) is pack_padded


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_trees_equal_separate_sequences_with_flex_attention() -> None:
    model = build("llama", torch.float32).cuda()
    model.set_attn_implementation("flex_attention")
    check_trees_equal_sequences("llama", model)
