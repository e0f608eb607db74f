"""What both trainers share: a loss that is a mean over the whole optimizer step, and progress that can be read."""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor, nn
from transformers import PrinterCallback, ProcessorMixin, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TrainerState
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from transformers.utils import ADAPTER_CONFIG_NAME

from tdpo.config import RunOptions, seconds
from tdpo.errors import Stopped, UserError
from tdpo.files import PARTIAL, check_writable, write_whole
from tdpo.models import sharding
from tdpo.models.adapters import has_adapter
from tdpo.models.compiling import compile_layers
from tdpo.models.load import load_weights
from tdpo.models.multimodal import copy_processor
from tdpo.models.own_loss import RouterLoss, find_router_loss, warn_of_other_terms
from tdpo.train import checkpoints, preflight
from tdpo.train.attempts import RunStart
from tdpo.train.interrupts import StopRequest, reason
from tdpo.train.progress import ProgressCallback as OurProgressCallback
from tdpo.train.sampling import FILLER, StepBatches, loader
from tdpo.train.vocabulary import VocabularyCallback

logger = logging.getLogger("tdpo")


class NonFiniteLoss(UserError):
    """The loss of a batch is NaN or infinite. Nothing was updated with it."""


def find_own_loss(model: nn.Module, args: RunOptions) -> RouterLoss | None:
    """Finds the router loss that is added to the loss, and warns of other terms of the model's own loss.

    Raises:
        UserError: as :func:`~tdpo.models.own_loss.find_router_loss`, and where its gradient would be lost.
    """
    router = find_router_loss(model, args.router_aux_loss_coef)
    checkpointing: Any = args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {}
    if router is not None and checkpointing.get("use_reentrant"):
        raise UserError(
            "--gradient_checkpointing_kwargs: with use_reentrant the router loss has no gradient; set it to false, or "
            "leave the router loss out with --router_aux_loss_coef 0"
        )
    warn_of_other_terms(model)
    return router


