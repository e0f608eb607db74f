"""Hooks, patches and parametrisations of a tied embedding take part in training as they do on an untied one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from numeric_worlds import moved, random_pairs
from test_tied import VOCAB, assert_alike, gradients
from tiny_training import train_tiny
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization

from tdpo import objectives
from tdpo.data.pack import pack_padded
from tdpo.score import batch_loss, score_batch


def noise(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output + 0.1 * torch.randn(output.shape) if layer.training else output


def noise_in_place(layer: nn.Module, inputs: Any, output: Tensor) -> None:
    if layer.training:
        output.add_(0.1 * torch.randn(output.shape))


def other_ids(layer: nn.Module, inputs: Any) -> Any:
    return ((inputs[0] + 1) % VOCAB,)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight


def patch(table: Any) -> None:
    own = table.forward
    table.forward = lambda ids: 2.0 * own(ids)


PUT_ON: dict[str, Callable[[Any], Any]] = {
    "a hook": lambda table: table.register_forward_hook(noise),
    "a hook in front": lambda table: table.register_forward_hook(noise, prepend=True),
    "a hook in place": lambda table: table.register_forward_hook(noise_in_place),
    "a hook on the ids": lambda table: table.register_forward_pre_hook(other_ids),
    "another forward": patch,
    "a parametrization": lambda table: register_parametrization(table, "weight", Halved()),
}


def assert_gradients_are_those_of_autograd(policy: Any, reference: Any) -> None:
    batch, objective = pack_padded(random_pairs(count=3, vocab=VOCAB)), objectives.tdpo2()
    torch.manual_seed(1)
    theirs = gradients(policy, score_batch(policy, reference, batch, objective, "naive").loss.sum())
    torch.manual_seed(1)
    assert_alike(gradients(policy, batch_loss(policy, reference, batch, objective)[0]), theirs)


@pytest.mark.parametrize("what", PUT_ON)
def test_gradients_with_something_on_the_embedding_are_those_of_autograd(what: str) -> None:
    reference = make_model(VOCAB)
    policy = moved(reference).train()
    PUT_ON[what](policy.get_input_embeddings())
    assert_gradients_are_those_of_autograd(policy, reference)


def test_a_hook_on_all_modules_is_not_thrown_away() -> None:
    reference = make_model(VOCAB)
    policy = moved(reference)
    table = policy.get_input_embeddings()
    handle = register_module_forward_hook(lambda layer, _, output: 1.5 * output if layer is table else None)
    try:
        assert_gradients_are_those_of_autograd(policy, reference)
    finally:
        handle.remove()


def losses(folder: Path, tokenizer: Any, alpha: float | None, backend: str, tie: bool = True) -> list[float]:
    model = make_model(len(tokenizer))
    if not tie:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    trainer = train_tiny(folder, tokenizer, model, optim="sgd", neftune_noise_alpha=alpha, backend=backend)
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def test_neftune_on_a_tied_model_trains_as_with_plain_autograd(tmp_path: Path, tokenizer: Any) -> None:
    ours = {alpha: losses(tmp_path, tokenizer, alpha, "auto") for alpha in (None, 5.0, 50.0)}
    untied = {alpha: losses(tmp_path, tokenizer, alpha, "auto", tie=False)[0] for alpha in ours}
    for alpha, trajectory in ours.items():
        assert trajectory == pytest.approx(losses(tmp_path, tokenizer, alpha, "naive"), rel=1e-5)
        assert trajectory[0] == pytest.approx(untied[alpha], rel=1e-5), "before the first update both are one model"
    assert ours[None][0] == pytest.approx(0.6931472, abs=1e-6)
    # The policy alone is noised, as in TRL: the log-ratio compares it with a reference without noise.
    assert 1e-4 < abs(ours[5.0][0] - ours[None][0]) < abs(ours[50.0][0] - ours[None][0])
