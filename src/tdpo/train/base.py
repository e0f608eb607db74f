"""The trainer that both kinds of training share: its preparation, its data loader and its run."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import TorchDynamoPlugin
from torch import nn
from transformers import PrinterCallback, ProgressCallback, TrainerCallback, set_seed
from typing_extensions import override

from tdpo.config import ModelConfig, RunOptions, seconds
from tdpo.distributed import sharding
from tdpo.errors import UserError
from tdpo.files import check_writable
from tdpo.models.adapters import warn_of_dropout
from tdpo.models.compiling import compile_layers, uncompiled
from tdpo.models.load import load_model
from tdpo.models.multimodal import freeze_idle_parts
from tdpo.models.own_loss import RouterLoss, find_router_loss, warn_of_other_terms
from tdpo.train import checkpointing, preflight, progress
from tdpo.train.attempts import RunStart
from tdpo.train.checkpointing import CheckpointingTrainer
from tdpo.train.evaluation import EvaluatingTrainer
from tdpo.train.inputs import prepare_held_out, prepare_training
from tdpo.train.metrics import Sums
from tdpo.train.sampling import make_loader
from tdpo.train.step import LossSinceLog, NonFiniteLoss
from tdpo.train.stopping import StopCallback, StopRequest

__all__ = ["BatchMeanTrainer", "NonFiniteLoss", "load_policy", "prepare_policy"]
logger = logging.getLogger("tdpo")


def load_policy(model: str | nn.Module, args: RunOptions) -> tuple[Any, ModelConfig]:
    """Returns the model to train, loaded if it is a name, and the options it is loaded with."""
    set_seed(args.seed)  # a new adapter's weights are drawn before the Trainer does it
    config = args.model_config(model)
    return load_model(config, trainable=True) if isinstance(model, str) else uncompiled(model), config


def prepare_policy(policy: nn.Module, args: RunOptions, peft_config: Any) -> RouterLoss | None:
    """Freezes what gets no gradient, opens the forward for the loss and finds the router loss that is added to it.

    Raises:
        UserError: as :func:`~tdpo.models.own_loss.find_router_loss`, and where its gradient would be lost.
    """
    if args.disable_dropout:
        warn_of_dropout(peft_config)
    freeze_idle_parts(policy)
    router = find_router_loss(policy, args.router_aux_loss_coef)
    checkpointing: Any = args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {}
    if router is not None and checkpointing.get("use_reentrant"):
        raise UserError(
            "--gradient_checkpointing_kwargs: with use_reentrant the router loss has no gradient; set it to false, or "
            "leave the router loss out with --router_aux_loss_coef 0"
        )
    warn_of_other_terms(policy)
    return router


class BatchMeanTrainer(EvaluatingTrainer, CheckpointingTrainer):
    """A Trainer with the step of :mod:`~tdpo.train.step`, exact evaluation, atomic checkpoints and agreed stops.

    A subclass prepares models and what :meth:`prepare_dataset` needs, then calls this constructor.
    """

    label = "training"
    args: RunOptions
    _start: RunStart | None = None

    def __init__(
        self,
        *,
        args: RunOptions,
        train_dataset: Iterable[Any] | None,
        eval_dataset: Iterable[Any] | Mapping[str, Iterable[Any]] | None,
        callbacks: Iterable[TrainerCallback] | None,
        **kwargs: Any,
    ) -> None:
        if train_dataset is not None:
            train_dataset = prepare_training(train_dataset, args, partial(self.prepare_dataset, name="train"))
        held_out = prepare_held_out(eval_dataset, self.prepare_dataset)
        if args.should_save:
            check_writable(Path(str(args.output_dir)))
        preflight.check_held_out(args, held_out is not None)
        preflight.check_reporting(args)
        super().__init__(
            args=args, train_dataset=train_dataset, eval_dataset=held_out, callbacks=list(callbacks or []), **kwargs
        )
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        preflight.check_processes(args, sharded)
        self.loss_is_scaled_for_ga = False
        self.loss_since_log, self.train_metrics, self._step_losses = LossSinceLog(), Sums(), []
        self.run_parts = {"loss": self.loss_since_log}
        self.checkpoint_files = []
        self.stop_request = StopRequest(None if args.max_time is None else seconds(args.max_time))
        self.add_callback(StopCallback(self.stop_request))
        self.add_callback(preflight.VocabularyCallback())
        for standard in (ProgressCallback, PrinterCallback):
            self.remove_callback(standard)
        if not args.disable_tqdm:
            self.add_callback(progress.ProgressCallback(self.label))
        if train_dataset is not None:
            preflight.check_training(self, sharded)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        """Switches off accelerate's compilation; layers are compiled one by one."""
        return {**super()._build_accelerator_args(**kwargs), "dynamo_plugin": TorchDynamoPlugin(backend="no")}

    @override
    def create_accelerator_and_postprocess(self) -> None:
        on_cpus = sharding.allow_fsdp_on_cpus(self.args)
        super().create_accelerator_and_postprocess()
        if on_cpus:
            sharding.settle_fsdp_on_cpus(self.accelerator)
        sharding.override_engine_settings(self.accelerator)

    def get_train_dataloader(self) -> Any:
        """Returns the batches of this process; those of a step carry equal work, and no row is repeated to fill one."""
        if self.train_dataset is None:
            raise UserError("training needs a train_dataset")
        args = self.args
        seed = args.data_seed if args.data_seed is not None else args.seed
        return make_loader(
            self.train_dataset,
            self._train_batch_size,
            self.data_collator,
            args,
            args.gradient_accumulation_steps,
            None if args.train_sampling_strategy == "sequential" else seed,
            args.dataloader_drop_last,
        )

    def compile_models(self, *models: nn.Module) -> None:
        """Compiles the layers of some models if ``args.torch_compile`` is on."""
        if self.args.torch_compile:
            compile_layers(models, self.args.torch_compile_backend, self.args.torch_compile_mode)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as ``transformers.Trainer.train``; True resumes from the newest complete checkpoint.

        Without an argument, ``args.resume_from_checkpoint`` and ``args.resume`` decide.

        Raises:
            UserError: if there is nothing to resume from, or data or batch size are not those of the checkpoint.
        """
        folder = checkpointing.find_checkpoint(self.args, resume_from_checkpoint)
        if self.is_world_process_zero():
            checkpointing.clear_partial(str(self.args.output_dir))
        for part in self.run_parts.values():
            part.reset()
        if folder is not None:
            self._restore_run_state(folder)
            for file in self.checkpoint_files:
                file.load(folder)
        self.stop_request.start()
        self.has_trained = True
        try:
            return super().train(None if folder is None else str(folder), *args, **kwargs)
        finally:
            self._start = None
            progress.close_bars(self.callback_handler.callbacks)
            if hasattr(self, "neftune_hook_handle"):  # an interrupted run would leave its noise on the model
                self.neftune_hook_handle.remove()

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
