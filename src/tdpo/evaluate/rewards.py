"""Rewards of responses: a Python function, a reward model or classifier, a scikit-learn pipeline, or a column.

A reward scores rows: mappings with ``prompt`` (text or chat messages), ``response`` (text) and further columns.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from typing_extensions import override

from tdpo.config.checks import check_values, documented, option
from tdpo.errors import UserError
from tdpo.loading import load_object
from tdpo.models.load import load_classifier
from tdpo.models.policy import position_limit

COLUMN = "column:"
PICKLES = (".pkl", ".pickle", ".joblib")
POSITIVE = ("positive", "pos", "label_1", "good")
"""Names, in lower case, of the label of two that scores a response where none is named."""
NUMBERED = (("0", "1"), ("-1", "1"), ("false", "true"))
"""Labels of a scikit-learn classifier whose second one means good."""
CHECKED_ROWS = 8
CHECKED_TO = 1e-4
"""How far a row's reward may depend on the other rows of its batch, relative to the largest reward of them."""
ROUNDING_STEPS = 16
"""The same of a model in low precision, in multiples of its dtype's epsilon: 0.125 in bfloat16."""

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
        reward_label: Label of a classifier whose score is the reward, by name or by index from 0. Default: of two
            labels the one named positive; with more than two it must be given.
        reward_output: What a classifier returns for the label: its probability, or its logit (the log-odds). Default:
            probability. A model with one output, or without probabilities, returns that output.
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
        used_by = {
            "reward_batch_size": ("function", "model", "skops"),
            "reward_label": ("model", "skops"),
            "reward_output": ("model", "skops"),
            "reward_trusted": ("skops",),
        }
        for name, kinds in used_by.items():
            if getattr(self, name) not in (RewardOptions.__dataclass_fields__[name].default, []) and kind not in kinds:
                raise UserError(f"--{name} has no effect with{f' --reward {self.reward}' if kind else 'out --reward'}")

    def check_for_samples(self) -> None:
        """Refuses a reward that cannot score responses sampled from a model.

        Raises:
            UserError: for a column, which only rows of a dataset have.
        """
        if self.kind == "column":
            raise UserError(f"--reward {self.reward}: responses that are sampled have no columns; give another reward")

    @property
    def kind(self) -> str:
        """``function``, ``model``, ``skops``, ``column`` or ``pickle``; empty without a reward."""
        name = self.reward or ""
        if name.startswith(COLUMN):
            return "column"
        if name.lower().endswith(".skops"):
            return "skops"
        if name.lower().endswith(PICKLES):
            return "pickle"
        return "" if not name else "function" if ":" in name and not Path(name).exists() else "model"


class Reward(ABC):
    """Scores rows.

    Attributes:
        name: What the user named it.
    """

    def __init__(self, options: RewardOptions) -> None:
        self.name = str(options.reward)

    @abstractmethod
    def __call__(self, rows: Sequence[Row]) -> list[float]:
        """Returns the reward of each row.

        Raises:
            UserError: if a row cannot be scored, or what comes out is not one finite number a row.
        """

    def tolerance(self, rewards: Sequence[float]) -> float:
        """Returns how far the reward of a row may depend on the others, for rows with these rewards."""
        return CHECKED_TO * max(map(abs, rewards))

    def error(self, what: str) -> UserError:
        """Makes an error that names the reward."""
        return UserError(f"--reward {self.name}: {what}")

    def refuse(self, options: RewardOptions, why: str, *names: str) -> None:
        """Raises an error if one of these options is given, which has no effect."""
        given = [f"--{name}" for name in names if getattr(options, name)]
        if given:
            raise self.error(f"{why}: leave {' and '.join(given)} out")


class ColumnReward(Reward):
    """Reads a column of the rows."""

    @override
    def __call__(self, rows: Sequence[Row]) -> list[float]:
        column = self.name.removeprefix(COLUMN)
        for number, row in enumerate(rows, 1):
            if column not in row:
                raise self.error(f"row {number} has no column {column!r}, only {', '.join(row)}")
            if not isinstance(row[column], Real) or not math.isfinite(row[column]):
                raise self.error(f"row {number}: {column!r} must be a finite number, got {row[column]!r}")
        return [float(row[column]) for row in rows]


