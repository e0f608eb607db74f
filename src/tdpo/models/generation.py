"""Repairs a model's generation config so that it can be saved, and so that generation stops where responses end."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from tdpo.errors import UserError

logger = logging.getLogger("tdpo")


def repair_generation_config(model: Any) -> None:
    """Resets the generation flags that contradict others, with a warning; such a config can be used but not saved.

    ``do_sample: false`` beside ``temperature: 0.9`` is one: the temperature has no effect, and saving raises.

    Raises:
        UserError: if that is not enough.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return
    try:
        config.validate(strict=True)
        return
    except ValueError as error:
        flags = [name for name in re.findall(r"^- `(\w+)`", str(error), re.MULTILINE) if hasattr(config, name)]
    named = ", ".join(f"{name}={getattr(config, name)}" for name in flags)
    for name in flags:
        setattr(config, name, getattr(GenerationConfig(), name))
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UserError(
            f"the model's generation config cannot be saved; correct it before training: {error}"
        ) from error
    logger.warning(
        "the model's generation config could not be saved: %s without effect under do_sample=%s, num_beams=%s; removed",
        named, config.do_sample, config.num_beams,
    )  # fmt: skip


def add_end_token(model: Any, tokenizer: Any, last_tokens: Iterable[int]) -> None:
    """Adds the token that responses end with to the model's end tokens, with a warning, where it is not among them.

    Only a special or added token of the tokenizer counts: a truncated response ends with a word.

    Args:
        model: Its ``generation_config`` is changed.
        tokenizer: The tokenizer of the responses.
        last_tokens: The last token of each response.
    """
    config = getattr(model, "generation_config", None)
    if config is None or tokenizer is None:
        return
    special = {*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "added_tokens_decoder", ())}
    counts = Counter(token for token in last_tokens if token in special)
    token, count = next(iter(counts.most_common(1)), (-1, 0))
    known = config.eos_token_id
    if known is None or known == []:
        known = model.config.get_text_config().eos_token_id
    known = [known] if isinstance(known, int) else list(known or ())
    if 2 * count <= counts.total() or token in known:
        return
    config.eos_token_id = [*known, token]
    logger.warning(
        "responses end with %s (%d), which is not among the model's end tokens %s: added to them, so that the saved "
        "model stops there",
        tokenizer.convert_ids_to_tokens(token), token, known,
    )  # fmt: skip


def adopt_generation_config(model: Any, folder: str | Path) -> None:
    """Loads the generation config that was saved beside an adapter, where there is one."""
    if (Path(folder).expanduser() / GENERATION_CONFIG_NAME).is_file():
        model.get_base_model().generation_config = GenerationConfig.from_pretrained(str(Path(folder).expanduser()))
