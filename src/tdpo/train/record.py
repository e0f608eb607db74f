"""The record of a run: ``run.jsonl`` in its folder, from which ``tdpo report`` draws its page.

One JSON object a line, in the order of time: ``start`` (settings, data, environment), ``log`` and ``end``. A line is
written when it happens, so the record of a run that was killed is complete up to its last log.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import platform
import re
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
HIDDEN = "..."
"""What stands in the place of a secret."""
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

    Attributes:
        about: Further content of the first line, by name.
        start: The content of the first line; empty before training, and in other processes than the first.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.about: dict[str, Any] = {}
        self.start: dict[str, Any] = {}
        self._failed = False

    def write(self, event: str, state: Any, **content: Any) -> None:
        """Appends a line to the record; the first line of a new run replaces that of an earlier run in the folder."""
        if not (state.is_world_process_zero and self.trainer.args.should_save) or self._failed:
            return
        path = Path(str(self.trainer.args.output_dir)).expanduser() / FILE
        line = {"event": event, "time": time.time(), "step": state.global_step, **content}
        text = json.dumps(line, default=str) + "\n"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if state.global_step and event == "start" and path.is_file() and not path.read_bytes().endswith(b"\n"):
                text = "\n" + text  # a killed run left half a line
            with path.open("w" if event == "start" and state.global_step == 0 else "a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self._failed = True
            logger.warning("%s: cannot be written (%s); tdpo report will miss the rest of this run", path, error)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        trainer = self.trainer
        held_out = trainer.eval_dataset if isinstance(trainer.eval_dataset, dict) else {"": trainer.eval_dataset}
        parts = {"train": trainer.train_dataset} | {f"eval {name}".strip(): rows for name, rows in held_out.items()}
        data = {name: _describe(rows) for name, rows in parts.items()}
        about = {name: value if isinstance(value, float) else str(value) for name, value in self.about.items()}
        self.start = {
            "kind": trainer.label, "command": command_line(sys.argv), "steps": state.max_steps,
            "settings": settings(args), "model": getattr(model.config, "_name_or_path", ""),
            "weights": count_weights(model)[1],
            "per_step": trainer._train_batch_size * args.gradient_accumulation_steps * args.world_size,
            "data": {name: found for name, found in data.items() if found}, "environment": environment(args), **about,
        }  # fmt: skip
        self.write("start", state, **self.start)

    @override
    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.start:  # not for an evaluation without training, in the folder of an earlier run perhaps
            self.write("log", state, memory=peak_memory(), **(logs or {}))

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        code = self.trainer.stop_request.stop_code(state)
        self.write("end", state, status=f"stopped with code {code}" if code else "finished")


def command_line(words: Sequence[str]) -> str:
    r"""Returns the command without secrets.

    Examples:
        >>> command_line(["/usr/bin/tdpo", "train", "--hub_token", "hf_x", "--beta=0.1", "--api_key=k"])
        'tdpo train --hub_token ... --beta=0.1 --api_key=...'
        >>> command_line(["/lib/tdpo/__main__.py", "eval"])
        'tdpo eval'
        >>> command_line(["-m", "train", "--model_init_kwargs", '{"token": "hf_x", "eos_token": "</s>"}'])
        '-m train --model_init_kwargs \'{"token": "...", "eos_token": "</s>"}\''
    """
    shown: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        name, separator, value = word.partition("=")
        if before.startswith("--") and "=" not in before and _is_secret(before):
            word = HIDDEN
        elif separator and name.startswith("--"):
            word = f"{name}={HIDDEN if _is_secret(name) else _without_secrets(value)}"
        else:
            word = _without_secrets(word)
        shown.append(word.encode("utf-8", "backslashreplace").decode())  # file names may be any bytes
    program = Path(shown[0])
    # `python -m tdpo`, and processes that were launched
    return shlex.join([program.parent.name if program.name == "__main__.py" else program.name, *shown[1:]])


def _is_secret(name: str) -> bool:
    """Returns whether an option or a key holds a secret, by its name; tokens of text are none."""
    name = name.lstrip("-").lower()
    return bool(re.search(r"(token|key|secret|password)$", name)) and not re.search(r"(eos|bos|pad|unk)_token$", name)


def _without_secrets(value: Any) -> Any:
    """Hides the secrets in mappings, lists, and texts that are JSON objects."""
    if isinstance(value, dict):
        return {key: HIDDEN if _is_secret(str(key)) else _without_secrets(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_secrets(item) for item in value]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.dumps(_without_secrets(json.loads(value)))
        except ValueError:
            return HIDDEN
    return value


def public(args: RunOptions) -> RunOptions:
    """Returns a copy of the options without secrets, for ``training_args.bin``, which is uploaded with a model."""
    shown = copy.copy(args)
    for field in dataclasses.fields(args):
        value = getattr(args, field.name)
        setattr(shown, field.name, None if _is_secret(field.name) else _without_secrets(value))
    return shown


class Shown:
    """Options of a run that are saved without secrets, as :func:`public` gives them, and else are the options."""

    def __init__(self, args: RunOptions) -> None:
        self._args = args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)

    def __reduce__(self) -> Any:
        return copy.copy, (public(self._args),)


def settings(args: RunOptions) -> dict[str, Any]:
    """Returns the options that are not at their defaults, and a few that matter anyway; secrets are left out."""
    values, given = args.to_dict(), {}
    for field in dataclasses.fields(args):
        name, value = field.name, values.get(field.name)
        standard = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        differs = value != standard and str(value) != str(getattr(standard, "value", standard))
        empty = value in (None, [], {}) or (value is False and standard is not True)  # what transformers fills in
        if (differs or name in SETTINGS_NAMED) and not empty and not _is_secret(name) and name not in SETTINGS_LEFT_OUT:
            given[name] = _without_secrets(value)
    return given


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
