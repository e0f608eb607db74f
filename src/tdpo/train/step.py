"""Overrides of transformers' Trainer, in the order it calls them: in an optimizer step, in a log, in an evaluation.

The loss is the mean over all items (pairs, response tokens) of an optimizer step over all processes, however it is cut
into micro-batches: gradient accumulation gives the gradient of one large batch, even if the last micro-batch is
smaller. That of an evaluation is the mean over all items of the dataset, not a mean of the batches' means.
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

if not hasattr(Trainer, "_get_grad_norm"):  # where losses are checked; a Trainer without it would skip that silently
    raise ImportError("transformers' Trainer has no _get_grad_norm in this version; install transformers 5.23")

TOTAL, ITEMS = "loss_sum", "items"
"""Names of the sum of the losses and of the count of items among the sums of an evaluation."""


class NonFiniteLoss(UserError):
    """The loss of a batch, or the gradient of a step, is NaN or infinite. Nothing was updated with it."""


class StepTrainer(CheckpointingTrainer):
    """A Trainer whose loss is the mean over all items of an optimizer step, or of an evaluation.

    A subclass computes the sum of losses of a batch (:meth:`loss_sum`).
    """

    stop_request: StopRequest
    train_metrics: Sums
    eval_metrics: Sums
    items_key = "pair_rows"
    """Key of the batch tensor that has one element per item."""
    rows_word = "rows"
    """What messages call the rows of a batch."""
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

        Each process's request to stop is gathered along with the count, so all of them stop after the same step.
        """
        self._step_losses: list[tuple[Tensor, Tensor]] = []
        if self.state.global_step >= self.state.max_steps:  # resumed from the end of a finished run: no further step
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = sum(batch[self.items_key].numel() for batch in batches if DUMMY not in batch)
        counts = self.accelerator.gather(torch.tensor([[items, self.stop_request.poll()]], device=device))
        self.stop_request.agreed = counts[:, 1].max()  # read after the step, which waits for the device anyway
        return batches, counts[:, 0].sum()

    @override
    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, Tensor):  # under DeepSpeed the Trainer would round token weights to the engine's dtype
            return data.to(self.args.device)
        return super()._prepare_input(data)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Computes the loss of a micro-batch, whose mean over the micro-batches and processes of a step is the step's.

        A subclass may add a regulariser to the returned loss. It is averaged over micro-batches and processes as well,
        so it counts once a step and needs no scale.

        Args:
            model: The model as the accelerator has wrapped it.
            inputs: A batch as the collator makes it.
            return_outputs: Return ``(loss, outputs)``.
            num_items_in_batch: Items of the whole step over all processes; None divides by those of this batch.
        """
        weight = 0.0 if inputs.pop(DUMMY, False) else 1.0  # a dummy runs because other processes have a batch
        total, outputs, columns = self.loss_sum(model, inputs)
        self.train_metrics.add(columns, weight)
        if num_items_in_batch is None:
            loss = weight * total / inputs[self.items_key].numel()
        else:
            # The Trainer divides by the number of micro-batches and DDP by that of processes; both are undone.
            divisor = getattr(self, "current_gradient_accumulation_steps", 1) * self.accelerator.num_processes
            loss = weight * total * divisor / num_items_in_batch
        self._step_losses.append((loss.detach(), inputs["pair_rows"]))
        if self.is_deepspeed_enabled and not math.isfinite(loss):  # its backward updates too
            raise self._non_finite("loss", loss, [inputs["pair_rows"]])
        return (loss, outputs) if return_outputs else loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Returns the norm of the gradients before clipping, after checking the step's losses and the norm.

        The Trainer calls it before every update, also where it does not clip. Only this waits for the device.

        Raises:
            NonFiniteLoss: naming the rows; checkpoints written earlier stay as they are.
        """
        norm: Any = super()._get_grad_norm(model, grad_norm)
        if hasattr(norm, "full_tensor"):  # under FSDP2 each process has its part of the sum
            norm = norm.full_tensor()
        rows = [rows for _, rows in self._step_losses]  # none where a subclass computes the loss of its own
        losses = torch.stack([loss for loss, _ in self._step_losses]).tolist() if rows else []
        wrong = [index for index, loss in enumerate(losses) if not math.isfinite(loss)]
        if wrong:
            raise self._non_finite("loss", losses[wrong[0]], [rows[index] for index in wrong])
        if norm is not None and not math.isfinite(norm):
            raise self._non_finite("gradient", norm, rows)
        return norm

    def _non_finite(self, what: str, value: Any, rows: list[Tensor]) -> NonFiniteLoss:
        """Makes the error for a loss or a gradient that is not finite, of some micro-batches of this process."""
        named = ", ".join(str(row) for batch in rows for row in batch.tolist())
        own = " of this process" if what == "gradient" and self.accelerator.num_processes > 1 else ""
        return NonFiniteLoss(
            f"the {what} is {float(value)} at step {self.state.global_step + 1}, in {self.rows_word} {named}{own}. "
            "Nothing was updated with it; look at these rows, or lower --learning_rate"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics since the last log to a training log."""
        if "loss" in logs:  # the mean over optimizer steps, which wins over the metrics' loss, a mean over pairs
            logs |= self.metric_means(self.train_metrics.take(self.accelerator)) | {"loss": logs["loss"]}
        super().log(logs, start_time)

    @override
    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        counted = self.args.include_num_input_tokens_seen
        if counted != "no":  # in tree layout a shared prompt is one sequence, so its tokens count once
            positions = inputs["tree_ids"] >= (-1 if counted == "all" else 0)  # -1 is padding
            local = positions.sum() * (DUMMY not in inputs)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(local.to(self.args.device)).sum())

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
        count = torch.full_like(total, inputs[self.items_key].numel())
        self.eval_metrics.add({**columns, TOTAL: total, ITEMS: count}, weight)
        return total / count, None, None

    def end_evaluation(self) -> dict[str, float]:
        """Returns the metrics of the evaluation that just ended, over all processes, without prefix."""
        sums = self.eval_metrics.take(self.accelerator)
        if not sums:
            return {}
        loss = sums.pop(TOTAL) / sums.pop(ITEMS)
        return {"loss": loss} | self.metric_means(sums)