class TextReward(Reward):
    """Scores texts: prompt and response together, a chat as its template renders it.

    Attributes:
        batch_size: Texts scored at a time.
        tokenizer: Its chat template renders prompts of messages; None if there is none.
        renders_text: Whether a text prompt is rendered as a chat too, where there is a template.
        without_template: What is wrong with a tokenizer without a chat template, and what helps.
    """

    renders_text = False
    without_template = "the tokenizer has no chat template; --chat_template_path gives one"

    def __init__(self, options: RewardOptions, tokenizer: Any) -> None:
        super().__init__(options)
        self.batch_size, self.tokenizer = options.reward_batch_size, tokenizer

    @abstractmethod
    def score(self, texts: list[str]) -> Any:
        """Scores one batch of texts; returns a list, an array or a tensor with a number for each."""

    @override
    def __call__(self, rows: Sequence[Row]) -> list[float]:
        texts = [self.text(row, number) for number, row in enumerate(rows, 1)]
        rewards: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            batch = texts[start : start + self.batch_size]
            rewards += self._numbers(self.score(batch), len(batch), start)
        return rewards

    def text(self, row: Row, number: int) -> str:
        """Joins prompt and response to one text.

        Args:
            row: The row.
            number: Which row it is, from 1, for messages.

        Raises:
            UserError: for a row without prompt or response, a chat without a template, or one that it refuses.
        """
        prompt, response = row.get("prompt"), row.get("response")
        template = getattr(self.tokenizer, "chat_template", None)
        if not isinstance(response, str):
            raise self.error(f"row {number}: the response must be text, got {response!r}")
        if not isinstance(prompt, str | list | tuple):
            raise self.error(f"row {number}: the prompt must be text or a list of messages, got {prompt!r}")
        if isinstance(prompt, str) and not (self.renders_text and template):
            return prompt + response
        if not template:
            way_out = (
                "no tokenizer is given (tdpo judge: --reward_tokenizer)"
                if self.tokenizer is None
                else self.without_template
            )
            raise self.error(f"row {number}: the prompt is a chat, and {way_out}")
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        turns.append({"role": "assistant", "content": response})
        try:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise self.error(f"row {number}: the chat template refuses it: {error}") from error

    def _numbers(self, found: Any, count: int, start: int) -> list[float]:
        """Returns the scores of a batch, whose first row has the index ``start``, as finite floats."""
        values = found.tolist() if hasattr(found, "tolist") else found
        if not isinstance(values, list | tuple) or len(values) != count:
            what = f"{len(values)} values" if isinstance(values, list | tuple) else repr(values)[:80]
            raise self.error(f"expected {count} numbers for {count} texts, got {what}")
        values = [value.tolist() if hasattr(value, "tolist") else value for value in values]  # of arrays and tensors
        for number, value in enumerate(values, start + 1):
            if not isinstance(value, Real) or not math.isfinite(value):
                raise self.error(f"expected a finite number for every text, got {value!r} for row {number}")
        return [float(value) for value in values]

    def call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Calls code of the user or of another library, whose errors become a :class:`UserError`."""
        try:
            return function(*args, **options)
        except Exception as error:  # whatever it raises
            raise self.error(f"it raised {type(error).__name__}: {error}") from error


class FunctionReward(TextReward):
    """Calls a Python function with texts."""

    def __init__(self, options: RewardOptions, tokenizer: Any) -> None:
        super().__init__(options, tokenizer)
        self.function = load_object(self.name, "--reward")
        if not callable(self.function):
            raise self.error(f"expected a function, got {self.function!r}")

    @override
    def score(self, texts: list[str]) -> Any:
        return self.call(self.function, texts)


class ModelReward(TextReward):
    """Runs a transformers sequence-classification or reward model on prompt and response."""

    renders_text = True
    without_template = "this model's tokenizer has no chat template; join the texts in a function (module:function)"

    def __init__(self, options: RewardOptions) -> None:
        try:
            model, tokenizer = load_classifier(str(options.reward))
        except UserError as error:
            raise UserError(f"--reward: {error}") from error
        super().__init__(options, tokenizer)
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer.truncation_side = "left"  # the response is what is scored
        limits = [limit for limit in (usable_positions(model), tokenizer.model_max_length) if limit and limit < 2**31]
        self.longest = min(limits, default=None)
        config = model.config
        labels = [str(config.id2label[index]) for index in range(config.num_labels)]
        self.label, self.output = 0, options.reward_output or "probability"
        if len(labels) == 1:
            self.output = "raw"
            self.refuse(options, "the model has one output", "reward_label", "reward_output")
            return
        self.label = label_index(labels, options.reward_label, self.name)
        if config.problem_type == "regression":
            self.output = "raw"
            self.refuse(options, "the outputs of a regression have no probabilities", "reward_output")

    @override
    def tolerance(self, rewards: Sequence[float]) -> float:
        # Batches of other shapes round otherwise, and the scores of a reward model may lie around 0.
        steps = max(CHECKED_TO, ROUNDING_STEPS * torch.finfo(self.model.dtype).eps)
        return steps * max(1.0, *map(abs, rewards))

    @override
    def score(self, texts: list[str]) -> Tensor:
        logits_NC = self.logits(texts)
        if self.output == "raw":
            return logits_NC[:, self.label]
        if self.model.config.problem_type == "multi_label_classification":  # the label against its absence
            logits_NC = nn.functional.pad(logits_NC[:, [self.label]], (1, 0))
            return class_score(logits_NC, 1, self.output)
        return class_score(logits_NC, self.label, self.output)

    @torch.no_grad()
    def logits(self, texts: list[str]) -> Tensor:
        """Computes the outputs of the model, ``[N, C]`` float64 on the CPU, equal to those of each text alone.

        Raises:
            UserError: for a text without tokens.
        """
        encoded = self.tokenizer(
            texts,
            truncation=self.longest is not None,
            max_length=self.longest,
            add_special_tokens=not self.tokenizer.chat_template,  # the template has them
        )
        rows = [torch.tensor(ids, dtype=torch.long) for ids in encoded["input_ids"]]
        if not all(map(len, rows)):
            raise self.error("a text is empty, and its tokenizer adds no tokens to it")
        config = self.model.config.get_text_config()
        pad = config.pad_token_id
        if pad is None or pad < 0:
            # The model scores at its last token, which it looks for before the padding: any token that ends no text.
            ends = {int(ids[-1]) for ids in rows}
            pad = next(index for index in range(len(ends) + 1) if index not in ends)
        mask = pad_sequence([torch.ones_like(ids) for ids in rows], batch_first=True)
        ids = pad_sequence(rows, batch_first=True, padding_value=pad)
        own, config.pad_token_id = config.pad_token_id, pad
        try:
            device = self.model.device
            logits: Tensor = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        finally:
            config.pad_token_id = own
        return logits.double().cpu()


class PipelineReward(TextReward):
    """Runs a scikit-learn pipeline on texts: a classifier's probability or decision, a regressor's prediction."""

    def __init__(self, options: RewardOptions, tokenizer: Any) -> None:
        super().__init__(options, tokenizer)
        self.pipeline = self._load(options.reward_trusted)
        self.output, self.label = options.reward_output or "probability", None
        classes = getattr(self.pipeline, "classes_", None)
        if classes is None:
            self.refuse(options, "the pipeline is not a classifier", "reward_label", "reward_output")
            return
        if isinstance(classes, list):
            raise self.error("the pipeline has several outputs; a reward is one number")
        self.label = label_index([str(label) for label in classes.tolist()], options.reward_label, self.name)
        if not hasattr(self.pipeline, "predict_proba"):
            self.output = "decision"
            self.refuse(options, "the classifier has no predict_proba", "reward_output")
            if not hasattr(self.pipeline, "decision_function"):
                raise self.error("the classifier has neither predict_proba nor decision_function")

    def _load(self, trusted: list[str]) -> Any:
        """Loads the file.

        Raises:
            UserError: if it does not hold a fitted estimator, or holds types that are not trusted.
        """
        try:
            import skops.io
            from sklearn.utils.validation import check_is_fitted
        except ImportError as error:
            raise self.error("needs scikit-learn and skops: pip install 'tdpo[experiments]'") from error
        if not Path(self.name).is_file():
            raise self.error("no such file")
        found = set(self.call(skops.io.get_untrusted_types, file=self.name))
        unknown, unused = sorted(found - set(trusted)), sorted(set(trusted) - found)
        if unknown:
            raise self.error(
                f"holds types that could run code: {', '.join(unknown)}. If you trust it: --reward_trusted "
                f"{' '.join(sorted(found))}"
            )
        if unused:
            raise self.error(f"the file holds nothing to trust of type {', '.join(unused)} (--reward_trusted)")
        pipeline = self.call(skops.io.load, self.name, trusted=trusted)
        self.call(check_is_fitted, pipeline)
        return pipeline

    @override
    def score(self, texts: list[str]) -> Any:
        if self.label is None:
            return self.call(self.pipeline.predict, texts)
        if self.output == "decision":
            decision = self.call(self.pipeline.decision_function, texts)
            # Of two classes it is one number, which is positive for the second.
            return decision[:, self.label] if decision.ndim > 1 else decision if self.label else -decision
        p_NC = torch.from_numpy(self.call(self.pipeline.predict_proba, texts))
        return class_score(p_NC.double().log(), self.label, self.output)


def class_score(logits_NC: Tensor, label: int, output: str) -> Tensor:
    """Computes the probability of a class or its logit, ``log p - log(1 - p)``, without rounding 1 - p to 0.

    Args:
        logits_NC: Logits or log-probabilities of the classes, ``[N, C]``.
        label: Index of the class.
        output: ``probability`` or ``logit``.

    Returns:
        ``[N]``, logits in nats.

    Examples:
        >>> logits = torch.tensor([[0.0, 100.0], [0.0, 0.0]])
        >>> class_score(logits, 1, "logit").tolist(), class_score(logits, 1, "probability").tolist()
        ([100.0, 0.0], [1.0, 0.5])
    """
    if output == "probability":
        return logits_NC.softmax(-1)[:, label]
    others = torch.cat((logits_NC[:, :label], logits_NC[:, label + 1 :]), dim=1)
    return logits_NC[:, label] - others.logsumexp(-1)


def label_index(labels: Sequence[str], wanted: str | None, name: str) -> int:
    """Returns the index of a label by its name or index, or of the one of two that means good.

    Examples:
        >>> label_index(["NEGATIVE", "POSITIVE"], None, "model"), label_index(["a", "b", "c"], "C", "model")
        (1, 2)
        >>> label_index(["1 star", "2 stars", "3 stars"], "2", "model"), label_index(["-1", "1"], None, "model")
        (2, 1)

    Raises:
        UserError: listing the labels.
    """
    lower = [label.lower() for label in labels]
    if wanted is None:
        found = [index for index, label in enumerate(lower) if label in POSITIVE and len(labels) == 2]
        found = [1] if tuple(lower) in NUMBERED else found
    else:
        found = [index for index, label in enumerate(labels) if label == wanted]
        found = found or [index for index, label in enumerate(lower) if label == wanted.lower()]
        found = found or [index for index in range(len(labels)) if str(index) == wanted]
    if len(found) != 1:
        what = f"has {len(labels)} labels" if len(labels) > 2 else "has no label named positive"
        what = f"{what}: name one with --reward_label" if wanted is None else f"has no label {wanted}"
        raise UserError(f"--reward {name} {what}; there are {', '.join(labels)}")
    return found[0]


def usable_positions(model: nn.Module) -> int | None:
    """Returns how many tokens a model has positions for; None if its config states no number.

    RoBERTa and its relatives count positions from the index after that of the padding.
    """
    limit = position_limit(model)
    tables = [module for name, module in model.named_modules() if name.endswith("position_embeddings")]
    skipped = [table.padding_idx + 1 for table in tables if getattr(table, "padding_idx", None) is not None]
    return None if limit is None else limit - max(skipped, default=0)


def load_reward(options: RewardOptions, tokenizer: Any = None) -> Reward:
    """Loads a reward.

    Args:
        options: Which one.
        tokenizer: The policy's tokenizer: its chat template renders chats for functions and pipelines.

    Raises:
        UserError: if it cannot be loaded, or none is named.
    """
    if not options.kind:
        raise UserError("--reward is missing")
    if options.kind == "column":
        return ColumnReward(options)
    if options.kind == "skops":
        return PipelineReward(options, tokenizer)
    return FunctionReward(options, tokenizer) if options.kind == "function" else ModelReward(options)


def check_reward(reward: Reward, rows: Sequence[Row]) -> None:
    """Scores up to :data:`CHECKED_ROWS` rows before a run: together, and each alone, which must give the same.

    Raises:
        UserError: if they cannot be scored, or a row's reward depends on the others.
    """
    rows = rows[:CHECKED_ROWS]
    together = reward(rows)
    for number, (row, value) in enumerate(zip(rows, together, strict=True), 1):
        (alone,) = reward([row])
        if abs(alone - value) > reward.tolerance(together):
            raise reward.error(
                f"row {number} scores {value:g} beside others and {alone:g} alone; its reward must depend on it only"
            )
