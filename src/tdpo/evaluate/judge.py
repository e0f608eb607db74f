"""Pairwise judging of two sets of responses: by a language model that sees both, or by a reward model."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tdpo.errors import UserError, nearest
from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.judge_client import NO_CHOICES, Completion, JudgeClient
from tdpo.evaluate.responses import Answer, prompt_text
from tdpo.evaluate.win_rate import Outcome, WinRate
from tdpo.types import Message

Order = Literal["both", "random"]
Pair = tuple[Answer, Answer]
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")
VERDICT = re.compile(r"\[\[([ABC])\]\]")
EXCERPT = 200
"""Characters of an answer without a verdict that are listed."""

TASK = """\
Compare the two assistants' answers to the same user. Decide which one serves the user better: it does what was asked, \
is correct, is clear, and has what is needed and no more. Do not let the order in which the answers are shown, their \
length or their style of formatting decide by themselves.
"""
VERDICT_REQUEST = """\
First explain the differences that matter in a few sentences. Then end with your verdict on a line of its own, in \
exactly one of these forms: [[A]] if assistant A is better, [[B]] if assistant B is better, [[C]] if neither is."""


@dataclass(frozen=True)
class JudgePrompt:
    """The text that asks the judge, with placeholders in braces.

    Attributes:
        text: The text; ``{prompt}``, ``{response_a}`` and ``{response_b}``, with ``_2`` behind them for a second turn.
        turns: Turns of the conversations that it is for.
    """

    text: str
    turns: int = 1

    @classmethod
    def default(cls, turns: int = 1) -> JudgePrompt:
        """Returns the project's own prompt."""
        parts = [TASK]
        for names in _names(turns):
            prompt, response_a, response_b = (f"{{{name}}}" for name in names)
            parts.append(f"<user>\n{prompt}\n</user>\n")
            parts += [f"<assistant {x}>\n{r}\n</assistant {x}>\n" for x, r in (("A", response_a), ("B", response_b))]
        if turns > 1:
            parts.append("Each assistant saw only its own earlier answers. Judge the whole conversation.\n")
        return cls("\n".join([*parts, VERDICT_REQUEST]), turns)

    @classmethod
    def read(cls, path: str, turns: int = 1) -> JudgePrompt:
        """Reads a file and checks its placeholders.

        Raises:
            UserError: if it cannot be read, a placeholder is missing, or one is unknown.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"--judge_prompt {path}: cannot be read: {reason}") from error
        known = [name for names in _names(turns) for name in names]
        found = PLACEHOLDER.findall(text)
        for name in found:
            if name not in known:
                raise UserError(
                    f"--judge_prompt {path}: unknown placeholder {{{name}}}; there are "
                    f"{', '.join(f'{{{name}}}' for name in known)}.{nearest(name, known)}"
                )
        missing = [f"{{{name}}}" for name in known if name not in found]
        if missing:
            of = "" if turns == 1 else f" for conversations of {turns} turns"
            raise UserError(f"--judge_prompt {path}: {', '.join(missing)} missing{of}")
        return cls(text, turns)

    def messages(self, first: Answer, second: Answer) -> list[Message]:
        """Returns the message that shows ``first`` as assistant A and ``second`` as B."""
        values: dict[str, str] = {}
        shown = zip(first.prompts, first.responses, second.responses, strict=True)
        for names, (prompt, *responses) in zip(_names(self.turns), shown, strict=True):
            values |= zip(names, (prompt_text(prompt), *responses), strict=True)
        # In one pass: a response that holds a placeholder's name is shown as it is.
        return [{"role": "user", "content": PLACEHOLDER.sub(lambda match: values[match[1]], self.text)}]


@dataclass(frozen=True)
class Verdict:
    """The judge's answer to one pair in one order.

    Attributes:
        a_first: Whether A's response was shown first.
        score: 1 if it prefers A's response, 0 for B's, 1/2 for a tie; None without a verdict.
        reason: Why there is no verdict, or an empty text.
        text: What the judge wrote.
    """

    a_first: bool
    score: float | None
    reason: str = ""
    text: str = ""


@dataclass(frozen=True)
class Judgement:
    """A pair with its verdicts; a reward model gives one.

    Attributes:
        pair: The answers of A and B.
        verdicts: One for each order.
    """

    pair: Pair
    verdicts: Sequence[Verdict]

    @property
    def score(self) -> float | None:
        """Returns the score of A: verdicts that differ between the orders are a tie, as in MT-Bench."""
        scores = {verdict.score for verdict in self.verdicts}
        if None in scores:
            return None
        return scores.pop() if len(scores) == 1 else 0.5

    @property
    def outcome(self) -> Outcome:
        """Returns what the win rate is computed from."""
        a, b = self.pair
        return Outcome(a.key, self.score, a.length - b.length)


def read_verdict(completion: Completion) -> tuple[str | None, str]:
    """Returns A, B or C, or None and the reason: cut off, without a verdict, or with several different ones.

    Examples:
        >>> read_verdict(Completion("A is right. [[A]]")), read_verdict(Completion("[[A]] or [[B]]"))
        (('A', ''), (None, 'several verdicts: A, B'))
    """
    if completion.finish_reason == "length":
        return None, "cut at --max_tokens"
    if completion.finish_reason == NO_CHOICES or not completion.text:
        return None, f"no text (finish reason: {completion.finish_reason})"
    found = sorted(set(VERDICT.findall(completion.text)))
    if len(found) == 1:
        return found[0], ""
    return None, f"several verdicts: {', '.join(found)}" if found else "no verdict"


def judge_pairs(
    pairs: Sequence[Pair],
    client: JudgeClient,
    prompt: JudgePrompt,
    order: Order = "both",
    on_answer: Callable[[int], None] = lambda count: None,
) -> tuple[list[Judgement], list[Completion]]:
    """Asks the judge about every pair.

    Args:
        pairs: Answers of A and B to the same prompts.
        client: Asks the endpoint.
        prompt: The text that asks.
        order: ``both`` shows every pair twice, A first and B first; ``random`` once, in an order that depends on the
            prompt alone.
        on_answer: Called with the number of answers so far.

    Returns:
        A judgement for each pair, and every answer once.

    Raises:
        UserError: if calls fail; see :meth:`JudgeClient.ask`.
    """
    asked: list[tuple[int, bool]] = []
    for index, (a, _) in enumerate(pairs):
        orders = (True, False) if order == "both" else (_a_first(a.key, index),)
        asked += [(index, a_first) for a_first in orders]
    questions: dict[str, list[Message]] = {}
    for index, a_first in asked:
        a, b = pairs[index]
        label = f"{a.location}, {'A' if a_first else 'B'} first"
        questions[label] = prompt.messages(*((a, b) if a_first else (b, a)))
    completions = client.ask(questions, on_answer)
    verdicts: dict[int, list[Verdict]] = {}
    for (index, a_first), completion in zip(asked, completions, strict=True):
        letter, reason = read_verdict(completion)
        for_first = {"A": 1.0, "B": 0.0, "C": 0.5, None: None}[letter]
        score = for_first if a_first or for_first is None else 1 - for_first
        verdicts.setdefault(index, []).append(Verdict(a_first, score, reason, completion.text))
    return [Judgement(pair, verdicts[index]) for index, pair in enumerate(pairs)], completions


def judge_by_reward(
    pairs: Sequence[Pair], reward: Callable[[Sequence[Mapping[str, Any]]], Sequence[float]], tie_margin: float = 0.0
) -> tuple[list[Judgement], Estimate, Estimate]:
    """Compares rewards: the higher one wins, and a difference of at most ``tie_margin`` is a tie.

    The reward of a conversation is the mean over its turns.

    Args:
        pairs: Answers of A and B to the same prompts.
        reward: Returns the rewards of rows with ``prompt`` and ``response``.
        tie_margin: Largest difference that is a tie.

    Returns:
        A judgement for each pair, and the mean rewards of A and B.

    Raises:
        UserError: for a reward that is not finite.
    """
    rows = [row for pair in pairs for answer in pair for row in answer.reward_rows()]
    found = iter(reward(rows))
    rewards = [[_mean_reward(answer, found) for answer in pair] for pair in pairs]
    judgements = []
    for pair, (reward_a, reward_b) in zip(pairs, rewards, strict=True):
        tie = abs(reward_a - reward_b) <= tie_margin
        judgements.append(Judgement(pair, [Verdict(True, 0.5 if tie else float(reward_a > reward_b))]))
    of_a, of_b = (Estimate.of([both[side] for both in rewards]) for side in (0, 1))
    return judgements, of_a, of_b


def _mean_reward(answer: Answer, rewards: Iterator[float]) -> float:
    """Takes the rewards of an answer's turns from the iterator and averages them."""
    mean = sum(next(rewards) for _ in answer.responses) / len(answer.responses)
    if not math.isfinite(mean):
        raise UserError(f"{answer.location}: the reward is {mean}")
    return mean


