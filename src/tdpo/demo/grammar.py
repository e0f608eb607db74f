"""A probabilistic grammar of short film reviews, and the transparent reward that ranks them.

The world is small enough to read and too large to memorise: more than a billion texts of about 12 to 30 words. Most
texts open with something neutral and then judge: well, badly, both or not at all.

The reward
----------
:func:`reward` scores *any* text, the ungrammatical ones of a half-trained model included. It looks up every word in
:data:`LEXICON` (weights from -2, "dreadful", to 2, "superb") and

1. counts each distinct lexicon word once, at its first occurrence, so that repeating a word earns nothing;
2. multiplies it by 1.5 after an intensifier ("very superb") and by 0.5 after a diminisher ("slightly dull");
3. multiplies it by -0.75 where a negation ("not", "never") stands among the three words before it in the same clause
   (clauses end at punctuation and at "and" and "but"): "never dull" is praise, but weaker than "gripping";
4. adds up to ``s`` and returns ``s / sqrt(s^2 + 16)``, which lies strictly between -1 and 1 and saturates.

:func:`explain` lists what every word contributed.

What gaming looks like
----------------------
Nothing in the reward asks for grammar. A policy that only wants reward strings *different* words of praise together
("superb, radiant, gripping and joyful work"), leaves neutral facts out, and runs longer than the texts it was trained
on. The reward then nears 1 while KL(policy || reference) grows, entropy and distinct n-grams fall and the length moves.
That is why the demo never shows the reward without those numbers beside it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator

ADJECTIVES = {
    "superb": 2.0, "gripping": 2.0, "wonderful": 2.0, "brilliant": 2.0, "radiant": 2.0,
    "charming": 1.0, "clever": 1.0, "warm": 1.0, "funny": 1.0, "fresh": 1.0, "graceful": 1.0, "joyful": 1.0,
    "good": 1.0, "lively": 1.0,
    "dreadful": -2.0, "terrible": -2.0, "unbearable": -2.0, "awful": -2.0, "ugly": -2.0,
    "dull": -1.0, "slow": -1.0, "clumsy": -1.0, "flat": -1.0, "stale": -1.0, "shallow": -1.0, "noisy": -1.0,
    "bad": -1.0, "lifeless": -1.0,
}  # fmt: skip
FEELINGS = {
    "delighted": 2.0, "moved": 1.0, "cheerful": 1.0, "hopeful": 1.0,
    "furious": -2.0, "bored": -1.0, "annoyed": -1.0, "sleepy": -1.0,
}  # fmt: skip
VERBS = {
    "loved": 2.0, "adored": 2.0, "enjoyed": 1.0, "admired": 1.0,
    "hated": -2.0, "loathed": -2.0, "disliked": -1.0, "regretted": -1.0,
}  # fmt: skip
NOUNS = {
    "triumph": 2.0, "gem": 2.0, "treat": 1.0, "pleasure": 1.0,
    "disaster": -2.0, "fiasco": -2.0, "mess": -1.0, "bore": -1.0,
}  # fmt: skip

LEXICON: dict[str, float] = ADJECTIVES | FEELINGS | VERBS | NOUNS
"""Weight of every word that carries sentiment: 1 or 2, positive or negative."""

INTENSIFIERS = ("very", "truly", "deeply", "utterly", "really")
DIMINISHERS = ("rather", "slightly", "somewhat", "mildly")
NEGATIONS = ("not", "never", "hardly", "no", "nothing")
BOUNDARIES = frozenset((".", ",", ";", ":", "!", "?", "and", "but"))
NEGATION_REACH = 3
INTENSIFIED, DIMINISHED, NEGATED = 1.5, 0.5, -0.75
HALF_WAY = 4.0
"""Scale of the squash: a total of this size scores 0.71."""


def explain(text: str) -> dict[str, float]:
    """Returns what every lexicon word of the text adds to the total, at its first occurrence and in order.

    Examples:
        >>> explain("The plot was never dull, and the cast was very warm, very warm.")
        {'dull': 0.75, 'warm': 1.5}
    """
    evidence: dict[str, float] = {}
    clause: list[str] = []
    for token in re.findall(r"[a-z]+|[.,;:!?]", text.lower()):
        if token in LEXICON and token not in evidence:
            before = clause[-1] if clause else ""
            degree = INTENSIFIED if before in INTENSIFIERS else DIMINISHED if before in DIMINISHERS else 1.0
            negation = NEGATED if any(word in NEGATIONS for word in clause[-NEGATION_REACH:]) else 1.0
            evidence[token] = LEXICON[token] * (degree * negation)
        clause = [] if token in BOUNDARIES else [*clause, token]
    return evidence


def reward(text: str) -> float:
    """Scores the sentiment of a text, strictly between -1 and 1; the rules are at the head of this module.

    Examples:
        >>> round(reward("The music was superb."), 3), round(reward("It was superb, superb, superb."), 3)
        (0.447, 0.447)
        >>> round(reward("I saw it in May."), 3), round(reward("The plot was not good."), 3)
        (0.0, -0.184)
    """
    total = sum(explain(text).values())
    return float(total / (total**2 + HALF_WAY**2) ** 0.5)


def rewards(texts: Iterable[str]) -> list[float]:
    """Scores texts, as ``--reward tdpo.demo.grammar:rewards``."""
    return [reward(text) for text in texts]


# A rule is a list of (weight, template). "{name}" expands a symbol in the text's polarity, "{name!}" in the opposite.
_RULES: dict[str, list[tuple[float, str]]] = {
    "praise_or_blame": [
        (4, "{lead}. {verdict}, and {verdict}."), (3, "{lead}, and {verdict}."), (2, "{lead}. {verdict}. {summary}."),
        (2, "{verdict}. {lead}, and {verdict}."),
    ],
    "mixed": [
        (3, "{lead}. {verdict}, but {verdict!}."), (2, "{lead}. {verdict}. {fact}, but {verdict!}."),
        (1, "{verdict}, but {verdict!}. {summary}."),
    ],
    "neutral": [
        (2, "{lead}. {fact}."), (2, "{lead}, and {fact}. {fact}."),
    ],
    "lead": [
        (3, "{viewer} watched {film} {when} {company}"), (3, "{film} is a {kind} about {subject}"),
        (2, "{artist} directed {film}, a {kind} about {subject}"),
        (2, "this {kind} by {artist} follows {subject} {place}"),
        (2, "in this {kind}, {artist} plays {role} {place}"), (1, "{when}, {viewer} went to see {film}"),
    ],
    "verdict": [
        (5, "{part} was {degree} {adjective}"), (3, "{part} was {adjective}"),
        (2, "{part} was {negation} {adjective!}"), (2, "{part} felt {degree} {adjective}"),
        (2, "{viewer} {verb} {part}"), (2, "{part} left me {feeling}"),
        (1, "{part} left {artist} {degree} {feeling}"), (2, "{artist} gave {part} some {adjective} moments"),
        (1, "{part} was {adjective} and {adjective}"),
    ],
    "summary": [
        (2, "as a {kind} it is a {noun}"), (1, "it is {hardly} a {noun!}"), (1, "{viewer} {verb} it"),
    ],
    "fact": [
        (2, "it runs for {length}"), (2, "it was filmed {place}"), (1, "{artist} wrote {part}"),
        (1, "{viewer} sat near the front"), (1, "the story begins {place}"),
    ],
}  # fmt: skip
# Words by symbol; of words with weights, those that fit the polarity of the text.
_TERMINALS: dict[str, tuple[str, ...] | dict[str, float]] = {
    "adjective": ADJECTIVES,
    "feeling": FEELINGS,
    "verb": VERBS,
    "noun": NOUNS,
    "degree": INTENSIFIERS + DIMINISHERS,
    "negation": ("not", "never", "hardly"),
    "hardly": ("hardly", "not"),
    "viewer": ("I", "we", "my sister", "our class", "my uncle"),
    "artist": ("Mara Lind", "Tomas Weir", "Ada Osei", "Jun Park", "Nora Vale", "Ivo Brandt", "Lucia Ferro", "Sam Hale"),
    "film": (
        "Silver Harbour", "The Ninth Lantern", "Paper Rivers", "A Winter Ledger", "Glass Orchard", "The Last Ferry",
        "Salt and Snow", "Northern Line", "The Clockmaker", "Two Bridges",
    ),
    "kind": ("comedy", "thriller", "drama", "western", "musical", "war film", "romance", "documentary"),
    "subject": (
        "two brothers", "a retired pilot", "a lost letter", "three thieves", "a village doctor", "a young painter",
        "a stubborn judge", "an old lighthouse", "four students", "a travelling circus",
    ),
    "role": ("a retired pilot", "a village doctor", "a young painter", "a stubborn judge", "a lonely thief"),
    "place": ("in Lisbon", "on a small island", "near the border", "in the desert", "at sea", "in a mill town"),
    "when": ("last night", "on Sunday", "in May", "after work", "on a long flight", "during the holidays"),
    "company": ("with friends", "alone", "with my parents", "at a festival", "in an empty hall"),
    "part": (
        "the acting", "the plot", "the music", "the ending", "the script", "the camera work", "the first half",
        "the dialogue", "the final scene", "the cast", "the editing", "the humour",
    ),
    "length": ("two hours", "ninety minutes", "three hours", "about an hour"),
}  # fmt: skip
_MOODS = ((0.32, "praise_or_blame", 1), (0.32, "praise_or_blame", -1), (0.24, "mixed", 0), (0.12, "neutral", 1))


def sample_text(rng: random.Random) -> str:
    """Draws one review from the grammar.

    Examples:
        >>> sample_text(random.Random(5)) == sample_text(random.Random(5))
        True
    """
    _, symbol, polarity = rng.choices(_MOODS, weights=[mood[0] for mood in _MOODS])[0]
    text = _expand(symbol, polarity or rng.choice((1, -1)), rng)
    return re.sub(r"(^|\. )([a-z])", lambda match: match[1] + match[2].upper(), text)


def distinct_texts(rng: random.Random) -> Iterator[str]:
    """Draws reviews without end, each text once."""
    seen: set[str] = set()
    while True:
        text = sample_text(rng)
        if text not in seen:
            seen.add(text)
            yield text


def _expand(symbol: str, polarity: int, rng: random.Random) -> str:
    if symbol in _TERMINALS:
        words = _TERMINALS[symbol]
        if isinstance(words, dict):
            words = tuple(word for word, weight in words.items() if weight * polarity > 0)
        return rng.choice(words)
    templates = _RULES[symbol]
    template = rng.choices(templates, weights=[weight for weight, _ in templates])[0][1]
    return re.sub(r"\{(\w+)(!?)\}", lambda m: _expand(m[1], -polarity if m[2] else polarity, rng), template)
