"""Every causal language model of the installed transformers, against its own forward.

Scores, gradients and two training steps are compared with plain PyTorch on the model's own logits, and the layout each
model is trained in with the table in docs/models.md. After an update of transformers, ``TDPO_WRITE_MODELS=1 pytest -m
slow tests/test_every_model.py`` rewrites that table.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from numeric_worlds import assert_same_gradients, gradients, moved, plain_pair_loss, plain_pair_stats
from tiny_models import VOCAB, model_types, tiny_model

from tdpo import TDPOConfig, TDPOTrainer, TokenisedPair, UserError, objectives, score_pairs
from tdpo.models.modes import prepare_training_mode
from tdpo.models.trees import tree_plan

PAGE = REPOSITORY / "docs" / "models.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
NOT_TRIED = {
    "blt": "it reads bytes through a second model that cuts them into patches",
    "gemma3n": "it needs the package timm; its text model `gemma3n_text` is in the table",
    "gemma4_assistant": "it drafts tokens for another model and reads that model's states",
    "gemma4_unified_assistant": "it drafts tokens for another model and reads that model's states",
    "musicgen": "it writes audio codes",
    "musicgen_melody": "it writes audio codes",
}
RATE, BETA = 0.1, 0.3


def random_pairs(count: int) -> list[TokenisedPair]:
    """Pairs of 2 to 8 tokens a part, none of them a special token."""
    generator = torch.Generator().manual_seed(3)

    def ids() -> list[int]:
        length = int(torch.randint(2, 9, (), generator=generator))
        return (3 + torch.randint(VOCAB - 3, (length,), generator=generator)).tolist()

    return [TokenisedPair(ids(), ids(), ids(), row=row + 1) for row in range(count)]


def verdict(name: str) -> tuple[str, str]:
    """How a model is trained (``trees``, ``padded rows`` or ``no``) and why not better, after all comparisons."""
    reference = tiny_model(name)
    policy = moved(reference).eval()
    pairs = random_pairs(3)
    try:
        prepare_training_mode(policy, disable=True)
        scores = score_pairs(policy, reference, pairs, objectives.tdpo1(BETA))
    except UserError as error:
        return "no", str(error)
    plain = plain_pair_stats(policy, reference, pairs)
    for column in ("chosen_logratio", "rejected_logratio", "chosen_kl", "rejected_kl"):
        ours, theirs = getattr(scores.stats, column), getattr(plain, column)
        assert theirs.abs().max() > 1e-3
        assert (ours - theirs).abs().max() < 4e-4 * theirs.abs().max(), column
    theirs = plain_pair_loss("tdpo1", plain, BETA).sum()
    assert_same_gradients(gradients(scores.loss.sum(), policy), gradients(theirs, policy), rtol=4e-4)
    layout = "trees" if scores.batch.layout == "tree" else "padded rows"
    return layout, tree_plan(policy).refusal


def trained_plainly(model: Any, pairs: list[TokenisedPair]) -> tuple[list[float], Any]:
    """Losses and weights of two steps of gradient descent on TDPO1's loss, from the model's own logits."""
    policy, reference, losses = copy.deepcopy(model), model, []
    for _ in range(2):
        loss = plain_pair_loss("tdpo1", plain_pair_stats(policy, reference, pairs), BETA).mean()
        for name, gradient in gradients(loss, policy).items():
            policy.get_parameter(name).data -= RATE * gradient
        losses.append(loss.item())
    return losses, policy


def trained(model: Any, pairs: list[TokenisedPair], folder: Path) -> tuple[list[float], Any]:
    """The same by the trainer."""
    args = TDPOConfig(
        output_dir=str(folder), objective="tdpo1", beta=BETA, optim="sgd", learning_rate=RATE, max_grad_norm=0.0,
        lr_scheduler_type="constant", max_steps=2, per_device_train_batch_size=len(pairs), logging_steps=1,
        save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True, train_sampling_strategy="sequential",
    )  # fmt: skip
    trainer = TDPOTrainer(copy.deepcopy(model), args=args, train_dataset=pairs)
    trainer.train()
    assert "loss" in trainer.state.log_history[0]
    return [log["loss"] for log in trainer.state.log_history if "loss" in log], trainer.model


def table() -> dict[str, tuple[str, str]]:
    """The rows of docs/models.md: layout and reason by model type."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]*) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {name: (layout.strip(), reason.strip()) for name, layout, reason in rows}


def in_a_cell(reason: str) -> str:
    """A reason in one line of a table: the first sentence, without the numbers that rounding decides."""
    reason = re.split(r"(?<=\w)\. |; |\n", reason)[0]
    return re.sub(r"by \d\.\de[+-]\d+ ", "", reason).replace("|", "/")


@pytest.fixture(scope="module")
def measured() -> Iterator[dict[str, tuple[str, str]]]:
    """Collects verdicts; writes them into the page where TDPO_WRITE_MODELS asks for it."""
    found: dict[str, tuple[str, str]] = {}
    yield found
    if os.environ.get("TDPO_WRITE_MODELS"):
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        rows = {**table(), **found}
        lines = [f"| `{name}` | {layout} | {reason} |\n" for name, (layout, reason) in sorted(rows.items())]
        title = "| type | trained in | reason |\n|---|---|---|\n"
        PAGE.write_text(head + BEGIN + title + "".join(lines) + END + rest.partition(END)[2], encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in model_types() if name not in NOT_TRIED])
def test_scores_gradients_and_two_steps_are_those_of_the_models_own_forward(
    name: str, measured: dict[str, tuple[str, str]], tmp_path: Path
):
    layout, reason = verdict(name)
    measured[name] = layout, in_a_cell(reason)
    if layout != "no":
        model, pairs = tiny_model(name), random_pairs(4)
        theirs, their_model = trained_plainly(model, pairs)
        ours, our_model = trained(model, pairs, tmp_path)
        assert ours == pytest.approx(theirs, rel=4e-4)
        start = dict(model.named_parameters())
        for (parameter, now), then in zip(their_model.named_parameters(), our_model.parameters(), strict=True):
            step = (now - start[parameter]).abs().max()
            rounding = 4 * torch.finfo(now.dtype).eps * now.abs().max()
            assert (now - then).abs().max() <= 4e-4 * max(step, 1e-3 * RATE) + rounding, parameter
    if not os.environ.get("TDPO_WRITE_MODELS"):
        assert table().get(name) == measured[name], f"docs/models.md says otherwise of {name}"


def test_the_page_of_models_has_a_row_for_each_and_says_what_was_not_tried():
    assert set(table()) == set(model_types()) - set(NOT_TRIED)
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{name}`: {reason}" in page for name, reason in NOT_TRIED.items())