def position_figures(judgements: Sequence[Judgement]) -> dict[str, float | None]:
    """Computes how much the verdicts depend on the order.

    Returns:
        ``position_bias``: share of pairs, judged in both orders, whose two verdicts differ; ``first_shown_rate``: share
        of the verdicts other than ties that are for the response shown first, 1/2 without bias. None without any.
    """
    both = [judgement for judgement in judgements if len(judgement.verdicts) == 2 and judgement.score is not None]
    flipped = [len({verdict.score for verdict in judgement.verdicts}) == 2 for judgement in both]
    decided = [v for judgement in both for v in judgement.verdicts if v.score != 0.5]
    first = [v.a_first == (v.score == 1) for v in decided]
    return {
        "position_bias": sum(flipped) / len(flipped) if flipped else None,
        "first_shown_rate": sum(first) / len(first) if first else None,
    }


def unparsed_answers(judgements: Sequence[Judgement]) -> list[dict[str, str]]:
    """Lists the answers without a verdict: row, order, reason and their beginning."""
    return [
        {
            "row": judgement.pair[0].location,
            "order": "A first" if verdict.a_first else "B first",
            "reason": verdict.reason,
            "answer": verdict.text[:EXCERPT],
        }
        for judgement in judgements
        for verdict in judgement.verdicts
        if verdict.score is None
    ]


