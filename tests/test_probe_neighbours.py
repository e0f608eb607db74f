"""Hidden states of a sequence do not depend on the other sequences of its batch, or it is reported."""

from __future__ import annotations

import copy
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import make_model
from numeric_worlds import assert_same_gradients, gradients, moved, plain_pair_loss, plain_pair_stats
from test_architectures import LLAMA_LIKE, build
from torch import Tensor, nn

from tdpo import TDPOConfig, TDPOTrainer, TokenisedPair, UserError, objectives, score_pairs
from tdpo.data.pack import as_padded, pack_padded, pack_sequences, pack_trees
from tdpo.models.neighbours import NeighbourPlan, neighbour_plan
from tdpo.models.trees import tree_plan

VOCAB = 53
SWITCH = 60
SIZES = {**LLAMA_LIKE, "hidden_size": 32, "num_key_value_heads": 2, "max_position_embeddings": 256}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SWITCH,
    "short_factor": [1.0] * 8, "long_factor": [1.5 + 0.5 * i for i in range(8)],
}  # fmt: skip


def phi3(dtype: torch.dtype = torch.float32, vocab_size: int = VOCAB) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": vocab_size}
    config = hf.Phi3Config(**sizes, original_max_position_embeddings=SWITCH, rope_parameters=dict(LONGROPE))
    return hf.Phi3ForCausalLM(config).to(dtype).eval()


def phimoe() -> Any:
    torch.manual_seed(0)
    rope = {**LONGROPE, "short_mscale": 1.0, "long_mscale": 1.2}
    return hf.PhimoeForCausalLM(hf.PhimoeConfig(**SIZES, num_local_experts=2, rope_parameters=rope)).eval()


def dynamic(dtype: torch.dtype = torch.float32) -> Any:
    """A Llama with dynamic NTK, every longer length of which has frequencies of its own."""
    torch.manual_seed(0)
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    sizes = {**SIZES, "max_position_embeddings": SWITCH}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, rope_parameters=rope)).to(dtype).eval()


def without_memory(model: Any) -> Any:
    """Makes dynamic NTK forget the longest sequence it has seen, so that its own forward is that of each sequence."""
    rotary = model.model.rotary_emb

    def forget(module: Any, inputs: Any) -> None:
        module.max_seq_len_cached = SWITCH
        module.inv_freq = module.original_inv_freq

    if rotary.rope_type == "dynamic":
        rotary.register_forward_pre_hook(forget)
    return model


def straddling() -> list[TokenisedPair]:
    """Pairs around the switch: short, long, on both sides, and at the very lengths where it happens."""
    lengths = [(10, 5, 8), (70, 5, 9), (50, 6, 30), (30, 40, 3), (SWITCH - 4, 4, 5), (SWITCH - 3, 5, 3), (5, 70, 60)]
    lengths += [(10 + i, 6, 4) for i in range(5)]
    generator = torch.Generator().manual_seed(0)
    return [
        TokenisedPair(*(torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in parts), row)
        for row, parts in enumerate(lengths, 1)
    ]


def test_the_switching_length_is_measured() -> None:
    for model in (phi3(), phimoe(), dynamic()):
        plan = neighbour_plan(model)
        assert plan.of_each_length == isinstance(model, hf.LlamaForCausalLM)
        assert (plan.switch, plan.reason) == (SWITCH, "") and plan.rotaries == (model.model.rotary_emb,)
        assert neighbour_plan(model) is plan and "forward" not in vars(model.model.rotary_emb)
        assert not model.model.rotary_emb._forward_pre_hooks
    for name in ("llama", "gpt2", "gemma3", "mixtral", "bloom"):
        assert neighbour_plan(build(name)) == NeighbourPlan()


@pytest.mark.parametrize("backend", ["auto", "naive"])
@pytest.mark.parametrize("layout", ["padded", "tree"])
@pytest.mark.parametrize("build_model", [phi3, dynamic])
def test_every_sequence_is_scored_as_alone(build_model: Any, layout: Any, backend: Any) -> None:
    """The second opinion runs each sequence through the model's own forward."""
    reference, pairs = build_model(torch.float64), straddling()
    policy = without_memory(moved(reference))
    without_memory(reference)
    scores = score_pairs(policy, reference, pairs, objectives.tdpo1(0.1), layout=layout, backend=backend)
    assert scores.batch.layout == layout
    plain = plain_pair_stats(policy, reference, pairs)
    for column in ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"):
        torch.testing.assert_close(getattr(scores.stats, column), getattr(plain, column), rtol=1e-5, atol=1e-5)
    theirs = gradients(plain_pair_loss("tdpo1", plain, 0.1).sum(), policy)
    assert_same_gradients(gradients(scores.loss.sum(), policy), theirs, rtol=1e-4)
    alone = score_pairs(policy, reference, pairs[:1], objectives.tdpo1(0.1), layout=layout)
    assert scores.chosen_logp[0].item() == pytest.approx(alone.chosen_logp[0].item(), abs=1e-6)


