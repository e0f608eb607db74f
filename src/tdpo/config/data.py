"""Options of data: names, formats, rendering and lengths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from tdpo.config.checks import documented, option
from tdpo.config.row_spec import AUTO, PAIRS_FROM, RowSpec, Side, parse_columns, parse_mapping, parse_names
from tdpo.config.tokens import NOT_OF_A_ROW, Lengths, Rendering
from tdpo.errors import UserError

DATASET_HELP = (
    "Dataset: a .jsonl, .json, .csv, .tsv, .parquet or .arrow file (also .gz, .bz2, .xz, .zst), a folder, a glob, - "
    "for standard input, or a hub name."
)

UNLIMITED = 2**31 - 1
"""More tokens than any sequence has."""


class _Default(int):
    """A default that can be distinguished from the same number given by the user."""


HALF = _Default(256)


@documented
@dataclass
class SplitOptions:
    """One file for training and for evaluation: a part of its prompts is held out.

    Attributes:
        test_fraction: Hold out about this share of the prompts for evaluation; train, sft, eval and every process draw
            the same ones.
        split_seed: Seed of --test_fraction, and of fractional weights.
    """

    test_fraction: float | None = None
    split_seed: int = 0

    def side(self, test: bool) -> Side | None:
        """Returns one side of the split, or None if there is none."""
        return None if self.test_fraction is None else Side(self.test_fraction, self.split_seed, test)


@documented
@dataclass
class EvalDataConfig(SplitOptions):
    """Data to train on and to evaluate on.

    Attributes:
        datasets: A mixture instead of --dataset_name: name,weight=0.5,format=hh,... for each dataset, or a list of
            mappings in a YAML file. A weight is how often a record is seen in an epoch.
        dataset_config: Configuration of a hub dataset.
        dataset_train_split: Split to train on: of a hub dataset or a .json file, or the beginning of file names in a
            folder.
        dataset_test_split: Split of --eval_dataset_name to evaluate on.
        eval_dataset_name: Held-out data, named as --dataset_name; it is evaluated at the end of training at least.
    """

    dataset_name: str | None = option(None, f"{DATASET_HELP} (this or --datasets)")
    datasets: list[str] = option(list)
    dataset_config: str | None = None
    dataset_train_split: str = "train"

    dataset_test_split: str = "test"
    eval_dataset_name: str | None = None

    def __post_init__(self) -> None:
        if bool(self.dataset_name) == bool(self.datasets):
            raise UserError("give either --dataset_name or --datasets, which names several")
        self.side(True)
        if self.eval_dataset_name and self.test_fraction is not None:
            raise UserError("--eval_dataset_name and --test_fraction contradict each other: both name held-out data")

    def check_row_spec(self, spec: RowSpec) -> None:
        """Refuses format options of a single dataset with ``datasets``, which have their own.

        Raises:
            UserError: naming them.
        """
        given = spec.given() + [
            name for name in ("format", "columns", "ignore_columns") if getattr(spec, name) not in (AUTO, ())
        ]
        if self.datasets and not self.eval_dataset_name and given:
            names = ", ".join("--dataset_format" if name == "format" else f"--{name}" for name in given)
            raise UserError(f"{names} and --datasets contradict each other: each of --datasets has fields of its own")


@documented
@dataclass
class FormatOptions:
    """Format of rows and rendering of chats.

    Attributes:
        dataset_format: Format of the rows: preference, swift, openai, sharegpt, alpaca, hh, implicit, shp,
            stackexchange, answers, ranked, labelled, scored, in sft also completion, messages, answer, text, or
            module:function, a Python function from a row to one of these, to several or to None; auto infers it from
            the columns.
        columns: Columns under other names: prompt=question,chosen=good,... or JSON.
        ignore_columns: Columns to leave out: name,name,... Other columns that are not used are reported, and the run
            stops where they may be the prompt.
        pairs_from: Pairs of several answers to a prompt: all whose scores differ (default; in sft the best one), the
            best with the worst, or all that differ by --min_margin.
        min_margin: Least difference of scores under --pairs_from margin.
        min_score_ratio: Least ratio of scores in the format shp, 2 by default.
        chat_template_kwargs: Arguments of the chat template for all rows, as JSON or enable_thinking=true,...; a row's
            own chat_template_kwargs win.
        special_tokens: Special-token text in plain texts: tokens encodes it as those tokens and adds no second start
            or end token, for texts that are rendered chats; text encodes it as plain text. Default: text, but stop
            where most rows are rendered chats.
    """

    dataset_format: str = AUTO
    columns: dict[str, str] | str | None = None
    ignore_columns: list[str] = option(list)
    pairs_from: str | None = option(None, choices=list(PAIRS_FROM))
    min_margin: float | None = None
    min_score_ratio: float | None = None
    chat_template_kwargs: dict[str, Any] | str | None = None
    special_tokens: str | None = option(None, choices=["text", "tokens"])

    def row_spec(self) -> RowSpec:
        """Returns how rows are read under these options.

        Raises:
            UserError: for an unknown format and options that contradict.
        """
        return RowSpec(
            self.dataset_format,
            parse_columns(self.columns),
            self.pairs_from,  # type: ignore[arg-type]
            self.min_margin,
            self.min_score_ratio,
            ignore_columns=parse_names(self.ignore_columns),
        )

    def rendering(self) -> Rendering:
        """Returns how chats are rendered under these options.

        Raises:
            UserError: for arguments that cannot be read, or are not for the template.
        """
        return Rendering(template_arguments(self.chat_template_kwargs), self.special_tokens)  # type: ignore[arg-type]


def template_arguments(given: Mapping[str, Any] | str | None) -> dict[str, Any]:
    """Parses arguments of a chat template from JSON, a mapping, or ``name=value,name=value``.

    Examples:
        >>> template_arguments("enable_thinking=true, style=short")
        {'enable_thinking': True, 'style': 'short'}

    Raises:
        UserError: for anything else, and for arguments that are not for the template.
    """
    if not given:
        return {}
    option, expected = f"--chat_template_kwargs {given}", "JSON or name=value,name=value, e.g. enable_thinking=true"
    content = parse_mapping(given, option, expected, _json_or_text)
    refused = [name for name in content if name in NOT_OF_A_ROW]
    if refused:
        raise UserError(f"{option}: {refused[0]!r} is not an argument for the template")
    return content


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value[:1].lower() + value[1:] if value in ("True", "False") else value)
    except ValueError:
        return value


@documented
@dataclass
class HeldOutOptions(FormatOptions, SplitOptions):
    """Part of a dataset that is evaluated, and format of its rows.

    Attributes:
        dataset_config: Configuration of a hub dataset.
        dataset_test_split: Split to read: of a hub dataset, or the beginning of file names.
    """

    dataset_config: str | None = None
    dataset_test_split: str = "test"

    def held_out_spec(self) -> RowSpec:
        """Returns the specification of the rows, or of those that ``test_fraction`` holds out."""
        return replace(self.row_spec(), side=self.side(test=True))


@documented
@dataclass
class LengthOptions:
    """Limits of length, and treatment of rows that do not fit.

    See :class:`tdpo.config.tokens.Lengths`.

    Attributes:
        max_length: Longest sequence in tokens, prompt and response together; None for no limit.
        truncation_mode: Which part of a prompt stays when it is cut.
        on_overlong: What happens to longer rows.
        on_bad_row: What happens to rows that cannot be used: stop, or drop and count.
    """

    max_length: int | None = 512
    truncation_mode: str = option("keep_end", choices=["keep_end", "keep_start"])
    on_overlong: str = option("truncate", choices=["truncate", "drop", "error"])
    on_bad_row: str = option("error", choices=["error", "drop"])


@documented
@dataclass
class PairOptions(FormatOptions, LengthOptions):
    """Reading and truncation of preference rows.

    Attributes:
        max_prompt_length: Longest prompt in tokens once a pair has to be cut to --max_length, half of a shorter one
            unless given; None cuts a prompt only where it leaves no room for a response.
        cache_dataset: Keep tokenised pairs on disk, so that the next run need not tokenise them.
        dataset_num_proc: Processes that tokenise a dataset; each takes seconds to start, so several pay for hundreds
            of thousands of pairs.
        cache_dir: Folder for tokenised pairs; default $TDPO_CACHE, or else ~/.cache/tdpo.
    """

    max_prompt_length: int | None = HALF
    cache_dataset: bool = True
    dataset_num_proc: int = 1
    cache_dir: str | None = None

    def lengths(self) -> Lengths:
        """Returns the truncation of these options; a default prompt length gives way to a short ``max_length``."""
        longest = UNLIMITED if self.max_length is None else self.max_length
        prompt = self.max_prompt_length
        if isinstance(prompt, _Default):
            prompt = int(prompt) if longest > prompt else max(longest // 2, 1)
        elif prompt is None:
            prompt = longest - 1
        return Lengths(longest, prompt, self.truncation_mode, self.on_overlong)  # type: ignore[arg-type]
