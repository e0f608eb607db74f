"""Finds special-token text: at the end of responses, in users' words, and in chats that are rendered already."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from tdpo.data.encode import Piece
from tdpo.errors import UserError
from tdpo.types import Message, PreferenceRecord

LOOKED_AT = 100
"""Rows of a source among which most decide that its texts are rendered chats."""
FOREIGN = re.compile(r"<\|\w+\|>|<\uff5c[^\uff5c<>\s]+\uff5c>|<(?:start|end)_of_turn>|\[/?INST\]|<<SYS>>")
"""Control tokens of the usual families of models."""
FOREIGN_HINTS = ("<|", "<\uff5c", "_of_turn>", "INST]", "<<SYS")
OPEN, CLOSE = "\ue000", "\ue001"
"""Private-use characters around the index of a text that is the user's, see :meth:`SpecialTokens.mark`."""
RESPONSE = "\ue002"
"""Marks a response's content where only its position is needed."""


class SpecialTokens:
    """The special tokens of a tokenizer, and what their text in a dataset means.

    Args:
        tokenizer: A transformers tokenizer.

    Attributes:
        texts: Texts of all special tokens, the longest first.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.texts = sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self._end = str(tokenizer.eos_token)
        # A stray end token, a wiki's <unk>: texts hold those without being chats.
        ordinary = {self._end, *(str(getattr(tokenizer, f"{name}_token")) for name in ("pad", "unk", "mask"))}
        control = [token for token in self.texts if token not in ordinary]
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        self._hints = tuple({*FOREIGN_HINTS, *(token[:2] for token in control)})
        self._marked = [*self.texts, OPEN, CLOSE, RESPONSE]
        self._to_mark = re.compile("|".join(map(re.escape, self._marked)))

    def mark(self, value: Any) -> Any:
        """Returns messages or tools with marks in place of special-token text, which a template may write itself."""
        if isinstance(value, str):
            return self._to_mark.sub(lambda found: f"{OPEN}{self._marked.index(found[0])}{CLOSE}", value)
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {name: value[name] if name == "role" else self.mark(value[name]) for name in value}
        return value

    def split(self, rendered: str, continues: bool = False) -> list[Piece]:
        """Splits a rendering into the template's text, whose special tokens are special, and the user's marked one."""
        pieces: list[Piece] = []
        for index, text in enumerate(re.split(f"{OPEN}([0-9]+){CLOSE}", rendered)):
            literal = index % 2 == 1
            # A template that cuts text can leave half a mark; the user's own such characters are marked themselves.
            text = self._marked[int(text)] if literal else text.replace(OPEN, "").replace(CLOSE, "")
            if text:
                pieces.append((text, literal, continues or bool(pieces)))
        return pieces

    def unmark(self, rendered: str) -> str:
        """Returns a rendering with the user's own text in place of the marks."""
        return "".join(text for text, _, _ in self.split(rendered))

    def cut_after_end(self, response: str) -> tuple[str, bool]:
        """Cuts the white space after a special token that ends a response, and returns whether it ends in one."""
        end = max((response.rfind(token) + len(token) for token in self.texts if token in response), default=0)
        ended = end > 0 and not response[end:].strip()
        return (response[:end], True) if ended else (response, False)

    def control_token(self, texts: Iterable[Any]) -> str | None:
        """Returns the first control token of the tokenizer's own in plain texts, or at the start of a user's turn."""
        for text in texts:
            if isinstance(text, str):
                found = self._control.search(text)
            else:
                turns = (turn["content"].lstrip() for turn in text if turn["role"] == "user")
                found = next(filter(None, map(self._control.match, turns)), None)
            if found:
                return found[0]
        return None

    def notices(self, prompt: str, responses: Sequence[str], option_set: bool) -> Iterator[str]:
        """Yields warnings for special-token text in plain texts, which is encoded as characters.

        Args:
            prompt: The prompt.
            responses: The responses.
            option_set: Whether ``--special_tokens`` is set, so that its effect needs no warning.
        """
        joined = "\0".join((prompt, *responses))
        ends = any(response.rstrip().endswith(self._end) for response in responses)
        if not ends and not any(hint in joined for hint in self._hints):
            return
        own = None if option_set else self.control_token((joined,))
        if own:
            yield f"special-token text such as {own!r} is encoded as plain text (--special_tokens tokens: as tokens)"
        elif ends and not option_set:
            yield (
                f"a response ends in the text {self._end!r}, which is encoded as plain text (--special_tokens tokens: "
                "as the end token)"
            )
        foreign = next((token for token in FOREIGN.findall(joined) if token not in self.texts), None)
        if foreign:
            yield f"looks like a chat rendered for another tokenizer: {foreign!r} is plain text in this one"

    def notices_of_turns(self, responses: Sequence[Sequence[Message]]) -> Iterator[str]:
        """Names the special token that a response of a chat ends in as text, before the template's own end."""
        ends = [turns[-1]["content"].rstrip() for turns in responses]
        token = next((token for end in ends if end.endswith(">") for token in self.texts if end.endswith(token)), "")
        if token:
            yield f"a response ends in the text {token!r}, which is encoded as plain text before the end token"

    def refuse_rendered(self, records: Iterable[PreferenceRecord]) -> Iterator[PreferenceRecord]:
        """Yields all records, but stops where most of the first ones of a source are rendered chats.

        Raises:
            UserError: naming the source, a row, and the option that decides.
        """
        looked_at: Counter[str] = Counter()
        hits: Counter[str] = Counter()
        first: dict[str, tuple[PreferenceRecord, str]] = {}
        for record in records:
            source = record.source
            if looked_at[source] < LOOKED_AT:
                looked_at[source] += 1
                token = self.control_token((record.prompt, record.chosen, record.rejected))
                if token:
                    hits[source] += 1
                    first.setdefault(source, (record, token))
                if looked_at[source] == LOOKED_AT < 2 * hits[source]:
                    raise _choice(*first[source], hits[source], LOOKED_AT)
            yield record
        for source, count in hits.items():
            if 2 * count > looked_at[source]:
                raise _choice(*first[source], count, looked_at[source])


def _choice(record: PreferenceRecord, token: str, count: int, looked_at: int) -> UserError:
    """Returns the error that asks how special-token text is meant."""
    found = (
        f"{record.source}: {count} of the first {looked_at} rows hold special tokens as text "
        f"(row {record.row}: {token!r}"
    )
    if not isinstance(record.prompt, str):
        return UserError(
            f"{found} begins a user's turn), as chats do that are rendered already and would be rendered again. "
            "Choose: --columns prompt=question takes the text of a column as it is, --special_tokens text encodes "
            "them as plain text inside the turn"
        )
    return UserError(
        f"{found}), as chats do that are rendered already. Choose: --special_tokens tokens encodes them as those "
        "tokens and adds no second start or end token, --special_tokens text encodes them as plain text"
    )
