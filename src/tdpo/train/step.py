"""The optimizer step, top to bottom: collect micro-batches, score them and go backward, clip, update, log.

The loss is the mean over all items (pairs, response tokens) of an optimizer step over all processes, however it is cut
into micro-batches: accumulation of gradients equals the large batch, also when the last batch is short.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import Trainer
from typing_extensions import override

from tdpo.config import RunOptions
from tdpo.errors import UserError
from tdpo.train.metrics import Sums
from tdpo.train.sampling import DUMMY
from tdpo.train.stopping import StopRequest

if not hasattr(Trainer, "_get_grad_norm"):  # where losses are checked; without it they would not be, silently
    raise ImportError("this version of transformers is not supported: its Trainer computes no gradient norm; use 5.23")


class NonFiniteLoss(UserError):
    """The loss of a batch is NaN or infinite. Nothing was updated with it."""


class StepTrainer(Trainer):
    """A Trainer whose loss is the mean over all items of an optimizer step.

    A subclass computes the sum of losses of a batch (:meth:`loss_sum`) and names what it is summed over.
    """

    args: RunOptions
    stop_request: StopRequest
    loss_since_log: LossSinceLog
    train_metrics: Sums
    items, rows = "pair_rows", "rows"
    """The tensor of a batch that has one element for each item of the loss, and the word for rows in messages."""

    def loss_sum(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Computes the sum of the losses of a batch, differentiable, and the outputs that metrics are made of."""
        raise NotImplementedError("abstract: a subclass defines the loss")

    def metric_columns(self, outputs: Any) -> dict[str, Tensor]:
        """Computes what is summed for the metrics from the outputs of :meth:`loss_sum`; nothing by default."""
        return {}

    def metric_means(self, sums: dict[str, float]) -> dict[str, float]:
        """Computes metrics from the sums of :meth:`metric_columns`."""
        return sums

    def item_count(self, inputs: dict[str, Any]) -> int:
        """Counts the items (pairs, tokens) that the loss of a batch is summed over."""
        return inputs[self.items].numel()

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Collects the micro-batches of one optimizer step and counts the items of all processes in them.

        The reason to stop of each process is exchanged with the count, so that all of them stop after the same step.
        """
        self._step_losses: list[tuple[Tensor, Tensor]] = []
        if self.state.global_step >= self.state.max_steps:  # resumed where it had ended; one more step is one too many
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        items = sum(self.item_count(batch) for batch in batches if DUMMY not in batch)
        counts = self.accelerator.gather(torch.tensor([[items, self.stop_request.poll()]], device=device))
        self.stop_request.agreed = counts[:, 1].max()  # read after the step, which waits for the device anyway
        return batches, counts[:, 0].sum()

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
        total, outputs = self.loss_sum(model, inputs)
        self.train_metrics.add(self.metric_columns(outputs), weight)
        if num_items_in_batch is None:
            loss = weight * total / self.item_count(inputs)
        else:
            # transformers averages over micro-batches and data parallelism over processes; the sum is what is wanted.
            parts = getattr(self, "current_gradient_accumulation_steps", 1) * self.accelerator.num_processes
            loss = weight * total * parts / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    @override
    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.loss_since_log.add(loss)
        self._step_losses.append((loss, inputs["pair_rows"]))
        if self.is_deepspeed_enabled:  # its backward of the last micro-batch updates, so each is checked at once
            self._check_finite(None)
        return loss

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
        """Adds the metrics and the mean loss since the last log to a training log, also across an interruption."""
        if "loss" in logs:
            loss = self.loss_since_log.take(self.state.global_step, self.accelerator)
            metrics = self.metric_means(self.train_metrics.take(self.accelerator))
            # The loss among the metrics is a mean over pairs; the loss of a log is the mean over optimizer steps.
            logs |= metrics | {"loss": logs["loss"] if loss is None else loss}
        super().log(logs, start_time)

    @override
    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        counted = self.args.include_num_input_tokens_seen
        if counted != "no":  # a prompt that two responses share counts once where they share it
            positions = inputs["tree_ids"] >= (-1 if counted == "all" else 0)
            own = positions.sum() * (DUMMY not in inputs)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(own.to(self.args.device)).sum())


class LossSinceLog:
    """The sum of the losses of the micro-batches since the last log, and the step of that log."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Clears the sum, as at the start of a run."""
        self._sum, self._step = torch.zeros(()), 0

    def add(self, loss: Tensor) -> None:
        """Adds the loss of a micro-batch; nothing leaves the device."""
        self._sum = self._sum.to(loss.device) + loss

    def take(self, step: int, accelerator: Accelerator) -> float | None:
        """Returns the mean loss of the steps since the last log over all processes; None if there was no step."""
        steps = step - self._step
        if steps <= 0:
            return None
        mean = accelerator.gather(self._sum.to(accelerator.device)[None]).mean().item() / steps
        self._sum, self._step = torch.zeros_like(self._sum), step
        return mean

    def state(self) -> dict[str, Any]:
        """Returns the sum and the step as JSON, for a checkpoint."""
        return {"sum": float(self._sum), "step": self._step}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state` returned."""
        self._sum, self._step = torch.tensor(state["sum"], dtype=torch.float32), state["step"]