class BatchMeanTrainer(Trainer):
    """A Trainer whose loss is the mean over all items of an optimizer step, however it is cut into micro-batches.

    A subclass gives the batch's sum of losses (:meth:`loss_sum`) and says how many items it is over
    (:meth:`item_count`); accumulation of gradients then equals the large batch, also when the last one is short.
    """

    label = "training"
    args: RunOptions
    _evaluated: Tensor
    _aside: Path | None = None
    _agreed: Tensor | int = 0
    _begun = False
    _loading = ""
    _start: RunStart | None = None

    def __init__(self, *, args: RunOptions, callbacks: Iterable[TrainerCallback] | None = None, **kwargs: Any) -> None:
        if args.should_save:
            check_writable(Path(str(args.output_dir)))
        preflight.check_held_out(args, kwargs.get("eval_dataset") is not None)
        preflight.check_reporting(args)
        super().__init__(args=args, callbacks=list(callbacks or []), **kwargs)
        if args.n_gpu > 1:
            raise UserError(
                f"{args.n_gpu} GPUs are visible to one process: launch with torchrun or accelerate, one process a GPU, "
                "or set CUDA_VISIBLE_DEVICES to one"
            )
        if args.auto_find_batch_size and (self.is_fsdp_enabled or self.is_deepspeed_enabled or args.world_size > 1):
            raise UserError(
                "--auto_find_batch_size works in one process with whole weights: of several, one may run out of memory "
                "alone. Set a lower --per_device_train_batch_size and a higher --gradient_accumulation_steps, which "
                "give the same result"
            )
        self.loss_is_scaled_for_ga = False
        self.stop_request = StopRequest(None if args.max_time is None else seconds(args.max_time))
        self._rows_of_step: list[Tensor] = []
        self._loss_since_log, self._last_logged = torch.zeros(()), 0
        self.add_callback(_StopCallback(self))
        self.add_callback(VocabularyCallback())
        for standard in (ProgressCallback, PrinterCallback):
            self.remove_callback(standard)
        if not args.disable_tqdm:
            self.add_callback(OurProgressCallback(self.label))
        if self.train_dataset is not None:
            self._check_before_training()

    def _check_before_training(self) -> None:
        """Tries, before anything is trained, what would fail or prove to be without effect at the end."""
        model: Any = self.model
        dataset: Any = self.train_dataset
        preflight.check_trains(model, self.optimizer, self.args, len(dataset), self.accelerator.num_processes)
        if self.lr_scheduler is None:
            preflight.check_schedule(self.args)
        preflight.check_collator(self.data_collator, dataset)
        preflight.check_evaluation(self.args, self.eval_dataset, self.metric_names())
        preflight.add_end_of_responses(model, self.processing_class, dataset)
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        preflight.check_saving(model, self.processing_class, self.args, whole=not sharded)

    def metric_names(self) -> list[str]:
        """Lists the metrics that an evaluation reports, without prefix; a subclass that reports others adds them."""
        return ["loss"]

    def prepare_rows(self, data: Any) -> Any:
        """Makes a dataset of the rows handed to :meth:`evaluate` or :meth:`predict`, or several by name."""
        return data

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """As the Trainer's; what is compiled, if anything, are the layers, and they are by then."""
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": TorchDynamoPlugin(backend="no")}

    def compile_if_asked(self, *models: nn.Module) -> None:
        """Compiles the layers of some models where ``args.torch_compile`` says so."""
        if self.args.torch_compile:
            compile_layers(models, self.args.torch_compile_backend, self.args.torch_compile_mode)

    def create_accelerator_and_postprocess(self) -> None:
        """As the Trainer's, with FSDP on CPUs too."""
        on_cpus = sharding.allow_fsdp_on_cpus(self.args)
        super().create_accelerator_and_postprocess()
        if on_cpus:
            sharding.settle_fsdp_on_cpus(self.accelerator)
        sharding.settle(self.accelerator)

    def loss_sum(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The sum of the losses of a batch, differentiable, and whatever the caller may want of it."""
        raise NotImplementedError("abstract: a subclass defines the loss")

    def item_count(self, inputs: dict[str, Any]) -> int:
        """How many items (pairs, tokens) the sum of a batch is over."""
        raise NotImplementedError("abstract: a subclass counts its items")

    def rows_of(self, inputs: dict[str, Any]) -> str:
        """The source rows of a batch in words, for the message about a loss that is not finite."""
        raise NotImplementedError("abstract: a subclass names its rows")

    def count(self, outputs: Any, weight: float) -> None:
        """Adds what :meth:`loss_sum` said of a batch to the metrics; with weight 0 the batch is a filler."""

    def get_train_dataloader(self) -> Any:
        """Batches of this process; those of a step carry equal work, and no pair is repeated to fill the last ones."""
        dataset: Any = self.train_dataset
        if dataset is None:
            raise UserError("training needs a train_dataset")
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        shuffled = self.args.train_sampling_strategy != "sequential"
        return self._loader(
            dataset,
            self._train_batch_size,
            accumulation=self.args.gradient_accumulation_steps,
            seed=seed if shuffled else None,
            drop_last=self.args.dataloader_drop_last,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of this process, every pair in exactly one of all processes' batches."""
        held_out: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(held_out, str):
            held_out = self.eval_dataset[held_out]  # type: ignore[index]
        if held_out is None:
            raise UserError("evaluation needs an eval_dataset")
        return self._loader(held_out, self.args.eval_batch_size, accumulation=1, seed=None)

    def _loader(self, dataset: Any, batch_size: int, **order: Any) -> Any:
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        batches = StepBatches(dataset.lengths(), batch_size, processes=processes, process=process, **order)
        collate: Any = self.data_collator
        return loader(dataset, batches, collate, self.args)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """Collects the micro-batches of one optimizer step and counts the items of all processes in them.

        The reason to stop of each process goes along, so that all of them stop after the same step.
        """
        if self.state.global_step >= self.state.max_steps:  # resumed where it had ended; one more step is one too many
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._rows_of_step = [batch["pair_rows"] for batch in batches]
        items = sum(self.item_count(batch) for batch in batches if FILLER not in batch)
        told = self.accelerator.gather(torch.tensor([[items, self.stop_request.poll()]], device=device))
        self._agreed = told[:, 1].max()  # read after the step, which waits for the device anyway
        return batches, told[:, 0].sum()

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
        weight = 0.0 if inputs.pop(FILLER, False) else 1.0
        total, outputs = self.loss_sum(model, inputs)
        self.count(outputs, weight)
        total = total * weight
        if num_items_in_batch is None:
            loss = total / self.item_count(inputs)
        else:
            # transformers averages over micro-batches and data parallelism over processes; the sum is what is wanted.
            parts = getattr(self, "current_gradient_accumulation_steps", 1) * self.accelerator.num_processes
            loss = total * parts / num_items_in_batch
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
        self._loss_since_log = self._loss_since_log.to(loss.device) + loss
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's, with the mean loss since the last log also where that was before an interruption."""
        steps = self.state.global_step - self._last_logged
        if "loss" in logs and steps > 0:
            logs["loss"] = self.accelerator.gather(self._loss_since_log[None]).mean().item() / steps
            self._loss_since_log, self._last_logged = torch.zeros_like(self._loss_since_log), self.state.global_step
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clips, and stops before the optimizer would write a gradient that is not finite into the weights."""
        norm: Any = super()._clip_grad_norm(model)
        if hasattr(norm, "full_tensor"):  # of sharded gradients, each process has its part of the sum
            norm = norm.full_tensor()
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
        weight = 0.0 if inputs.pop(FILLER, False) else 1.0
        with torch.no_grad(), self.compute_loss_context_manager():
            total, outputs = self.loss_sum(model, inputs)
        self.count(outputs, weight)
        count = self.item_count(inputs)
        sums = torch.stack([total.double().cpu(), torch.tensor(float(count)).double()])
        self._evaluated = self._evaluated + weight * sums
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
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and not self._begun:
            raise UserError(
                "under FSDP and DeepSpeed an evaluation needs weights that training has shared out: evaluate after "
                "train(), or use --eval_on_start"
            )
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

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Evaluates; a dataset given here may be in any form ``train_dataset`` may be in."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self.prepare_rows(eval_dataset)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Computes the metrics of :meth:`evaluate` for some rows, under another prefix and without logging them.

        Returns:
            Its ``metrics`` are filled; ``predictions`` and ``label_ids`` are None, because no logits are kept.
        """
        return super().predict(self.prepare_rows(test_dataset), ignore_keys, metric_key_prefix)

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Makes the loader of :meth:`get_eval_dataloader`."""
        return self.get_eval_dataloader(test_dataset)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As ``transformers.Trainer.train``: True resumes from the newest whole checkpoint, with everything in it.

        Without an argument, ``args.resume_from_checkpoint`` and ``args.resume`` decide. The progress bar is closed
        whatever happens.

        Raises:
            UserError: if there is nothing to resume from, or data or batch size are not those of the checkpoint.
        """
        folder = self._checkpoint_of(resume_from_checkpoint)
        if self.is_world_process_zero():
            checkpoints.clear_partial(str(self.args.output_dir))
        self.reset_run_state()
        if folder is not None:
            self._restore(folder)
        self.stop_request.start()
        self._begun = True
        try:
            return super().train(None if folder is None else str(folder), *args, **kwargs)
        finally:
            self._start = None
            self.close_progress()
            if hasattr(self, "neftune_hook_handle"):  # an interrupted run would leave its noise on the model
                self.neftune_hook_handle.remove()

    def close_progress(self) -> None:
        """Closes the progress bar, if there is one."""
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, OurProgressCallback):
                callback.close()

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Runs the loop; a further attempt under ``auto_find_batch_size`` starts from where the first did."""
        if self.args.auto_find_batch_size and self._start is None:
            self._start = RunStart(self)
        elif self._start is not None:
            logger.warning(
                "out of memory with %d rows a batch: training starts again from its beginning with %d, and an "
                "optimizer step takes fewer too; --gradient_accumulation_steps makes up for it",
                self._train_batch_size, batch_size,
            )  # fmt: skip
            self._start.restore(self)
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def stop_code(self) -> int:
        """The exit code of the reason to stop that all processes agreed on, 0 if there is none."""
        code = int(self._agreed)
        return code if self.state.global_step < self.state.max_steps else 0

    def raise_if_stopped(self) -> None:
        """Raises if :meth:`train` returned before its end.

        Raises:
            Stopped: saying why, and from where the run can go on.
        """
        step, code = self.state.global_step, self.stop_code()
        if code:
            raise Stopped(
                f"{reason(code)} at step {step} of {self.state.max_steps}: saved checkpoint-{step}; the same command "
                "with --resume goes on from it",
                code,
            )

    def reset_run_state(self) -> None:
        """Clears the sums that an earlier call of :meth:`train` has left since its last log."""
        self._loss_since_log, self._last_logged, self._agreed = torch.zeros((), device=self.args.device), 0, 0

    def run_state(self) -> dict[str, Any]:
        """What this process remembers beside the Trainer's own state, as JSON: it makes resumed logs exact."""
        return {
            "loss_since_log": float(self._loss_since_log),
            "last_logged": self._last_logged,
            "pairs": len(self.train_dataset),  # type: ignore[arg-type]
            "pairs_per_step": self._pairs_per_step(),
            "processes": self.accelerator.num_processes,
        }

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`run_state` gave."""
        device = self.args.device
        self._loss_since_log = torch.tensor(state["loss_since_log"], dtype=torch.float32, device=device)
        self._last_logged = state["last_logged"]

    def _pairs_per_step(self) -> int:
        return self._train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes

    def _checkpoint_of(self, resume: str | bool | None) -> Path | None:
        if resume is None:
            resume = self.args.resume_from_checkpoint
        if resume is None and self.args.resume:
            return checkpoints.newest_whole(str(self.args.output_dir))[0]
        if resume is not True:
            return Path(resume) if resume else None
        newest, passed = checkpoints.newest_whole(str(self.args.output_dir))
        if newest is None:
            raise UserError("; ".join([f"{self.args.output_dir}: no whole checkpoint to resume from", *passed]))
        return newest

    def _restore(self, folder: Path) -> None:
        """Reads this process's :meth:`run_state`, if the run is the one that wrote it."""
        file = folder / checkpoints.run_state_name(self.accelerator.process_index)
        first = folder / checkpoints.run_state_name(0)
        if not first.is_file():
            logger.warning("%s was not written by tdpo: the log after resuming begins anew", folder)
            return
        state = json.loads((file if file.is_file() else first).read_text(encoding="utf-8"))
        if self.args.auto_find_batch_size:  # transformers takes the batch size that was found from there, but later
            found = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME)).train_batch_size
            self._train_batch_size = found or self._train_batch_size
        now = {"pairs": len(self.train_dataset), "pairs_per_step": self._pairs_per_step()}  # type: ignore[arg-type]
        for name, what in (("pairs", "pairs of training data"), ("pairs_per_step", "pairs per optimizer step")):
            if state[name] != now[name] and not self.args.ignore_data_skip:
                raise UserError(
                    f"{folder} was written with {state[name]} {what}, now there are {now[name]}: its place in the data "
                    "would be another. Use the same data, and the same product of processes, "
                    "--per_device_train_batch_size and --gradient_accumulation_steps; --ignore_data_skip starts the "
                    "data anew"
                )
        if state["processes"] != self.accelerator.num_processes:
            logger.warning(
                "%s was written by %d processes, now there are %d: random numbers and the first log will differ",
                folder, state["processes"], self.accelerator.num_processes,
            )  # fmt: skip
        elif file.is_file():
            self.load_run_state(state)

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints go: aside while one is being written."""
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """As the Trainer's, once the checkpoint has its name."""
        if self._aside is None:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """The Trainer's checkpoint, written aside, sealed and renamed, so that its name promises that it is whole.

        The Trainer writes into ``_get_output_dir()/checkpoint-N``; that folder is another one meanwhile, and everything
        else, for every kind of sharding, stays its business.
        """
        output_dir = Path(str(self.args.output_dir))
        final = output_dir / f"checkpoint-{self.state.global_step}"
        aside = final.with_name(final.name + PARTIAL)
        written = aside / final.name
        with checkpoints.told_what_stays(final.name, aside, output_dir):
            self._aside = aside
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = None
            self._complete(written, final)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                checkpoints.seal(written)
                checkpoints.publish(written, final)
            self.accelerator.wait_for_everyone()
            if self.accelerator.is_local_main_process and written.is_dir():  # this machine has a disk of its own
                checkpoints.seal(written)
                checkpoints.publish(written, final)
            shutil.rmtree(aside, ignore_errors=True)
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            checkpoints.rotate(output_dir, self.args.save_total_limit, final, best)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(final))

    def _complete(self, written: Path, final: Path) -> None:
        """Adds this process's own state to a checkpoint, and its final name where the Trainer noted the one aside."""
        if self.state.best_global_step == self.state.global_step:
            self.state.best_model_checkpoint = str(final)
            if self.args.should_save:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
        if not self.args.save_only_model:
            name = checkpoints.run_state_name(self.accelerator.process_index)
            (written / name).write_text(json.dumps(self.run_state()), encoding="utf-8")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the Trainer's; every file appears whole or not at all."""
        if _internal_call:
            super().save_model(output_dir, _internal_call)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        aside = folder / f"model{PARTIAL}"
        if self.is_fsdp_enabled:  # sharded state dicts are for resuming; a model is saved whole
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        with checkpoints.told_what_stays("the model", aside, folder):
            super().save_model(str(aside), _internal_call=True)
            if self.args.should_save:
                checkpoints.move_into(aside, folder)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As the Trainer's; a tied weight, which a gathered state dict holds under two names, is written once.

        A multimodal model named without its processor keeps the processor's files.
        """
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if state_dict:
            state_dict = {name: weight for name, weight in state_dict.items() if tied.get(name) not in state_dict}
        super()._save(output_dir, state_dict)
        if self.args.should_save and not isinstance(self.processing_class, ProcessorMixin):
            copy_processor(self.model, Path(output_dir or str(self.args.output_dir)))

        model: Any = self.model
        if has_adapter(model) and self.args.should_save and model.get_base_model().can_generate():
            # The end tokens of the trained model; `tdpo merge` and every command that loads the adapter read them.
            model.get_base_model().generation_config.save_pretrained(output_dir or str(self.args.output_dir))

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """As the Trainer's; without network or login there is one message."""
        try:
            super().init_hf_repo(token, private)
        except Exception as error:
            reason = next(iter(str(error).splitlines()), "")
            raise UserError(f"--push_to_hub: no repository can be made: {type(error).__name__}: {reason}") from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As the Trainer's, also where the names of weights on disk are not those of the model's modules."""
        self._loading = resume_from_checkpoint
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Loads what the Trainer did not find by name; a tied weight is saved once and lacks nothing."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        if load_result.unexpected_keys or set(load_result.missing_keys) - set(tied):
            load_weights(self.model, self._loading)

    def _load_best_model(self) -> None:
        """Loads the best checkpoint, also of an adapter with a name, which has a folder of its own there."""
        best, model = self.state.best_model_checkpoint, self.model
        self._loading = str(best)
        if has_adapter(model):
            own = Path(str(best)) / str(model.active_adapters[0])  # type: ignore[union-attr,index]
            self.state.best_model_checkpoint = str(own) if (own / ADAPTER_CONFIG_NAME).is_file() else best
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = best

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Counts the positions of all processes, or those that are not padding, for ``include_num_input_tokens_seen``.

        A prompt that two responses share counts once where they share it.
        """
        counted = self.args.include_num_input_tokens_seen
        if counted != "no":
            positions = inputs["tree_ids"] >= (-1 if counted == "all" else 0)
            own = positions.sum() * (FILLER not in inputs)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(own.to(self.args.device)).sum())

    def save_state(self) -> None:
        """As the Trainer's; the file appears whole or not at all."""
        if self.args.should_save:
            path = Path(str(self.args.output_dir)) / TRAINER_STATE_NAME
            partial = path.with_name(path.name + PARTIAL)
            self.state.save_to_json(str(partial))
            partial.replace(path)

    def save_metrics(self, split: str, metrics: dict[str, float], combined: bool = True) -> None:
        """As the Trainer's; the files appear whole or not at all."""
        if not self.is_world_process_zero():
            return
        folder = Path(str(self.args.output_dir))
        together = folder / "all_results.json"
        files = {folder / f"{split}_results.json": metrics}
        if combined:
            earlier = json.loads(together.read_text(encoding="utf-8")) if together.is_file() else {}
            files[together] = {**earlier, **metrics}
        for path, content in files.items():
            write_whole(path, json.dumps(content, indent=4, sort_keys=True) + "\n")


class _StopCallback(TrainerCallback):
    """Saves and stops after the step in which the processes agreed to."""

    def __init__(self, trainer: BatchMeanTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Asks the loop to save and to stop."""
        if self.trainer.stop_code():
            control.should_save = control.should_training_stop = True
