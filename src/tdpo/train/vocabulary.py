"""Keeps token ids that the model has no row for out of the configs that are saved with it."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from tdpo.models.policy import causal_lm

NAMES = ("pad_token_id", "bos_token_id", "eos_token_id")


class VocabularyCallback(TrainerCallback):
    """Undoes what the Trainer copies from a tokenizer with more tokens than the model.

    The Trainer writes the tokenizer's special tokens into the model's configs. A padding token without a row there
    would make a saved model that cannot be loaded.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Removes ids outside the vocabulary from the model's configs."""
        lm = causal_lm(model)
        text = lm.config.get_text_config()
        for config in (lm.config, text, getattr(lm, "generation_config", None)):
            for name in NAMES:
                found = getattr(config, name, None)
                if isinstance(found, int) and found >= text.vocab_size:
                    setattr(config, name, None)
                elif isinstance(found, list):
                    setattr(config, name, [token for token in found if token < text.vocab_size] or None)
