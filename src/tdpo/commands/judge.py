"""``tdpo judge``: pairwise win rate between two sets of responses, by a language model or a reward model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tdpo.commands.common import console, is_main_process, quieten, write_json, write_text
from tdpo.commands.options import parse
from tdpo.config import ModelConfig
from tdpo.config.checks import check_defaults, check_values, documented, option
from tdpo.errors import Stopped, UserError
from tdpo.evaluate.judge import (
    Judgement,
    JudgePrompt,
    Order,
    category_figures,
    judge_by_reward,
    judge_pairs,
    position_figures,
    unparsed_answers,
    verdict_rows,
)
from tdpo.evaluate.judge_client import AnswerCache, Completion, EndpointOptions, JudgeClient
from tdpo.evaluate.responses import Matched, alpaca_eval_rows, match_answers, read_answers, read_questions
from tdpo.evaluate.rewards import RewardOptions, check_reward, load_reward
from tdpo.evaluate.win_rate import WinRate
from tdpo.files import check_outputs, json_lines
from tdpo.models.load import load_tokenizer
from tdpo.train.progress import bar

CACHE = ".tdpo-judge"
LISTED = 3
"""Answers without a verdict that are printed; the JSON lists all of them."""


@documented
@dataclass
class JudgeOptions:
    """Options of the comparison and its output.

    Attributes:
        responses_a: File of A's responses: rows with prompt and response, AlpacaEval's outputs, or FastChat's answers.
        responses_b: File of B's responses, matched with A's by prompt.
        column_a: Column of A's responses. Default: response, output or completion.
        column_b: The same for B.
        name_a: Name of A in the output. Default: its column or the file.
        name_b: Name of B in the output.
        mt_bench: MT-Bench's question file; both turns of an answer are judged together, with a win rate per category.
        judge_prompt: File with a custom prompt for the judge, with {prompt}, {response_a} and {response_b}.
        order: both shows every pair twice, A first and B first; random shows it once, in either order.
        reward_tokenizer: With --reward, the model whose chat template renders chats for a function or a pipeline.
        tie_margin: With --reward, the largest difference of rewards that counts as a tie.
        json: File to write the results to.
        verdicts: JSON lines file to write, one object per pair with the judge's answers.
        alpaca_eval: One or two files to write the responses of A and B to in AlpacaEval's format; needs no judge.
    """

    responses_a: str = field(kw_only=True)
    responses_b: str = field(kw_only=True)
    column_a: str | None = None
    column_b: str | None = None
    name_a: str | None = None
    name_b: str | None = None
    mt_bench: str | None = None
    judge_prompt: str | None = None
    order: Order = option("both", choices=("both", "random"))
    reward_tokenizer: str | None = None
    tie_margin: float = 0.0
    json: str | None = None
    verdicts: str | None = None
    alpaca_eval: list[str] = option(list)

    def __post_init__(self) -> None:
        check_values(self, tie_margin=0)
        self.name_a = self.name_a or self.column_a or Path(self.responses_a).stem
        self.name_b = self.name_b or self.column_b or Path(self.responses_b).stem
        if self.name_a == self.name_b:
            self.name_a, self.name_b = self.responses_a, self.responses_b
        if len(self.alpaca_eval) > 2:
            raise UserError("--alpaca_eval: at most two files, for A and for B")


def run(argv: Sequence[str]) -> None:
    """Runs the command."""
    options, endpoint, reward = parse("judge", (JudgeOptions, EndpointOptions, RewardOptions), argv)
    quieten()
    _check(options, endpoint, reward)
    questions = read_questions(options.mt_bench) if options.mt_bench else []
    answers_a = read_answers(options.responses_a, options.column_a, questions)
    answers_b = read_answers(options.responses_b, options.column_b, questions)
    matched = match_answers(answers_a, answers_b, options.responses_a, options.responses_b)
    sides = zip((options.responses_a, options.responses_b), _names(options), (answers_a, answers_b), strict=True)
    for path, (source, name, answers) in zip(options.alpaca_eval, sides, strict=False):
        rows = alpaca_eval_rows(answers, name, Path(source).stem)
        write_text(path, json.dumps(rows, ensure_ascii=False, indent=2) + "\n")
        console().print(f"written to {path}", soft_wrap=True)
    if not (endpoint.endpoint or reward.reward):
        return
    if endpoint.endpoint:
        judgements, figures = _ask(matched, options, endpoint)
    else:
        judgements, figures = _score(matched, options, reward)
    _report(options, matched, judgements, figures)


def _check(options: JudgeOptions, endpoint: EndpointOptions, reward: RewardOptions) -> None:
    """Raises an error for options that contradict each other or have no effect, before anything is read."""
    if endpoint.endpoint and reward.reward:
        raise UserError("give either --endpoint or --reward")
    if not (endpoint.endpoint or reward.reward or options.alpaca_eval):
        raise UserError("a judge is missing: set --endpoint and --judge_model, or --reward")
    if not endpoint.endpoint:
        check_defaults("endpoint", endpoint)
        if options.judge_prompt or options.order != "both":
            raise UserError(f"--{'judge_prompt' if options.judge_prompt else 'order'} has no effect without --endpoint")
    if not reward.reward:
        check_defaults("reward", reward)
        for name in ("tie_margin", "reward_tokenizer"):
            if getattr(options, name):
                raise UserError(f"--{name} has no effect without --reward")
    if not (endpoint.endpoint or reward.reward):
        for name in ("json", "verdicts"):
            if getattr(options, name):
                raise UserError(f"--{name} has no effect without --endpoint or --reward")
    check_outputs(options.json, options.verdicts, *options.alpaca_eval)


def _ask(matched: Matched, options: JudgeOptions, endpoint: EndpointOptions) -> tuple[list[Judgement], dict[str, Any]]:
    """Asks the endpoint about all pairs; returns the judgements and statistics of the calls."""
    turns = len(matched.pairs[0][0].responses)
    prompt = JudgePrompt.read(options.judge_prompt, turns) if options.judge_prompt else JudgePrompt.default(turns)
    beside = Path(options.json).absolute().parent if options.json else Path.cwd()
    folder = Path(endpoint.cache_dir or beside / CACHE)
    client = JudgeClient(endpoint, AnswerCache(folder))
    shown = bar(Console(stderr=True, quiet=not is_main_process()), transient=True)
    try:
        with shown:
            total = len(matched.pairs) * (2 if options.order == "both" else 1)
            task = shown.add_task("judging", total=total, figures="")
            judgements, completions = judge_pairs(
                matched.pairs, client, prompt, options.order, lambda count: shown.update(task, completed=count)
            )
    except KeyboardInterrupt:
        message = f"interrupted; the answers so far are in {folder}, and the same command makes only the missing calls"
        raise Stopped(message, 130) from None
    figures = vars(client.usage) | position_figures(judgements) | _usage_figures(completions, endpoint)
    figures |= {"endpoint": endpoint.endpoint, "judge_model": endpoint.judge_model, "order": options.order}
    return judgements, figures | {"unparsed_answers": unparsed_answers(judgements)}


def _score(matched: Matched, options: JudgeOptions, reward: RewardOptions) -> tuple[list[Judgement], dict[str, Any]]:
    """Scores all responses; returns the judgements and the mean rewards."""
    name = options.reward_tokenizer
    scorer = load_reward(reward, load_tokenizer(ModelConfig(model_name_or_path=name)) if name else None)
    check_reward(scorer, [row for answer in matched.pairs[0] for row in answer.reward_rows()])
    judgements, mean_a, mean_b = judge_by_reward(matched.pairs, scorer, options.tie_margin)
    figures = {"reward": reward.reward, **mean_a.columns("reward_a"), **mean_b.columns("reward_b")}
    return judgements, {"calls": 0, "cached": 0, **figures}


def _usage_figures(completions: Sequence[Completion], endpoint: EndpointOptions) -> dict[str, Any]:
    """Sums the tokens of all answers, those of the cache included, and their price."""
    tokens = [sum(c.prompt_tokens or 0 for c in completions), sum(c.completion_tokens or 0 for c in completions)]
    prices = endpoint.price_per_million_input, endpoint.price_per_million_output
    known = prices[0] is not None and prices[1] is not None
    return {
        "answered_by": sorted({c.model for c in completions if c.model}),
        "prompt_tokens": tokens[0],
        "completion_tokens": tokens[1],
        "answers_without_usage": sum(c.prompt_tokens is None or c.completion_tokens is None for c in completions),
        "cost": sum(n * (price or 0) for n, price in zip(tokens, prices, strict=True)) / 1e6 if known else None,
    }


def _report(options: JudgeOptions, matched: Matched, judgements: Sequence[Judgement], figures: dict[str, Any]) -> None:
    """Prints the table and writes the files."""
    overall, categories = WinRate.of([judgement.outcome for judgement in judgements]), category_figures(judgements)
    name_a, name_b = _names(options)
    figures = {
        "a": name_a,
        "b": name_b,
        **overall.columns(),
        **figures,
        "unmatched_a": matched.unmatched_a,
        "unmatched_b": matched.unmatched_b,
        "length_a": sum(a.length for a, _ in matched.pairs) / len(matched.pairs),
        "length_b": sum(b.length for _, b in matched.pairs) / len(matched.pairs),
        "categories": {name: found.columns() for name, found in categories.items()},
    }
    console().print(_table({**categories, "all": overall}, f"win rate of {name_a} against {name_b}"))
    for line in _notes(overall, figures):
        console().print(line, soft_wrap=True)
    if options.verdicts:
        write_text(options.verdicts, json_lines(verdict_rows(judgements)))
    if options.json:
        write_json(options.json, figures)
    for path in filter(None, (options.json, options.verdicts)):
        console().print(f"written to {path}", soft_wrap=True)


def _table(rates: dict[str, WinRate], title: str) -> Table:
    """Renders a row for each category and one for all."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for column in ("win rate", "95% interval", "wins", "ties", "losses", "unparsed"):
        table.add_column(column, justify="right")
    for name, found in rates.items():
        interval = "-" if found.rate is None else f"{found.wilson[0]:.1%} to {found.wilson[1]:.1%}"
        rate = "-" if found.rate is None else f"{found.rate.mean:.1%}"
        counts = (str(count) for count in (found.wins, found.ties, found.losses, found.unparsed))
        table.add_row(name, rate, interval, *counts)
    return table


