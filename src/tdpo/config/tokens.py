"""Options of tokenising: rendering of chats, special tokens and limits of length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tdpo.errors import UserError

NOT_OF_A_ROW = (
    "conversation", "tools", "chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "padding",
    "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
)  # fmt: skip
"""Arguments of ``apply_chat_template`` that are not for the template."""
TruncationMode = Literal["keep_end", "keep_start"]
OnOverlong = Literal["truncate", "drop", "error"]
SpecialTokens = Literal["text", "tokens"]


@dataclass(frozen=True)
class Rendering:
    """Rendering of chats, and treatment of special-token text in plain texts.

    Attributes:
        template_arguments: Arguments of the chat template for all rows; a row's ``chat_template_kwargs`` win.
        special_tokens: ``"tokens"`` encodes special-token text in plain texts as those tokens, for texts that are
            rendered chats already, and adds no second start or end token. ``"text"`` encodes it as plain text, as None
            does; with None, a dataset most of whose texts are rendered chats is refused.
    """

    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: SpecialTokens | None = None


@dataclass(frozen=True)
class Lengths:
    """Largest lengths of sequences, in tokens, and treatment of longer ones.

    A pair is overlong if its prompt and its longer response together exceed ``max_length``. Truncation first cuts the
    prompt to ``max_prompt_length``, then the responses to what remains, so a response never becomes empty. A response
    that is cut loses its end token: the model is not taught to stop in the middle of a sentence.

    Attributes:
        max_length: Longest sequence, prompt and response together.
        max_prompt_length: What is left of the prompt of an overlong pair.
        truncation_mode: ``"keep_end"`` keeps a prompt's last tokens (dialogues), ``"keep_start"`` its first.
        on_overlong: ``"truncate"``, ``"drop"`` or ``"error"``.
    """

    max_length: int = 512
    max_prompt_length: int = 256
    truncation_mode: TruncationMode = "keep_end"
    on_overlong: OnOverlong = "truncate"

    def __post_init__(self) -> None:
        if self.max_prompt_length < 1 or self.max_length <= self.max_prompt_length:
            raise UserError(
                f"--max_length {self.max_length} must be larger than --max_prompt_length {self.max_prompt_length}, and "
                "both positive: a truncated prompt has to leave room for a response"
            )
