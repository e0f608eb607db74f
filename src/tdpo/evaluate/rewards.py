"""Rewards of responses: a Python function, a reward model or classifier, a scikit-learn pipeline, or a column.

A reward scores rows: mappings with ``prompt`` (text or chat messages), ``response`` (text) and further columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from typing_extensions import override

from tdpo.config.checks import check_values, documented, option
from tdpo.errors import UserError
from tdpo.loading import load_object

COLUMN = "column:"
PICKLES = (".pkl", ".pickle", ".joblib")
POSITIVE = ("positive", "pos", "label_1", "good")
"""Names, in lower case, of the label that scores a response where no other is named."""
CHECKED_TO = 1e-4
"""How far, relative to 1, a row's reward may depend on the other rows of its batch."""

Row = Mapping[str, Any]


@documented
@dataclass
class RewardOptions:
    """The reward of a response.

    Attributes:
        reward: module:function, a Python function from a list of texts (prompt and response) to numbers; a folder or
            hub name of a sequence-classification or reward model; a .skops file with a scikit-learn pipeline; or
            column:NAME, a column of the data.
        reward_batch_size: Texts scored at a time.
        reward_label: Label of a classifier whose score is the reward; default: the one named positive.
        reward_output: What a classifier gives: the probability of the label or its logit (for two labels the
            log-odds). Default: probability. A model with one output gives that.
        reward_trusted: Types in a .skops file, beside those of scikit-learn, that may be loaded.
    """

    reward: str | None = None
    reward_batch_size: int = 32
    reward_label: str | None = None
    reward_output: str | None = option(None, choices=["probability", "logit"])
    reward_trusted: list[str] = option(list)

    def __post_init__(self) -> None:
        check_values(self, reward_batch_size=1)
        kind = self.kind
        if kind == "pickle":
            raise UserError(
                f"--reward {self.reward}: a pickle can run any code when it is loaded; save the pipeline with "
                "skops.io.dump(pipeline, 'reward.skops')"
            )
        takes = {"reward_label": ("model", "skops"), "reward_output": ("model", "skops"), "reward_trusted": ("skops",)}
        for name, kinds in takes.items():
            if getattr(self, name) and kind not in kinds:
                raise UserError(f"--{name} has no effect with --reward {self.reward}")

    @property
    def kind(self) -> str:
        """``function``, ``model``, ``skops``, ``column`` or ``pickle``; empty without a reward."""
        name = self.reward or ""
        if name.startswith(COLUMN):
            return "column"
        if name.endswith(".skops"):
            return "skops"
        if name.endswith(PICKLES):
            return "pickle"
        return "" if not name else "function" if ":" in name and not Path(name).exists() else "model"


class Reward(ABC):
    """Scores rows.

    Attributes:
        name: What the user named it.
        batch_size: Rows scored at a time.
    """

    def __init__(self, options: RewardOptions) -> None:
        self.name, self.batch_size = str(options.reward), options.reward_batch_size

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        """Returns the reward of each row.

        Raises:
            UserError: if a row cannot be scored, or what comes out is not one finite number a row.
        """
        scores: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            scores += self._checked(self.score(batch), len(batch))
        return scores

    @abstractmethod
    def score(self, rows: Sequence[Row]) -> Any:
        """Scores one batch."""

    def _checked(self, found: Any, count: int) -> list[float]:
        values = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(values, list | tuple) or len(values) != count:
            what = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)[:80]
            raise UserError(f"--reward {self.name}: expected {count} numbers for {count} texts, got {what}")
        for value in values:
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise UserError(f"--reward {self.name}: expected a finite number for every text, got {value!r}")
        return [float(value) for value in values]


class FunctionReward(Reward):
    """Calls a Python function with texts: prompt and response together, a chat as its template renders it."""

    def __init__(self, options: RewardOptions, tokenizer: Any) -> None:
        super().__init__(options)
        self.function, self.tokenizer = load_object(self.name, "--reward"), tokenizer

    @override
    def score(self, rows: Sequence[Row]) -> Any:
        texts = [plain_text(row, self.tokenizer, self.name) for row in rows]
        try:
            return self.function(texts)
        except Exception as error:  # whatever the user's function raises
            raise UserError(f"--reward {self.name}: it raised {type(error).__name__}: {error}") from error


class ColumnReward(Reward):
    """Reads a column of the rows."""

    @override
    def score(self, rows: Sequence[Row]) -> Any:
        column = self.name.removeprefix(COLUMN)
        for number, row in enumerate(rows, 1):
            if not isinstance(row.get(column), int | float):
                found = f"holds {row[column]!r}" if column in row else f"is missing; there are {', '.join(row)}"
                raise UserError(f"--reward {self.name}: row {number}: {column!r} {found}")
        return [row[column] for row in rows]


