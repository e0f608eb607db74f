"""Reads the record of a run from its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tdpo.errors import UserError
from tdpo.objectives import build
from tdpo.objectives.remembered import FILE as OBJECTIVE
from tdpo.objectives.remembered import read_objective

RECORD, STATE = "run.jsonl", "trainer_state.json"
HELD_OUT = "eval_"


@dataclass(frozen=True)
class Run:
    """A run, as recorded in its folder.

    Attributes:
        name: Name of the folder.
        start: The first line of the record: settings, data, environment; empty for a run of another trainer.
        logs: What was logged, in order; each with ``step``, and with ``time`` where it is known.
        status: How it ended.
        samples: Responses sampled during training: ``step``, ``prompt`` and ``response``.
    """

    name: str
    start: dict[str, Any]
    logs: list[dict[str, Any]]
    status: str
    samples: list[dict[str, Any]] = field(default_factory=list)

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Returns steps and values of a metric; held-out ones begin with ``eval_``."""
        found = [(log["step"], log[name]) for log in self.logs if isinstance(log.get(name), int | float)]
        return [step for step, _ in found], [value for _, value in found]

    def last(self, name: str) -> float | None:
        """Returns the last value of a metric, or None."""
        _, values = self.series(name)
        return values[-1] if values else None

    @property
    def held_out(self) -> list[str]:
        """Prefixes of the metrics of held-out data: ``eval_``, or ``eval_NAME_`` for each of several datasets."""
        names = (name for log in self.logs for name in log if name.startswith(HELD_OUT) and name.endswith("_loss"))
        return list(dict.fromkeys(name.removesuffix("loss") for name in names))

    @property
    def reward_scale(self) -> float | None:
        """Reward per nat of log-ratio in ``implicit_rewards``; None where the folder does not say."""
        return self.start.get("reward_scale")

    @property
    def steps(self) -> int:
        """Optimizer steps taken."""
        return max((log["step"] for log in self.logs), default=0)


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """Reads several runs; their names are the ends of their paths, long enough to be different.

    Raises:
        UserError: as :func:`read_run`.
    """
    paths = [Path(folder).expanduser().resolve() for folder in folders]
    names = [path.name for path in paths]
    for parts in range(1, max((len(path.parts) for path in paths), default=0) + 1):
        names = [str(Path(*path.parts[-parts:])) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    return [replace(read_run(path), name=name) for path, name in zip(paths, names, strict=True)]


def read_run(folder: str | Path) -> Run:
    """Reads ``run.jsonl`` of a run, or of another trainer's run the logs in ``trainer_state.json``.

    Raises:
        UserError: for a folder without either, and for a record that cannot be read.
    """
    folder = Path(folder).expanduser()
    if (folder / RECORD).is_file():
        return _from_record(folder)
    states = [folder / STATE, *sorted(folder.glob(f"checkpoint-*/{STATE}"), key=lambda path: path.stat().st_mtime)]
    found = [path for path in states if path.is_file()]
    if not found:
        what = "is not a folder" if not folder.is_dir() else f"has no {RECORD} and no {STATE}"
        raise UserError(f"{folder} {what}; name the --output_dir of tdpo train, tdpo sft or transformers' Trainer")
    path = found[0] if len(found) == 1 or found[0].parent == folder else found[-1]
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        logs, ended = list(state["log_history"]), state["global_step"] >= state["max_steps"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the state of a trainer ({error})") from error
    start: dict[str, Any] = {"steps": state["max_steps"]}
    if (objective := folder / OBJECTIVE).is_file() or (objective := path.parent / OBJECTIVE).is_file():
        remembered = read_objective(objective)
        built = build(remembered["objective"], **remembered["parameters"])
        start |= {"objective": str(built), "reward_scale": built.reward_scale}
    status = "finished" if ended else f"not finished: {state['global_step']:,} of {state['max_steps']:,} steps"
    return Run(folder.name, start, logs, status)


def _from_record(folder: Path) -> Run:
    start: dict[str, Any] = {}
    logs: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    status = ""
    path = folder / RECORD
    text = path.read_bytes().decode("utf-8", "replace")
    for line in text.split("\n"):
        try:
            entry = json.loads(line)
            event, step = entry.pop("event"), entry["step"]
        except (ValueError, KeyError, AttributeError, TypeError):
            continue  # half a line of a run that was killed and resumed
        if event == "start":
            # A resumed run repeats the steps after its checkpoint.
            logs = [log for log in logs if log["step"] <= step and "train_runtime" not in log]
            samples = [sample for sample in samples if sample["step"] <= step]
            logs.append({"step": step, "resumed": True})
            start, status = entry, ""
        elif event == "log":
            logs.append(entry)
        elif event == "samples":
            samples += [{"step": step, **sample} for sample in entry["samples"]]
        elif event == "end":
            status = entry["status"]
    if not start:
        raise UserError(f"{path}: not the record of a run: no line of it says how the run began")
    steps = max((log["step"] for log in logs), default=0)
    unfinished = f"not finished: {steps:,} of {start.get('steps', 0):,} steps are recorded; it runs, or it was killed"
    return Run(folder.name, start, logs, status or unfinished, samples)
