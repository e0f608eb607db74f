"""Texts that are rendered chats already: how they are noticed, and where their prompt ends."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tdpo.data.formats.report import Placed
from tdpo.errors import UserError
from tdpo.types import Message

LOOKED_AT = 100
"""Rows of a source among which most decide that its texts are rendered chats."""
FOREIGN = re.compile(r"<\|\w+\|>|<\uff5c[^\uff5c<>\s]+\uff5c>|<(?:start|end)_of_turn>|\[/?INST\]|<<SYS>>")
"""Control tokens of the usual families of models."""
FOREIGN_HINTS = ("<|", "<\uff5c", "_of_turn>", "INST]", "<<SYS")
Item = TypeVar("Item", bound=Placed)


class RenderedTexts:
    """Notices rendered chats among texts.

    Args:
        tokenizer: A transformers tokenizer.
        special: Texts of its special tokens.
    """

    def __init__(self, tokenizer: Any, special: Sequence[str]) -> None:
        self.end = str(tokenizer.eos_token)
        # A stray end token, a wiki's <unk>: texts hold those without being chats.
        ordinary = {self.end, *(str(getattr(tokenizer, f"{name}_token")) for name in ("pad", "unk", "mask"))}
        control = [token for token in special if token not in ordinary]
        self._own = re.compile("|".join(map(re.escape, control))) if control else None
        self._special = set(special)
        self._hints = tuple({*FOREIGN_HINTS, *(token[:2] for token in control)})

    def control_token(self, texts: Iterable[str]) -> str | None:
        """Returns the first control token of the tokenizer's own in some texts, other than an end token."""
        matches = (self._own.search(text) for text in texts) if self._own else ()
        return next((match[0] for match in matches if match), None)

    def rendered_turn(self, texts: Iterable[Any]) -> str | None:
        """Returns the control token that a user's turn begins with, where some of the texts are chats."""
        turns = (turn for text in texts if isinstance(text, list) for turn in text if turn["role"] == "user")
        matches = (self._own.match(turn["content"].lstrip()) for turn in turns) if self._own else ()
        return next((match[0] for match in matches if match), None)

    def notices_of_turns(self, responses: Sequence[Sequence[Message]]) -> Iterator[str]:
        """Names the special token that a response of a chat ends in as text, before the template's own end."""
        ends = (turns[-1]["content"].rstrip() for turns in responses)
        token = next(
            (token for end in ends if end.endswith(">") for token in self._special if end.endswith(token)), None
        )
        if token:
            yield f"a response ends in the text {token!r}, which is encoded as plain text before the end token"

    def notices(self, prompt: str, responses: Sequence[str], chosen: bool) -> Iterator[str]:
        """Names what in the texts would be a control token elsewhere and is plain text here.

        Args:
            prompt: The prompt.
            responses: The responses.
            chosen: Whether the user has said what the tokenizer's own special tokens are in texts.
        """
        joined = "\0".join((prompt, *responses))
        ends = any(response.rstrip().endswith(self.end) for response in responses)
        if not ends and not any(hint in joined for hint in self._hints):
            return
        own = None if chosen else self.control_token((joined,))
        if own:
            yield f"special-token text such as {own!r} is encoded as plain text (--special_tokens tokens: as tokens)"
        elif ends and not chosen:
            yield (
                f"a response ends in the text {self.end!r}, which is encoded as plain text (--special_tokens tokens: "
                "as the end token)"
            )
        foreign = next((token for token in FOREIGN.findall(joined) if token not in self._special), None)
        if foreign:
            yield f"looks like a chat rendered for another tokenizer: {foreign!r} is plain text in this one"

    def refuse_unless_chosen(self, items: Iterable[Item], texts_of: Callable[[Item], Sequence[Any]]) -> Iterator[Item]:
        """Passes items on, and stops where most of the first ones of a source are rendered chats.

        Raises:
            UserError: naming the source, a row, and the option that decides.
        """
        seen: Counter[str] = Counter()
        found: dict[str, list[tuple[Item, str, bool]]] = {}
        for item in items:
            if seen[item.source] < LOOKED_AT:
                seen[item.source] += 1
                texts = texts_of(item)
                inside = self.rendered_turn(texts)
                token = inside or self.control_token(text for text in texts if isinstance(text, str))
                if token:
                    found.setdefault(item.source, []).append((item, token, inside is not None))
                if seen[item.source] == LOOKED_AT:
                    _refuse(found.get(item.source, []), LOOKED_AT)
            yield item
        for source, hits in found.items():
            _refuse(hits, seen[source])


def _refuse(hits: Sequence[tuple[Placed, str, bool]], looked_at: int) -> None:
    if 2 * len(hits) <= looked_at:
        return
    place, token, in_a_turn = hits[0]
    if in_a_turn:
        raise UserError(
            f"{place.source}: {len(hits)} of the first {looked_at} rows hold special tokens as text (row {place.row}: "
            f"{token!r} begins a user's turn), as chats do that are rendered already and would be rendered again. "
            "Choose: --columns prompt=question takes the text of a column as it stands, --special_tokens text encodes "
            "them as plain text inside the turn"
        )
    raise UserError(
        f"{place.source}: {len(hits)} of the first {looked_at} rows hold special tokens as text (row {place.row}: "
        f"{token!r}), as chats do that are rendered already. Choose: --special_tokens tokens encodes them as those "
        "tokens and adds no second start or end token, --special_tokens text encodes them as plain text"
    )