class ModelReward(Reward):
    """Runs a transformers sequence-classification or reward model on prompt and response."""

    def __init__(self, options: RewardOptions) -> None:
        super().__init__(options)
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        try:
            self.model = AutoModelForSequenceClassification.from_pretrained(self.name).eval()
            self.tokenizer = AutoTokenizer.from_pretrained(self.name)
        except (OSError, ValueError) as error:
            raise UserError(f"--reward {self.name}: not a sequence-classification model: {error}") from error
        self.model.to("cuda" if torch.cuda.is_available() else "cpu")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token or self.tokenizer.unk_token
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        labels = [str(label) for _, label in sorted(self.model.config.id2label.items())]
        self.label = None if len(labels) == 1 else label_index(labels, options.reward_label, self.name)
        if self.label is None and (options.reward_label or options.reward_output):
            raise UserError(f"--reward {self.name} has one output: leave --reward_label and --reward_output out")
        self.logit = options.reward_output == "logit"
        self.tokenizer.truncation_side = "left"  # the response is what is scored

    @override
    def score(self, rows: Sequence[Row]) -> Any:
        texts = [plain_text(row, self.tokenizer, self.name, always_chat=True) for row in rows]
        chat = bool(self.tokenizer.chat_template)
        longest = getattr(self.model.config, "max_position_embeddings", None)
        encoded = self.tokenizer(
            texts, padding=True, truncation=longest is not None, max_length=longest, add_special_tokens=not chat,
            return_tensors="pt",
        ).to(self.model.device)  # fmt: skip
        with torch.no_grad():
            logits = self.model(**encoded).logits.float()
        if self.label is None:
            return logits[:, 0]
        logp = logits.log_softmax(-1)[:, self.label]
        # The logit of a probability p is log p - log(1 - p); of two labels that is the difference of their outputs.
        return logp - torch.log1p(-logp.exp()) if self.logit else logp.exp()


class PipelineReward(Reward):
    """Runs a scikit-learn pipeline on texts: a classifier's probability or decision, a regressor's prediction."""

    def __init__(self, options: RewardOptions, tokenizer: Any) -> None:
        super().__init__(options)
        try:
            import skops.io
        except ImportError as error:
            raise UserError(
                f"--reward {self.name} needs scikit-learn and skops: pip install 'tdpo[experiments]'"
            ) from error
        if not Path(self.name).is_file():
            raise UserError(f"--reward {self.name}: no such file")
        unknown = set(skops.io.get_untrusted_types(file=self.name)) - set(options.reward_trusted)
        if unknown:
            raise UserError(
                f"--reward {self.name} holds types that could run code: {', '.join(sorted(unknown))}. If you trust it: "
                f"--reward_trusted {' '.join(sorted(unknown))}"
            )
        self.tokenizer, self.pipeline = tokenizer, skops.io.load(self.name, trusted=options.reward_trusted)
        classes = getattr(self.pipeline, "classes_", None)
        self.logit = options.reward_output == "logit"
        self.label = None
        if classes is not None:
            labels = [str(label) for label in classes.tolist()]
            self.label = (
                1
                if labels in (["0", "1"], ["False", "True"]) and not options.reward_label
                else label_index(labels, options.reward_label, self.name)
            )

    @override
    def score(self, rows: Sequence[Row]) -> Any:
        texts = [plain_text(row, self.tokenizer, self.name) for row in rows]
        if self.label is None:
            return self.pipeline.predict(texts)
        p = self.pipeline.predict_proba(texts)[:, self.label]
        return torch.logit(torch.from_numpy(p)) if self.logit else p


def plain_text(row: Row, tokenizer: Any, name: str, always_chat: bool = False) -> str:
    """Joins prompt and response to one text.

    Args:
        row: The row.
        tokenizer: Its chat template renders prompts of messages.
        name: The reward, for messages.
        always_chat: Render text prompts as a chat too, where there is a template: a user turn and an answer.

    Raises:
        UserError: for a prompt of messages without a chat template.
    """
    prompt, response = row["prompt"], row["response"]
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if isinstance(prompt, str) and not (always_chat and has_template):
        return prompt + str(response)
    if not has_template:
        raise UserError(f"--reward {name}: the prompt is a chat, and the tokenizer has no chat template to render it")
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    turns.append({"role": "assistant", "content": response})
    return str(tokenizer.apply_chat_template(turns, tokenize=False))


def label_index(labels: Sequence[str], wanted: str | None, name: str) -> int:
    """Returns the index of a label by its name, or of the one that means good.

    Example:
        >>> label_index(["NEGATIVE", "POSITIVE"], None, "model"), label_index(["a", "b", "c"], "c", "model")
        (1, 2)

    Raises:
        UserError: listing the labels.
    """
    matching = [wanted.lower()] if wanted else list(POSITIVE)
    found = [index for index, label in enumerate(labels) if label.lower() in matching]
    if len(found) != 1:
        what = f"has no label {wanted}" if wanted else "has no label named positive: name one with --reward_label"
        raise UserError(f"--reward {name} {what}; there are {', '.join(labels)}")
    return found[0]


def load_reward(options: RewardOptions, tokenizer: Any = None) -> Reward:
    """Loads a reward.

    Args:
        options: Which one.
        tokenizer: The policy's tokenizer: its chat template renders chats for functions and pipelines.

    Raises:
        UserError: if it cannot be loaded.
    """
    if options.kind == "column":
        return ColumnReward(options)
    if options.kind == "skops":
        return PipelineReward(options, tokenizer)
    return FunctionReward(options, tokenizer) if options.kind == "function" else ModelReward(options)


def check_reward(reward: Reward, rows: Sequence[Row]) -> None:
    """Scores a few rows before a run: together, and each alone, which must give the same.

    Raises:
        UserError: if they cannot be scored, or a row's reward depends on the others.
    """
    together = reward(rows)
    for row, value in zip(rows, together, strict=True):
        (alone,) = reward([row])
        if abs(alone - value) > CHECKED_TO * max(1.0, abs(value)):
            raise UserError(
                f"--reward {reward.name}: a text scores {value:g} beside others and {alone:g} alone; the reward of a "
                "text must depend on nothing else"
            )
