"""The record of a run: ``run.jsonl`` in its folder, from which ``tdpo report`` draws its page.

One JSON object a line, in the order of time: ``start`` (settings, data, environment), ``log`` and ``end``. A line is
written when it happens, so the record of a run that was killed is complete up to its last log.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import platform
import resource
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback
from typing_extensions import override

from tdpo import __version__
from tdpo.config import RunOptions
from tdpo.distributed.sharding import count_weights

logger = logging.getLogger("tdpo")
FILE = "run.jsonl"
SETTINGS_NAMED = {"learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"}
"""Settings that are recorded even at their default."""
SETTINGS_LEFT_OUT = {
    "output_dir", "logging_dir", "run_name", "resume", "overwrite_output_dir", "accelerator_config", "debug",
    "dataloader_pin_memory", "disable_tqdm", "do_eval",
}  # fmt: skip
"""Settings that name folders, or that transformers sets itself."""


class RecordCallback(TrainerCallback):
    """Writes the record of a run, on the main process only. A failure to write is reported once and stops nothing.

    Args:
        trainer: The trainer.
        about: What else the first line says, by name.

    Attributes:
        start: The content of the first line; empty before training, and in other processes than the first.
    """

    def __init__(self, trainer: Any, **about: Any) -> None:
        self.trainer, self.about = trainer, about
        self.start: dict[str, Any] = {}
        self._failed = False

    def write(self, event: str, state: Any, **content: Any) -> None:
        """Appends a line to the record; the first line of a new run replaces that of an earlier run in the folder."""
        if not (state.is_world_process_zero and self.trainer.args.should_save) or self._failed:
            return
        path = Path(str(self.trainer.args.output_dir)).expanduser() / FILE
        line = {"event": event, "time": time.time(), "step": state.global_step, **content}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w" if event == "start" and state.global_step == 0 else "a", encoding="utf-8") as file:
                file.write(json.dumps(line, default=str) + "\n")
        except OSError as error:
            self._failed = True
            logger.warning("%s: cannot be written (%s); tdpo report will miss the rest of this run", path, error)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        trainer = self.trainer
        held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"eval": trainer.eval_dataset}
        data = {name: _describe(rows) for name, rows in ({"train": trainer.train_dataset} | held_out).items()}
        about = {name: value if isinstance(value, float) else str(value) for name, value in self.about.items()}
        self.start = {
            "kind": trainer.label, "command": command_line(sys.argv), "steps": state.max_steps,
            "settings": settings(args), "model": getattr(model.config, "_name_or_path", ""),
            "weights": count_weights(model)[1],
            "per_step": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "data": {name: found for name, found in data.items() if found}, "environment": environment(args), **about,
        }  # fmt: skip
        self.write("start", state, **self.start)

    @override
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.write("log", state, memory=peak_memory(), **(logs or {}))

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        code = self.trainer.stop_request.code
        self.write("end", state, status=f"stopped with code {code}" if code else "finished")


def command_line(words: Sequence[str]) -> str:
    """Returns the command without secrets.

    Examples:
        >>> command_line(["/usr/bin/tdpo", "train", "--hub_token", "hf_x", "--beta", "0.1"])
        'tdpo train --hub_token ... --beta 0.1'
    """
    pairs = zip(["", *words], words, strict=False)
    shown = ["..." if before.startswith("--") and before.endswith("token") else word for before, word in pairs]
    return shlex.join([Path(shown[0]).name, *shown[1:]])


def settings(args: RunOptions) -> dict[str, Any]:
    """Returns the options that are not at their defaults, and a few that matter anyway; tokens are left out."""
    values, given = args.to_dict(), {}
    for field in dataclasses.fields(args):
        value = values.get(field.name)
        standard = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        differs = value != standard and str(value) != str(getattr(standard, "value", standard))
        secret = field.name.endswith("token")
        if (differs or field.name in SETTINGS_NAMED) and not secret and field.name not in SETTINGS_LEFT_OUT:
            given[field.name] = value
    return {name: value for name, value in given.items() if value not in (None, False, [], {})} | {
        name: False
        for name, value in given.items()
        if value is False and args.__dataclass_fields__[name].default is True
    }


def environment(args: RunOptions) -> dict[str, str]:
    """Returns versions and hardware."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "tdpo": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
        "python": platform.python_version(), "system": platform.platform(terse=True), "device": device,
        "processes": str(args.world_size),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "as the weights",
    }  # fmt: skip


def peak_memory() -> int:
    """Returns the largest memory of this process so far in bytes: of the GPU where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _describe(rows: Any) -> dict[str, Any] | None:
    """Returns the counts of a dataset and the lines of its report; None for no data."""
    if rows is None:
        return None
    report = getattr(rows, "report", None)
    if report is None:
        return {"rows": len(rows)}
    described = {"rows": len(rows), "source": report.source, "read": report.read, "lines": report.lines()}
    return described | ({"fingerprint": rows.fingerprint()} if hasattr(rows, "fingerprint") else {})