def test_trees_stay_where_all_sequences_are_on_one_side() -> None:
    model, pairs = phi3(), straddling()
    assert tree_plan(model).refusal == ""
    score_pairs(model, model, pairs, objectives.dpo(0.1), layout="tree")
    rows: list[Any] = []
    model.model.register_forward_pre_hook(lambda m, a, k: rows.append(k["input_ids"].shape[0]), with_kwargs=True)
    for chosen in ([pairs[0], pairs[0]], [pairs[1], pairs[1]], [pairs[0], pairs[1]]):
        rows.clear()
        score_pairs(model, model, chosen, objectives.dpo(0.1), layout="tree")
        assert set(rows) == ({2} if chosen[0] is chosen[1] else {4})


def test_sequences_of_trees_become_the_rows_they_came_from() -> None:
    pairs = straddling()
    assert_same_rows(as_padded(pack_trees(pairs, capacity=200)), pack_padded(pairs))
    prompts, responses = [[5, 6], [5], [3]], [[7, 8, 9], [8, 9], [4, 4]]
    assert_same_rows(
        as_padded(pack_sequences(prompts, responses, [4, 2, 9], "tree")), pack_sequences(prompts, responses, [4, 2, 9])
    )


def assert_same_rows(ours: Any, theirs: Any) -> None:
    for name, value in theirs.as_dict().items():
        other = ours.as_dict()[name]
        assert torch.equal(other, value) if isinstance(value, Tensor) else other == value, name


def first_log(model: Any, folder: Path, pairs: list[TokenisedPair], **options: Any) -> dict[str, float]:
    args = TDPOConfig(
        output_dir=str(folder), max_steps=4, learning_rate=0.0, logging_steps=4, save_strategy="no", use_cpu=True,
        disable_tqdm=True, per_device_train_batch_size=3, per_device_eval_batch_size=2, **options,
    )  # fmt: skip
    trainer = TDPOTrainer(model, None, args, None, pairs)
    trainer.train()
    return next(log for log in trainer.state.log_history if "loss" in log)


@pytest.mark.parametrize("layout", ["padded", "auto"])
@pytest.mark.parametrize("reference", ["cached", "frozen"])
@pytest.mark.parametrize("build_model", [phi3, phimoe, dynamic])
def test_a_reference_costs_log_two_on_both_sides_of_the_switch(
    tmp_path: Path, build_model: Any, reference: str, layout: str
) -> None:
    log = first_log(build_model(), tmp_path, straddling(), reference=reference, layout=layout)
    assert log["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log["kl/chosen"] == pytest.approx(0, abs=1e-6) and log["kl/rejected"] == pytest.approx(0, abs=1e-6)


def test_the_router_loss_is_that_of_the_rows_that_ran(tmp_path: Path) -> None:
    losses = [
        first_log(phimoe(), tmp_path, straddling(), reference="frozen", layout=layout, router_aux_loss_coef=0.1)["loss"]
        for layout in ("padded", "auto")
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-2) and losses[0] > math.log(2) + 0.05


def test_checkpointing_gives_the_gradients_of_each_sequence() -> None:
    reference, pairs = phi3(torch.float64), straddling()
    policy = moved(reference).train()
    expected = gradients(score_pairs(policy, reference, pairs, objectives.tdpo1(0.1)).loss.sum(), policy)
    policy.gradient_checkpointing_enable()
    ours = gradients(score_pairs(policy, reference, pairs, objectives.tdpo1(0.1)).loss.sum(), policy)
    assert_same_gradients(ours, expected, rtol=1e-9)


class Mixing(nn.Module):
    """A norm that takes the mean over the batch away, as one with statistics of the batch does."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, states: Tensor) -> Tensor:
        states = self.norm(states)
        return states - 0.1 * states.mean((0, 1), keepdim=True).detach() * (states.shape[0] > 1)


def mixing() -> Any:
    model = make_model(VOCAB)
    model.model.norm = Mixing(model.model.norm)
    return model


def rotary_in_the_layers() -> Any:
    """Phi-3 as older code has it: every layer computes its own frequencies."""
    model = phi3()
    own = model.model.rotary_emb
    inner = copy.deepcopy(own)

    class Layered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([inner])

        def forward(self, x: Tensor, position_ids: Tensor) -> Any:
            return self.layers[0](x, position_ids)

    model.model.rotary_emb = Layered()
    return model


PLANTED = {
    "statistics of the batch": (mixing, "its hidden states change by"),
    "rotary embeddings within layers": (
        rotary_in_the_layers,
        f"a sequence of more than {SWITCH} tokens changes the positions of the others in its batch",
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_what_depends_on_neighbours_is_refused_a_cache_and_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    make, reason = PLANTED[what]
    model = make()
    assert neighbour_plan(model).reason.startswith(reason)
    with pytest.raises(UserError, match=r"cannot be read from a cache: .* Use --reference frozen"):
        first_log(model, tmp_path, straddling()[:3], reference="cached")
    with caplog.at_level(logging.WARNING, logger="tdpo"):
        first_log(make(), tmp_path, straddling()[:3], reference="frozen")
    assert [line for line in caplog.messages if reason in line and "losses depend on how batches are made up" in line]
