"""The optimizer step, top to bottom: collect micro-batches, score them and go backward, check, clip, update, log.

The loss is the mean over all items (pairs, response tokens) of an optimizer step over all processes, however it is cut
into micro-batches: accumulation of gradients equals the large batch, also when the last batch is short. That of an
evaluation is the mean over all items of the dataset, not a mean of the batches' means.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput
from typing_extensions import override

from tdpo.errors import UserError
from tdpo.train.checkpointing import CheckpointingTrainer
from tdpo.train.metrics import Sums
from tdpo.train.sampling import DUMMY
from tdpo.train.stopping import StopRequest

if not hasattr(Trainer, "_get_grad_norm"):  # where losses are checked; without it they would not be, silently
    raise ImportError("this version of transformers is not supported: its Trainer computes no gradient norm; use 5.23")

TOTAL, ITEMS = "loss_sum", "items"
"""Names of the sum of the losses and of the count of items among the sums of an evaluation."""


class NonFiniteLoss(UserError):
    """The loss of a batch is NaN or infinite. Nothing was updated with it."""


class StepTrainer(CheckpointingTrainer):
    """A Trainer whose loss is the mean over all items of an optimizer step, or of an evaluation.

    A subclass computes the sum of losses of a batch (:meth:`loss_sum`) and names what it is summed over.
    """

    stop_request: StopRequest
    train_metrics: Sums
    eval_metrics: Sums
    items, rows = "pair_rows", "rows"
    """The tensor of a batch that has one element for each item of the loss, and the word for rows in messages."""
    has_trained = False
    """Training has begun in this process, so that engines have sharded the weights."""

    def loss_sum(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Tensor]]:
        """Computes the sum of the losses of a batch, differentiable, its outputs, and what is summed for metrics."""
        raise NotImplementedError("abstract: a subclass defines the loss")

    @staticmethod
    def metric_means(sums: dict[str, float]) -> dict[str, float]:
        """Computes metrics from the sums of what :meth:`loss_sum` returned."""
        raise NotImplementedError("abstract: a subclass defines the metrics")

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Collects the micro-batches of one optimizer step and counts the items of all processes in them.

        The reason to stop of each process is exchanged with the count, so that all of them stop after the same step.
        """
        self._step_losses: list[tuple[Tensor, Tensor]] = []
        if self.state.global_step >= self.state.max_steps:  # resumed where it had ended; one more step is one too many
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = sum(batch[self.items].numel() for batch in batches if DUMMY not in batch)
        counts = self.accelerator.gather(torch.tensor([[items, self.stop_request.poll()]], device=device))
        self.stop_request.agreed = counts[:, 1].max()  # read after the step, which waits for the device anyway
        return batches, counts[:, 0].sum()

    @override
    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_losses.append((loss, inputs["pair_rows"]))
        if self.is_deepspeed_enabled:  # its backward of the last micro-batch updates, so each is checked at once
            self._check_finite(None)
        return loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss of a micro-batch, such that the mean over those of an optimizer step is the step's.

        With ``num_items_in_batch``, the items of the whole step over all processes, that mean is exact also where
        micro-batches hold different numbers of items. A subclass may add a term to the returned loss: like the loss, it
        is averaged over the micro-batches and processes of a step, so it counts once a step, however the step is split.

        Args:
            model: The model as the accelerator has wrapped it.
            inputs: A batch as the collator makes it.
            return_outputs: Return ``(loss, outputs)``.
            num_items_in_batch: Items of the step; None for the mean over the batch's own.
        """
        weight = 0.0 if inputs.pop(DUMMY, False) else 1.0
        total, outputs, columns = self.loss_sum(model, inputs)
        self.train_metrics.add(columns, weight)
        if num_items_in_batch is None:
            loss = weight * total / inputs[self.items].numel()
        else:
            # transformers averages over micro-batches and data parallelism over processes; the sum is what is wanted.
            parts = getattr(self, "current_gradient_accumulation_steps", 1) * self.accelerator.num_processes
            loss = weight * total * parts / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Returns the norm of the gradients before clipping, after checking the step's losses and the norm.

        The Trainer calls it before every update, also where it does not clip. It is the only time in a step that the
        device is waited for.
        """
        norm: Any = super()._get_grad_norm(model, grad_norm)
        if hasattr(norm, "full_tensor"):  # of sharded gradients, each process has its part of the sum
            norm = norm.full_tensor()
        self._check_finite(norm)
        return norm

    def _check_finite(self, norm: Any) -> None:
        """Checks the losses of the step's micro-batches so far, and the norm of their gradients.

        Raises:
            NonFiniteLoss: naming the rows; checkpoints written earlier stay as they are.
        """
        losses, rows = zip(*self._step_losses, strict=True)
        values = torch.stack(losses).tolist()
        wrong = [index for index, value in enumerate(values) if not math.isfinite(value)]
        what, value = "loss", values[wrong[0]] if wrong else 0.0
        if not wrong and norm is not None and not math.isfinite(norm):
            what, value, wrong = "gradient", float(norm), list(range(len(rows)))
        if wrong:
            named = ", ".join(str(row) for index in wrong for row in rows[index].tolist())
            raise NonFiniteLoss(
                f"the {what} is {value} at step {self.state.global_step + 1}, in {self.rows} {named}. Nothing was "
                "updated with it; look at these rows, or lower --learning_rate"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log to a training log."""
        if "loss" in logs:  # the mean over optimizer steps; the loss among the metrics is a mean over pairs
            logs |= self.metric_means(self.train_metrics.take(self.accelerator)) | {"loss": logs["loss"]}
        super().log(logs, start_time)

    @override
    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        counted = self.args.include_num_input_tokens_seen
        if counted != "no":  # a prompt that two responses share counts once where they share it
            positions = inputs["tree_ids"] >= (-1 if counted == "all" else 0)
            own = positions.sum() * (DUMMY not in inputs)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(own.to(self.args.device)).sum())

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
            total, _, columns = self.loss_sum(model, inputs)
        count = torch.full_like(total, inputs[self.items].numel())
        self.eval_metrics.add({**columns, TOTAL: total, ITEMS: count}, weight)
        return total / count, None, None

    def end_evaluation(self) -> dict[str, float]:
        """Returns the metrics of the evaluation that just ended, over all processes, without prefix."""
        sums = self.eval_metrics.take(self.accelerator)
        if not sums:
            return {}
        loss = sums.pop(TOTAL) / sums.pop(ITEMS)
        return {"loss": loss} | self.metric_means(sums)