def _notes(overall: WinRate, figures: dict[str, Any]) -> list[str]:
    """Returns the lines below the table."""
    lines = []
    if (controlled := overall.length_controlled) is not None:
        rate, ends = f"{controlled.rate:.1%}", f"{controlled.low:.1%} to {controlled.high:.1%}"
        lines.append(
            f"at equal length: {rate} ({ends}); characters: {figures['length_a']:.0f} / {figures['length_b']:.0f}"
        )
    if figures.get("position_bias") is not None:
        first = figures["first_shown_rate"]
        shown = "" if first is None else f"; {first:.1%} of verdicts other than ties are for the response shown first"
        lines.append(f"verdict changes with the order: {figures['position_bias']:.1%} of pairs{shown}")
    if figures["unmatched_a"] or figures["unmatched_b"]:
        lines.append(f"without a counterpart, not judged: {figures['unmatched_a']} of A, {figures['unmatched_b']} of B")
    unparsed = figures.get("unparsed_answers", [])
    for answer in unparsed[:LISTED]:
        lines.append(f"unparsed: {answer['row']}, {answer['order']}: {answer['reason']}")
    if len(unparsed) > LISTED:
        lines.append(f"unparsed: {len(unparsed) - LISTED} more answers, which --json lists")
    if "endpoint" in figures:
        cost = "" if figures["cost"] is None else f", cost {figures['cost']:.4g}"
        tokens = f"{figures['prompt_tokens']} + {figures['completion_tokens']} tokens{cost}"
        lines.append(f"{figures['calls']} calls, {figures['cached']} from the cache, {tokens}")
    else:
        lines.append(f"mean reward: {figures['reward_a']:.4g} / {figures['reward_b']:.4g}")
    return lines


def _names(options: JudgeOptions) -> tuple[str, str]:
    return str(options.name_a), str(options.name_b)
