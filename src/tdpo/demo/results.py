"""What the demo is asked to do and what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from tdpo import objectives
from tdpo.config.checks import check_values, documented
from tdpo.errors import UserError
from tdpo.evaluate.diversity import Diversity
from tdpo.evaluate.estimates import Estimate

OBJECTIVES = ("dpo", "tdpo1", "tdpo2")


@documented
@dataclass
class DemoOptions:
    """The size of the demo. Every objective gets the same model, pairs, order, steps and learning rate.

    Attributes:
        output_dir: Folder for everything the demo writes.
        seed: Seed of texts, weights, samples and data order.
        sft_texts: Texts from the grammar to fine-tune on.
        sft_steps: Optimizer steps of fine-tuning.
        sft_learning_rate: Learning rate of fine-tuning.
        train_prompts: Prompts whose completions make training pairs.
        held_out_prompts: Prompts to evaluate on, none of them trained on.
        samples_per_prompt: Completions per prompt that the reward ranks.
        min_margin: Smallest difference of rewards that makes a pair.
        beta: Strength of the tie to the reference, in every objective.
        alpha: Weight of the sequential-KL difference in tdpo2.
        learning_rate: Learning rate of preference training.
        steps: Optimizer steps of each objective.
        batch_size: Pairs per optimizer step; texts, for fine-tuning: twice.
        eval_every: Steps between two measured points.
        max_new_tokens: Longest completion in tokens.
    """

    output_dir: str = "demo-output"
    seed: int = 0
    sft_texts: int = 5000
    sft_steps: int = 300
    sft_learning_rate: float = 3e-3
    train_prompts: int = 600
    held_out_prompts: int = 256
    samples_per_prompt: int = 4
    min_margin: float = 0.05
    beta: float = 0.1
    alpha: float = 0.5
    learning_rate: float = 2e-4
    steps: int = 120
    batch_size: int = 32
    eval_every: int = 20
    max_new_tokens: int = 48

    def __post_init__(self) -> None:
        check_values(self, sft_texts=1, sft_steps=1, train_prompts=1, held_out_prompts=2, samples_per_prompt=2)
        check_values(self, steps=1, batch_size=1, eval_every=1, max_new_tokens=1)
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
    def rows(self) -> dict[str, Point]:
        """The SFT model and each objective's final policy, by name."""
        return {"sft": self.sft} | {name: points[-1] for name, points in self.trajectories.items()}

    def as_dict(self) -> dict[str, Any]:
        """Returns every number as plain JSON."""
        return asdict(self) | {"rows": {name: asdict(point) for name, point in self.rows.items()}}
