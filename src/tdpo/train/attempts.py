"""Restarts a run from its beginning, as ``auto_find_batch_size`` does when memory runs out."""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerControl

from tdpo.train import checkpointing

logger = logging.getLogger("tdpo")


class RunStart:
    """Keeps all state that an attempt to train changes; transformers does not reset it before the next one.

    Args:
        trainer: A :class:`~tdpo.train.base.BatchMeanTrainer` about to train. What it changes is copied to the CPU.
    """

    def __init__(self, trainer: Any) -> None:
        self._weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in _changing(trainer.model)}
        self._optimizers = trainer.optimizer, trainer.lr_scheduler
        self._optimizer_states = [
            (given, copy.deepcopy(given.state_dict())) for given in self._optimizers if given is not None
        ]
        self._parts = {name: part.state() for name, part in trainer.run_parts.items()}
        self._callbacks = [(callback, dict(vars(callback))) for callback in trainer.callback_handler.callbacks]
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state(), torch.cuda.get_rng_state_all()
        self._checkpoints = checkpointing.checkpoints(str(trainer.args.output_dir))

    def restore(self, trainer: Any) -> None:
        """Restores everything, and removes the checkpoints written since."""
        with torch.no_grad():
            for name, tensor in _changing(trainer.model):
                tensor.copy_(self._weights[name])
        trainer.optimizer, trainer.lr_scheduler = self._optimizers
        for given, state in self._optimizer_states:
            given.load_state_dict(copy.deepcopy(state))
        for name, part in trainer.run_parts.items():
            part.load(self._parts[name])
        trainer.progress.close()
        trainer.control = TrainerControl()
        for callback, attributes in self._callbacks:
            vars(callback).clear()
            vars(callback).update(attributes)
        random.setstate(self._random[0])
        np.random.set_state(self._random[1])
        torch.set_rng_state(self._random[2])
        torch.cuda.set_rng_state_all(self._random[3])  # none without a GPU
        for path in checkpointing.checkpoints(str(trainer.args.output_dir)):
            if path not in self._checkpoints:
                checkpointing.remove(path)


def restarting(trainer: Any) -> Callable[..., Any]:
    """Returns a trainer's inner loop, in which every attempt after the first restarts from the first one's start."""
    loop, start = type(trainer)._inner_training_loop, None

    def attempt(batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """Runs the loop, from the restored start if an attempt ran out of memory before."""
        nonlocal start
        if start is None:
            start = RunStart(trainer)
        else:
            logger.warning(
                "out of memory with %d rows a batch: training starts again from its beginning with %d, and an "
                "optimizer step takes fewer too; --gradient_accumulation_steps makes up for it",
                trainer._train_batch_size, batch_size,
            )  # fmt: skip
            start.restore(trainer)
        return loop(trainer, batch_size, *args, **kwargs)

    return attempt


def _changing(model: Any) -> list[tuple[str, Tensor]]:
    """Lists the tensors of a model that training changes: trained parameters, and buffers."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [*trained, *model.named_buffers()]
