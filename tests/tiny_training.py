"""Trains a tiny model on tiny pairs: one helper for every test that needs a trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conftest import make_model, preference_rows

from tdpo import TDPOConfig, TDPOTrainer

DEFAULTS = {
    "max_steps": 3,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "per_device_train_batch_size": 8,
    "max_length": 96,
    "max_prompt_length": 48,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
}


def tiny_config(folder: Path, kind: Any = TDPOConfig, **fields: Any) -> Any:
    """Makes the options of a short run on the CPU; ``fields`` replace the defaults."""
    defaults = {name: value for name, value in DEFAULTS.items() if name in kind.__dataclass_fields__}
    return kind(output_dir=str(folder), **{**defaults, **fields})


def tiny_trainer(
    folder: Path,
    tokenizer: Any,
    model: Any = None,
    *,
    ref_model: Any = None,
    rows: Any = None,
    eval_rows: Any = None,
    peft_config: Any = None,
    callbacks: Any = None,
    optimizers: Any = (None, None),
    **fields: Any,
) -> TDPOTrainer:
    """Makes a trainer of ``model`` (a new tiny one) on ``rows`` (24 preference rows) with ``fields`` of TDPOConfig."""
    return TDPOTrainer(
        make_model(len(tokenizer)) if model is None else model,
        ref_model,
        tiny_config(folder, **fields),
        train_dataset=preference_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=callbacks,
        optimizers=optimizers,
    )


def train_tiny(folder: Path, tokenizer: Any, model: Any = None, **options: Any) -> TDPOTrainer:
    """Trains the trainer of :func:`tiny_trainer` and returns it."""
    trainer = tiny_trainer(folder, tokenizer, model, **options)
    trainer.train()
    return trainer


def weights(model: Any) -> torch.Tensor:
    """Returns all parameters of a model as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
