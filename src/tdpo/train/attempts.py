"""Restarts a run from its beginning, as ``auto_find_batch_size`` does when memory runs out."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerControl

from tdpo.train import checkpointing, progress


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
        self._run_state = trainer.run_state()
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
        trainer.load_run_state(self._run_state)
        progress.close_bars(trainer.callback_handler.callbacks)
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


def _changing(model: Any) -> list[tuple[str, Tensor]]:
    """Lists the tensors of a model that training changes: trained parameters, and buffers."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return [*trained, *model.named_buffers()]
