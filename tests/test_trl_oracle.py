"""TRL's DPOTrainer as an oracle: on one batch, its DPO loss, gradient and rewards are those of tdpo's ``dpo``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from datasets import Dataset
from numeric_worlds import BACKENDS, assert_same_gradients, gradients, moved, tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tdpo import PairScores, objectives, ops, score_pairs
from tdpo.types import TokenisedPair

trl = pytest.importorskip(
    "trl", reason="TRL is not installed, so its DPO loss cannot be compared; make install brings it (the extra 'bench')"
)

TEXTS = [
    ("the old cat", "did not sleep", "sang all night and dreamt of a bird in the hall"),
    ("a bird", "sang", "dreamt of the cat"),
    ("in the hall the mouse and the cat", "did sleep all night", "sang"),
    ("all night", "the bird sang but the cat did not sleep", "and a mouse"),
]
BETA = 0.3
DTYPES = [torch.float64, torch.float32]
TOLERANCE = {torch.float64: 2e-6, torch.float32: 2e-5}  # TRL's log-probabilities are float32 whatever the model is


def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {word for texts in TEXTS for text in texts for word in text.split()}
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


class Oracle:
    """TRL's trainer around a tiny policy and reference, with the one batch of all pairs."""

    def __init__(self, dtype: torch.dtype, folder: Any) -> None:
        tokenizer = word_tokenizer()
        self.reference = tiny_llama(vocab=len(tokenizer), dtype=dtype)
        self.policy = moved(self.reference)
        self.trainer = trl.DPOTrainer(
            model=copy.deepcopy(self.policy),
            ref_model=copy.deepcopy(self.reference),
            args=trl.DPOConfig(
                output_dir=str(folder),
                beta=BETA,
                per_device_train_batch_size=len(TEXTS),
                gradient_checkpointing=False,
                bf16=False,
                use_cpu=True,
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(
                [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in TEXTS]
            ),
            processing_class=tokenizer,
        )
        rows = list(self.trainer.train_dataset)
        self.pairs = [TokenisedPair(row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]) for row in rows]
        self.inputs = self.trainer.data_collator(rows)
        self.trainer.model.train()

    def loss(self) -> Tensor:
        """TRL's loss of the batch; its metrics of this batch alone are left in :meth:`metric`."""
        self.trainer._metrics["train"].clear()
        return self.trainer.compute_loss(self.trainer.model, self.inputs)

    def metric(self, name: str) -> float:
        (value,) = self.trainer._metrics["train"][name]
        return value

    def ours(self, backend: ops.BackendName) -> PairScores:
        return score_pairs(self.policy, self.reference, self.pairs, objectives.dpo(BETA), backend=backend)


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    yield Oracle(request.param, tmp_path_factory.mktemp("trl"))


def tolerance(oracle: Oracle) -> float:
    return TOLERANCE[oracle.policy.dtype]


def test_the_batch_is_what_was_written(oracle: Oracle):
    """Prompt, responses with their end token, nothing truncated, and padding for TRL to ignore."""
    decode = word_tokenizer().decode
    for pair, (prompt, chosen, rejected) in zip(oracle.pairs, TEXTS, strict=True):
        assert decode(pair.prompt_ids) == prompt
        assert decode(pair.chosen_ids[:-1]) == chosen and decode(pair.rejected_ids[:-1]) == rejected
        assert pair.chosen_ids[-1] == pair.rejected_ids[-1] == 1
    assert oracle.inputs["completion_mask"].sum() == sum(len(p.chosen_ids) + len(p.rejected_ids) for p in oracle.pairs)
    assert (oracle.inputs["attention_mask"] == 0).any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_every_gradient_equal_trls(oracle: Oracle, backend: ops.BackendName):
    theirs, ours = oracle.loss(), oracle.ours(backend).loss.mean()
    assert abs(theirs.item() - 0.6931) > 0.01
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance(oracle))
    assert_same_gradients(
        gradients(ours, oracle.policy), gradients(theirs, oracle.trainer.model), rtol=10 * tolerance(oracle)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_rewards_and_log_probabilities_equal_trls_metrics(oracle: Oracle, backend: ops.BackendName):
    oracle.loss()
    scores = oracle.ours(backend)
    margin = scores.chosen_reward - scores.rejected_reward
    for name, value in {
        "rewards/chosen": scores.chosen_reward,
        "rewards/rejected": scores.rejected_reward,
        "rewards/margins": margin,
        "rewards/accuracies": (margin > 0).double(),
        "logps/chosen": scores.chosen_logp,
        "logps/rejected": scores.rejected_logp,
    }.items():
        assert value.mean().item() == pytest.approx(oracle.metric(name), rel=20 * tolerance(oracle), abs=1e-7), name
    assert 0 < oracle.metric("rewards/accuracies") < 1


def test_tdpo2_without_its_kl_is_trls_dpo_and_with_it_is_not(oracle: Oracle):
    theirs = oracle.loss().item()
    without, with_kl = (
        score_pairs(oracle.policy, oracle.reference, oracle.pairs, objectives.tdpo2(BETA, alpha)).loss.mean().item()
        for alpha in (0.0, 0.5)
    )
    assert without == pytest.approx(theirs, rel=tolerance(oracle))
    assert abs(with_kl - theirs) > 1e-3


@pytest.mark.parametrize(
    ("objective", "options"),
    [
        (objectives.fdpo(BETA), {"f_divergence_type": "forward_kl"}),
        (objectives.fdpo(BETA, "js"), {"f_divergence_type": "js_divergence"}),
        (
            objectives.fdpo(BETA, "alpha", 0.25),
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.25},
        ),
        (objectives.ipo(BETA), {"loss_types": ["ipo"]}),
        (objectives.robust(BETA, 0.2), {"loss_types": ["robust"], "label_smoothing": 0.2}),
    ],
    ids=str,
)
def test_losses_and_gradients_of_the_family_equal_trls(
    oracle: Oracle, objective: objectives.Objective, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    if oracle.policy.dtype == torch.float64 and "alpha_divergence" in options.values():
        pytest.skip("TRL has no limit for the alpha-divergence in float64")
    plain = oracle.loss().item()
    for name, value in options.items():
        monkeypatch.setattr(oracle.trainer, name, value)
    theirs = oracle.loss()
    ours = score_pairs(oracle.policy, oracle.reference, oracle.pairs, objective).loss.mean()
    assert abs(theirs.item() - plain) > 1e-4
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance(oracle))
    assert_same_gradients(
        gradients(ours, oracle.policy), gradients(theirs, oracle.trainer.model), rtol=10 * tolerance(oracle)
    )
