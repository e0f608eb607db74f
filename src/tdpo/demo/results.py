"""What the demo is asked to do and what it measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tdpo import objectives
from tdpo.errors import UserError
from tdpo.evaluate.diversity import Diversity, Estimate

OBJECTIVES = ("dpo", "tdpo1", "tdpo2")


@dataclass
class DemoOptions:
    """The size of the demo. Every objective gets the same model, pairs, order, steps and learning rate."""

    output_dir: str = field(default="demo-output", metadata={"help": "Folder for everything the demo writes."})
    seed: int = field(default=0, metadata={"help": "Seed of texts, weights, samples and data order."})
    sft_texts: int = field(default=5000, metadata={"help": "Texts from the grammar to fine-tune on."})
    sft_steps: int = field(default=300, metadata={"help": "Optimizer steps of fine-tuning."})
    sft_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate of fine-tuning."})
    train_prompts: int = field(default=600, metadata={"help": "Prompts whose completions make training pairs."})
    held_out_prompts: int = field(default=256, metadata={"help": "Prompts to evaluate on, none of them trained on."})
    samples_per_prompt: int = field(default=4, metadata={"help": "Completions per prompt that the reward ranks."})
    min_margin: float = field(default=0.05, metadata={"help": "Smallest difference of rewards that makes a pair."})
    beta: float = field(default=0.1, metadata={"help": "Strength of the tie to the reference, in every objective."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of the sequential-KL difference in tdpo2."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of preference training."})
    steps: int = field(default=120, metadata={"help": "Optimizer steps of each objective."})
    batch_size: int = field(default=32, metadata={"help": "Pairs per optimizer step; texts, for fine-tuning: twice."})
    eval_every: int = field(default=20, metadata={"help": "Steps between two measured points."})
    max_new_tokens: int = field(default=48, metadata={"help": "Longest completion in tokens."})

    def __post_init__(self) -> None:
        for name in ("sft_texts", "sft_steps", "train_prompts", "steps", "batch_size", "eval_every", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("held_out_prompts", "samples_per_prompt"):
            if getattr(self, name) < 2:
                raise UserError(f"--{name} must be at least 2, got {getattr(self, name)}")
        for name in ("min_margin", "learning_rate", "sft_learning_rate"):
            if not getattr(self, name) > 0:
                raise UserError(f"--{name} must be positive, got {getattr(self, name):g}")
        objectives.build("tdpo2", beta=self.beta, alpha=self.alpha)  # refuses what no objective takes
        if self.steps % self.eval_every:
            raise UserError(
                f"--steps {self.steps} is not a multiple of --eval_every {self.eval_every}: the last point would be "
                "measured before training ends"
            )


@dataclass(frozen=True)
class Point:
    """One policy, measured.

    Attributes:
        step: Optimizer steps of preference training so far.
        reward: Mean reward of one sample per held-out prompt, from -1 to 1.
        samples: Divergence from the reference and diversity along the same samples.
        held_out: Metrics on the held-out pairs under the names of training (``implicit_rewards/accuracies``,
            ``kl/chosen``, ...), in nats where they are KLs.
    """

    step: int
    reward: Estimate
    samples: Diversity
    held_out: Mapping[str, float]


@dataclass(frozen=True)
class DemoResult:
    """Everything the demo measured.

    Attributes:
        options: What was run.
        sft: The SFT model, which is the reference: its KL is 0 by definition.
        trajectories: Points over training by objective, the SFT model first and the final policy last.
        data: Counts of texts, pairs and completions.
        seconds: Wall time by stage, and ``"total"``.
        versions: Of Python and the libraries.
    """

    options: DemoOptions
    sft: Point
    trajectories: Mapping[str, list[Point]]
    data: Mapping[str, Any]
    seconds: Mapping[str, float]
    versions: Mapping[str, str]

    @property
    def output_dir(self) -> Path:
        """The folder everything was written to."""
        return Path(self.options.output_dir).expanduser()

    @property
    def rows(self) -> dict[str, Point]:
        """The SFT model and each objective's final policy, by name."""
        return {"sft": self.sft} | {name: points[-1] for name, points in self.trajectories.items()}

    def as_dict(self) -> dict[str, Any]:
        """Returns every number as plain JSON; a standard error that does not exist is null."""
        whole = asdict(self) | {"rows": {name: asdict(point) for name, point in self.rows.items()}}
        return _plain(whole)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