def category_figures(judgements: Sequence[Judgement]) -> dict[str, WinRate]:
    """Computes the win rate of each category, in the order of their first pair; none without categories."""
    groups: dict[str, list[Outcome]] = {}
    for judgement in judgements:
        groups.setdefault(judgement.pair[0].category, []).append(judgement.outcome)
    return {name: WinRate.of(outcomes) for name, outcomes in groups.items() if name}


def verdict_rows(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """Returns a row for each pair: prompt, responses, score, and the judge's words in each order."""
    rows = []
    for judgement in judgements:
        a, b = judgement.pair
        single = len(a.responses) == 1
        rows.append(
            {
                "prompt": a.prompts[0] if single else list(a.prompts),
                "response_a": a.responses[0] if single else list(a.responses),
                "response_b": b.responses[0] if single else list(b.responses),
                "score": judgement.score,
                "verdicts": [{"a_first": v.a_first, "score": v.score, "text": v.text} for v in judgement.verdicts],
            }
        )
    return rows


def _names(turns: int) -> list[tuple[str, str, str]]:
    """Returns the placeholders of each turn: prompt and both responses."""
    ends = ["", *(f"_{turn}" for turn in range(2, turns + 1))]
    return [(f"prompt{end}", f"response_a{end}", f"response_b{end}") for end in ends]


def _a_first(key: str, index: int) -> bool:
    """Draws an order that is the same in every run."""
    return random.Random(f"{key} {index}").random() < 0.5
