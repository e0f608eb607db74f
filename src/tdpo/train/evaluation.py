"""Evaluation with exact means over all items of a dataset, instead of means of the batches' means."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from typing_extensions import override

from tdpo.errors import UserError
from tdpo.train.inputs import prepare_held_out
from tdpo.train.metrics import Sums
from tdpo.train.sampling import DUMMY, make_loader
from tdpo.train.step import StepTrainer

TOTAL, ITEMS = "loss_sum", "items"
"""Names of the sum of the losses and of the count of items among the sums of an evaluation."""


class EvaluatingTrainer(StepTrainer):
    """A Trainer whose evaluation sums losses and metrics over all items and processes."""

    eval_metrics: Sums
    has_trained = False
    """Training has begun in this process, so that engines have sharded the weights."""

    def prepare_dataset(self, data: Iterable[Any], name: str) -> Any:
        """Tokenises rows in any form ``train_dataset`` may be in.

        Args:
            data: The rows.
            name: What messages call them.
        """
        raise NotImplementedError("abstract: a subclass prepares its data")

    def metric_names(self) -> list[str]:
        """Lists the metrics that an evaluation reports, without prefix; a subclass that reports others adds them."""
        return ["loss"]

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Returns the batches of this process; every row is in exactly one batch of all processes."""
        held_out: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(held_out, str):
            held_out = self.eval_dataset[held_out]  # type: ignore[index]
        if held_out is None:
            raise UserError("evaluation needs an eval_dataset")
        return make_loader(held_out, self.args.eval_batch_size, self.data_collator, self.args)

    @override
    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self.get_eval_dataloader(test_dataset)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates on ``eval_dataset``, rows in any form that ``train_dataset`` may be in."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = prepare_held_out(eval_dataset, self.prepare_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Computes the metrics of :meth:`evaluate` for some rows, under another prefix and without logging them.

        Returns:
            Its ``metrics`` are filled; ``predictions`` and ``label_ids`` are None, because no logits are kept.
        """
        rows = prepare_held_out(test_dataset, self.prepare_dataset)
        return super().predict(rows, ignore_keys, metric_key_prefix)  # type: ignore[arg-type]

    @override
    def evaluation_loop(
        self, dataloader: Any, description: str, prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:  # fmt: skip
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not self.has_trained:
            raise UserError(
                "under FSDP and DeepSpeed an evaluation needs weights that training has sharded: evaluate after "
                "train(), or use --eval_on_start"
            )
        self.eval_metrics = Sums()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        exact = {f"{metric_key_prefix}_{name}": value for name, value in self.end_evaluation().items()}
        return output._replace(metrics={**(output.metrics or {}), **exact})

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Computes the loss of a batch without gradient and adds it to the sums that :meth:`end_evaluation` reads."""
        weight = 0.0 if inputs.pop(DUMMY, False) else 1.0
        with torch.no_grad(), self.compute_loss_context_manager():
            total, outputs = self.loss_sum(model, inputs)
        count = torch.full_like(total, self.item_count(inputs))
        self.eval_metrics.add({**self.metric_columns(outputs), TOTAL: total, ITEMS: count}, weight)
        return total / count, None, None

    def end_evaluation(self) -> dict[str, float]:
        """Returns the metrics of the evaluation that just ended, over all processes, without prefix."""
        sums = self.eval_metrics.take(self.accelerator)
        if not sums:
            return {}
        loss = sums.pop(TOTAL) / sums.pop(ITEMS)
        return {"loss": loss} | self.metric_means(sums)
