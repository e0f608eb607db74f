"""The trainer that both kinds of training share: its preparation, its data loader and its run."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import TorchDynamoPlugin, parse_flag_from_env
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
from tdpo.train.metrics import Sums
from tdpo.train.record import RecordCallback
from tdpo.train.sampling import make_loader
from tdpo.train.step import StepTrainer
from tdpo.train.stopping import StopRequest


def load_policy(model: str | nn.Module, args: RunOptions) -> tuple[Any, ModelConfig]:
    """Returns the model to train, loaded if it is a name, and the options it is loaded with."""
    set_seed(args.seed)  # a new adapter's weights are drawn before the Trainer does it
    config = args.model_config(model)
    return load_model(config, trainable=True) if isinstance(model, str) else uncompiled(model), config


def place(model: Any, args: RunOptions) -> None:
    """Moves a model to the device it will run on, before it is probed: what attention can do depends on the device.

    A model that an engine will shard, or whose place is decided already, stays where it is, as in transformers.
    """
    sharded = args.fsdp or args.deepspeed_plugin is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")
    decided = getattr(model, "hf_device_map", None) is not None or hasattr(model, "quantization_method")
    elsewhere = {weight.device.type for weight in model.parameters()} - {args.device.type, "meta"}
    if elsewhere and not (sharded or decided):
        model.to(args.device)


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


class BatchMeanTrainer(StepTrainer):
    """A Trainer with the step of :mod:`~tdpo.train.step`, atomic checkpoints and agreed stops.

    A subclass prepares models and what :meth:`prepare_dataset` needs, then calls this constructor.
    """

    label = "training"

    def __init__(
        self,
        *,
        args: RunOptions,
        train_dataset: Iterable[Any] | None,
        eval_dataset: Iterable[Any] | Mapping[str, Iterable[Any]] | None,
        callbacks: Iterable[TrainerCallback] | None,
        **kwargs: Any,
    ) -> None:
        train_dataset = preflight.prepare_rows(train_dataset, "train_dataset", self.prepare_dataset, args)
        held_out = preflight.prepare_rows(eval_dataset, "eval_dataset", self.prepare_dataset)
        if args.should_save:
            check_writable(Path(str(args.output_dir)))
        preflight.check_arguments(args, held_out is not None)
        super().__init__(
            args=args, train_dataset=train_dataset, eval_dataset=held_out, callbacks=list(callbacks or []), **kwargs
        )
        self.loss_is_scaled_for_ga = False
        self.train_metrics, self._step_losses = Sums(), []
        self.stop_request = StopRequest(None if args.max_time is None else seconds(args.max_time))
        run = RunCallback(weakref.proxy(self))  # a reference back would keep the models beyond the trainer's end
        self.add_callback(run)
        self.record = RecordCallback(weakref.proxy(self))
        self.add_callback(self.record)
        self.run_parts, self.checkpoint_files = {"loss": run}, []
        for standard in (ProgressCallback, PrinterCallback):
            self.remove_callback(standard)
        self.progress = progress.ProgressCallback(self.label)
        if not args.disable_tqdm:
            self.add_callback(self.progress)
        preflight.check_trainer(self, sharded=self.is_fsdp_enabled or self.is_deepspeed_enabled)

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

    @override
    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")  # layers are compiled one by one
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

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Returns the batches of this process; every row is in exactly one batch of all processes.

        Args:
            eval_dataset: Rows in any form that ``train_dataset`` may be in, or the name of one of several held-out
                datasets; None for the held-out data of the trainer.
        """
        if eval_dataset is None:
            held_out: Any = self.eval_dataset
        elif isinstance(eval_dataset, str):
            held_out = self.eval_dataset[eval_dataset]  # type: ignore[index]
        else:
            held_out = preflight.prepare_rows(eval_dataset, "eval_dataset", self.prepare_dataset)
        if held_out is None:
            raise UserError("evaluation needs an eval_dataset")
        return make_loader(held_out, self.args.eval_batch_size, self.data_collator, self.args)

    @override
    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self.get_eval_dataloader(test_dataset)

    @override
    def stopping(self) -> bool:
        return bool(self.stop_request.stop_code(self.state))

    @override
    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Also asks for a checkpoint of a run that stops: --save_strategy best would save none."""
        return super()._determine_best_metric(metrics, trial) or self.stopping()

    @override
    def _finalize_training(self, *args: Any) -> Any:
        """Keeps the checkpoint that a stopped run resumes from: with a limit of one only the best would stay."""
        limit = self.args.save_total_limit
        if self.stopping():
            self.args.save_total_limit = None
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def compile_models(self, *models: nn.Module) -> None:
        """Compiles the layers of some models as ``args`` say."""
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
        states = {} if folder is None else checkpointing.restore_run(self, folder)
        for name, part in self.run_parts.items():
            part.load(states.get(name, {}))
        self.stop_request.start()
        self.has_trained = True
        if self.args.auto_find_batch_size:
            from tdpo.train.attempts import restarting  # few runs need it

            self._inner_training_loop = restarting(self)  # type: ignore[method-assign]
        try:
            return super().train(None if folder is None else str(folder), *args, **kwargs)
        finally:
            self.progress.close()
            vars(self).pop("_inner_training_loop", None)
            if hasattr(self, "neftune_hook_handle"):  # an interrupted run would leave its noise on the model
                self.neftune_hook_handle.remove()


class RunCallback(TrainerCallback):
    """Stops a run where its processes agreed to, and makes the first loss logged after resuming exact.

    The Trainer would start the mean loss since the last log from zero, so a checkpoint has its sum so far.

    Args:
        trainer: The trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._loaded: dict[str, Any] | None = {}

    def state(self) -> dict[str, Any]:
        """Returns the sum of the losses since the last log and the step of that log, for a checkpoint."""
        if self._loaded is not None:  # training has not begun
            return self._loaded
        return {"sum": float(self.trainer._tr_loss), "step": self.trainer._globalstep_last_logged}

    def load(self, state: dict[str, Any]) -> None:
        """Restores what :meth:`state` returned once training begins; an empty state is that of a run's start."""
        self._loaded = state

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        trainer = self.trainer
        preflight.drop_unknown_tokens(model)
        if self._loaded:
            trainer._tr_loss += self._loaded["sum"]
            trainer._total_loss_scalar -= self._loaded["sum"]  # train_loss is over the steps of this run
            trainer._globalstep_last_logged = self._loaded["step"]
        self._loaded = None
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            local, total = sharding.count_weights(model)
            if local < total and state.is_world_process_zero:
                print(f"weights: sharded, {local:,} of {total:,} in this process")

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stop_request.stop_code(state):
            control.should_save = control.should_training_stop = True

    @override
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Undoes what transformers asks for after a stop within an epoch: the end of the epoch is yet to come."""
        if state.epoch % 1 and self.trainer.stop_request.stop_code(state):
            control.should_log = control.should_evaluate = control.should_save = False
