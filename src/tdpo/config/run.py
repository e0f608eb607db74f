"""Options of a run that both trainers share, on top of those of transformers."""

from __future__ import annotations

import inspect
import logging
import os
from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import TrainingArguments

from tdpo.config.arguments import FIXED
from tdpo.config.checks import check_values, documented, option, seconds
from tdpo.config.models import ModelConfig
from tdpo.errors import UserError

logger = logging.getLogger("tdpo")
APPLIED = "TDPO_ACCELERATE_CONFIG"
"""Environment variable that says which ``--accelerate_config`` has been applied to this process."""
LOADS_EMPTY = "FSDP_CPU_RAM_EFFICIENT_LOADING"
"""Environment variable by which accelerate lets every process but one load empty weights."""


@documented
@dataclass
class RunOptions(TrainingArguments):
    """The run: where it goes, and what differs from transformers' own defaults.

    Attributes:
        trust_remote_code: Allow models and tokenizers that bring Python code of their own to run it.
        model_init_kwargs: Further arguments of from_pretrained for model and reference, as JSON or a YAML mapping.
        learning_rate: The initial learning rate. The TDPO paper's is 5e-6.
        output_dir: Folder for the model, its checkpoints and metrics.
        logging_steps: Log every N optimizer steps.
        logging_first_step: Log the first step too.
        logging_nan_inf_filter: Hide losses that are not finite. Off: training stops there and names the rows.
        remove_unused_columns: Kept off: batches carry more than the model's own inputs.
        train_sampling_strategy: Order of the training data.
        disable_dropout: Train without dropout, so that policy and reference are compared as they are.
        router_aux_loss_coef: Weight of the load-balancing loss of a mixture-of-experts model, which is added to the
            loss and logged as aux_loss; default: the weight in the model's config where its output_router_logits is
            set. 0 leaves it out.
        resume: Resume from the newest checkpoint in --output_dir, if there is one.
        overwrite_output_dir: Write into --output_dir although it holds a model or checkpoints.
        max_time: Time training may take (90s, 45m, 11h30m): then it saves a checkpoint and exits with code 124.
        restore_callback_states_from_checkpoint: Restore the state of callbacks such as early stopping when resuming.
        accelerate_config: How processes divide the run: ddp, fsdp2, zero2, zero3, or a YAML file of accelerate's.
            Starts the processes where no launcher has.
        num_processes: Processes that --accelerate_config starts on this machine; default: one for each GPU.
    """

    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "model_init_kwargs"]  # noqa: RUF012

    trust_remote_code: bool = False
    model_init_kwargs: dict[str, Any] | str | None = None
    learning_rate: float = 5e-6
    output_dir: str | None = None
    logging_steps: float = 10
    logging_first_step: bool = True
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    train_sampling_strategy: str = option("random", choices=["random", "sequential"])
    disable_dropout: bool = True
    router_aux_loss_coef: float | None = None
    resume: bool = False
    overwrite_output_dir: bool = False
    max_time: str | None = None
    restore_callback_states_from_checkpoint: bool = True
    accelerate_config: str | None = None
    num_processes: int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuses unknown arguments, all at once, with their counterparts: what ``DPOConfig`` took may be among them.

        Raises:
            UserError: naming them.
        """
        known = inspect.signature(cls.__init__).parameters
        takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
        unknown = [name for name in kwargs if name not in known]
        if unknown and not takes_any:
            from tdpo.counterparts import hint

            raise UserError("\n".join(f"{cls.__name__} has no {n!r}.{hint(n, known)}" for n in unknown))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if self.max_time is not None:
            seconds(self.max_time)
        if self.accelerate_config != os.environ.get(APPLIED):
            raise UserError(
                "--accelerate_config acts before options are read: give it on the command line, not in a --config file "
                "or from Python"
            )
        if self.num_processes is not None and self.accelerate_config is None:
            raise UserError(
                "--num_processes says how many processes --accelerate_config starts; it has no effect alone"
            )
        for name, (value, reason) in FIXED.items():
            if getattr(self, name) != value:
                raise UserError(f"--{name} {reason}. Leave it at {value!r}")
        check_values(self, per_device_train_batch_size=1, per_device_eval_batch_size=1, gradient_accumulation_steps=1)
        check_values(self, learning_rate=0, router_aux_loss_coef=0, neftune_noise_alpha=0)
        if self.max_steps == 0:
            raise UserError("--max_steps 0 trains nothing: give a number of steps, or -1 to train --num_train_epochs")
        if self.max_steps < 0 and not self.num_train_epochs > 0:
            raise UserError(
                f"--num_train_epochs {self.num_train_epochs:g} trains nothing: give a positive number, or --max_steps"
            )
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        super().__post_init__()
        given = self.accelerator_config
        if given.split_batches or given.dispatch_batches or not given.even_batches:  # type: ignore[union-attr]
            raise UserError(
                "--accelerator_config: batches are distributed by tdpo; split, dispatch and even have no use"
            )
        # From here on every process loads whole weights, whatever the launcher's settings say.
        if os.environ.get(LOADS_EMPTY, "false").lower() in ("true", "1"):
            os.environ[LOADS_EMPTY] = "false"
            if os.environ.get("RANK", "0") == "0":
                logger.warning(
                    "fsdp_cpu_ram_efficient_loading is off: every process reads the whole model, to prove it"
                )
        if self.deepspeed_plugin is not None:
            from transformers.integrations import unset_hf_deepspeed_config

            unset_hf_deepspeed_config()  # what makes from_pretrained partition while it loads; accelerate has its own

    def model_config(self, model: Any) -> ModelConfig:
        """Describes how a trainer loads a model by its name.

        Args:
            model: The name, or a model that is loaded already.

        Raises:
            UserError: for ``model_init_kwargs`` beside a loaded model, which would ignore them.
        """
        if not isinstance(model, str) and self.model_init_kwargs:
            raise UserError(
                "model_init_kwargs has no effect on a model that is loaded already: pass the model's name, or load it "
                "with them"
            )
        return ModelConfig(
            model if isinstance(model, str) else "",
            trust_remote_code=self.trust_remote_code,
            model_init_kwargs=self.model_init_kwargs,
        )
