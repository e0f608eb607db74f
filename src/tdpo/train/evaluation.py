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
from tdpo.train.metrics import MetricSums
from tdpo.train.sampling import FILLER, make_loader
from tdpo.train.step import StepTrainer


class EvaluatingTrainer(StepTrainer):
    """A Trainer whose evaluation sums losses and metrics over all items and processes."""

    eval_metrics: MetricSums | None = None
    """What :meth:`loss_sum` reports beside the loss, summed over an evaluation."""
    _begun = False

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
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not self._begun:
            raise UserError(
                "under FSDP and DeepSpeed an evaluation needs weights that training has sharded: evaluate after "
                "train(), or use --eval_on_start"
            )
        self._loss_and_count = torch.zeros(2, dtype=torch.float64)
        if self.eval_metrics is not None:
            self.eval_metrics.reset()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        exact = {f"{metric_key_prefix}_{name}": value for name, value in self.end_evaluation().items()}
        return output._replace(metrics={**(output.metrics or {}), **exact})

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Computes the loss of a batch without gradient and adds it to the sums that :meth:`end_evaluation` reads."""
        weight = 0.0 if inputs.pop(FILLER, False) else 1.0
        with torch.no_grad(), self.compute_loss_context_manager():
            total, outputs = self.loss_sum(model, inputs)
        if self.eval_metrics is not None:
            self.eval_metrics.add(outputs, weight)
        count = self.item_count(inputs)
        sums = torch.stack([total.double().cpu(), torch.tensor(float(count)).double()])
        self._loss_and_count += weight * sums
        return total / count, None, None

    def end_evaluation(self) -> dict[str, float]:
        """Returns the metrics of the evaluation that just ended, over all processes, without prefix."""
        sums = self._loss_and_count.float().to(self.args.device)
        total, count = self.accelerator.gather(sums[None]).sum(0).tolist()
        metrics = {} if self.eval_metrics is None else self.eval_metrics.take(self.accelerator)
        return {"loss": total / max(count, 1.0)} | metrics
