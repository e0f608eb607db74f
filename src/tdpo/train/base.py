"""What both trainers share: a loss that is a mean over the whole optimizer step, and progress that can be read."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput

from tdpo.config import RunOptions
from tdpo.errors import UserError
from tdpo.train.progress import ProgressCallback as OurProgressCallback
from tdpo.train.sampling import BalancedSampler

logger = logging.getLogger("tdpo")


class NonFiniteLoss(UserError):
    """The loss of a batch is NaN or infinite. Nothing was updated with it."""


class BatchMeanTrainer(Trainer):
    """A Trainer whose loss is the mean over all items of an optimizer step, however it is cut into micro-batches.

    A subclass gives the batch's sum of losses (:meth:`loss_sum`) and says how many items it is over
    (:meth:`item_count`); accumulation of gradients then equals the large batch, also when the last one is short.
    """

    label = "training"
    args: RunOptions
    _evaluated: Tensor

    def __init__(self, *, args: RunOptions, callbacks: Iterable[TrainerCallback] | None = None, **kwargs: Any) -> None:
        super().__init__(args=args, callbacks=list(callbacks or []), **kwargs)
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs are visible to one process: launch with torchrun or accelerate, one process a GPU, "
                "or set CUDA_VISIBLE_DEVICES to one"
            )
        self.loss_is_scaled_for_ga = True
        self._rows_of_step: list[Tensor] = []
        for standard in (ProgressCallback, PrinterCallback):
            self.remove_callback(standard)
        if not args.disable_tqdm:
            self.add_callback(OurProgressCallback(self.label))

    def loss_sum(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The sum of the losses of a batch, differentiable, and whatever the caller may want of it."""
        raise NotImplementedError("abstract: a subclass defines the loss")

    def item_count(self, inputs: dict[str, Any]) -> int:
        """How many items (pairs, tokens) the sum of a batch is over."""
        raise NotImplementedError("abstract: a subclass counts its items")

    def rows_of(self, inputs: dict[str, Any]) -> str:
        """The source rows of a batch in words, for the message about a loss that is not finite."""
        raise NotImplementedError("abstract: a subclass names its rows")

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """The order of training: shuffled or as it is, dealt to micro-batches of equal work."""
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        if not hasattr(dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return BalancedSampler(
            dataset.lengths(),
            self._train_batch_size,
            self.args.gradient_accumulation_steps * self.accelerator.num_processes,
            None if self.args.train_sampling_strategy == "sequential" else seed,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Collects the micro-batches of one optimizer step and counts the items of all processes in them."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._rows_of_step = [batch["pair_rows"] for batch in batches]
        count = torch.tensor(sum(self.item_count(batch) for batch in batches), device=device)
        return batches, self.accelerator.gather(count).sum()

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The batch's share of the mean over ``num_items_in_batch`` items, or over its own where that is None."""
        total, outputs = self.loss_sum(model, inputs)
        if num_items_in_batch is None:
            loss = total / self.item_count(inputs)
        else:
            # Data parallelism averages gradients over processes; the sum over all items is what is wanted.
            loss = total * self.accelerator.num_processes / num_items_in_batch
        return (loss, outputs) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch. Its loss is looked at before the optimizer sees it.

        Raises:
            NonFiniteLoss: naming the rows; checkpoints written earlier stay as they are.
        """
        loss = super().training_step(model, inputs, num_items_in_batch)
        # Takes the place of the same look that transformers' logging_nan_inf_filter costs, which hides what it finds.
        if not self.args.logging_nan_inf_filter and not torch.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, in {self.rows_of(inputs)}. Nothing "
                "was updated with it; look at these rows, or lower --learning_rate"
            )
        return loss

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clips, and stops before the optimizer would write a gradient that is not finite into the weights."""
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(float(norm)):
            where = "; ".join(self.rows_of({"pair_rows": part}) for part in self._rows_of_step)
            raise NonFiniteLoss(
                f"the gradient is {float(norm)} at step {self.state.global_step + 1}, in {where}. Nothing was "
                "updated with it; look at these rows, or lower --learning_rate"
            )
        return norm

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss of a batch without gradient; what it adds up to is asked of :meth:`end_evaluation`."""
        with torch.no_grad(), self.compute_loss_context_manager():
            total, _ = self.loss_sum(model, inputs)
        count = self.item_count(inputs)
        self._evaluated = self._evaluated + torch.stack([total.double().cpu(), torch.tensor(float(count)).double()])
        return total / count, None, None

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As the Trainer's, with exact means over all items instead of means of batch means."""
        self.begin_evaluation()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        exact = {f"{metric_key_prefix}_{name}": value for name, value in self.end_evaluation().items()}
        return output._replace(metrics={**(output.metrics or {}), **exact})

    def begin_evaluation(self) -> None:
        """Called before the first batch of an evaluation."""
        self._evaluated = torch.zeros(2, dtype=torch.float64)

    def end_evaluation(self) -> dict[str, float]:
        """The metrics of the evaluation that just ended, over all processes, without prefix."""
        total, count = self.accelerator.gather(self._evaluated.float().to(self.args.device)[None]).sum(0).tolist()
        return {"loss": total / max(count, 1.0)}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As ``transformers.Trainer.train``; the progress bar is closed whatever happens."""
        try:
            return super().train(*args, **kwargs)
        finally:
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, OurProgressCallback):
                    callback.close()
