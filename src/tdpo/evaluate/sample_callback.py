"""Responses sampled before and after training, for the report on a run."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback
from typing_extensions import override

from tdpo.config.data import UNLIMITED
from tdpo.evaluate.generate import Sampling, decode_response, end_tokens, sample_ids
from tdpo.models.policy import position_limit
from tdpo.train.record import RecordCallback

logger = logging.getLogger("tdpo")
LENGTH = 64
"""Most tokens of a response."""


class SampleCallback(TrainerCallback):
    """Writes the most likely responses to a few prompts into the record of the run, before and after training.

    Args:
        trainer: The trainer, whose record is written to.
        tokenizer: The policy's tokenizer.
        pairs: Pairs whose prompts are used; those that do not fit the model with a response are skipped.
        count: Number of different prompts.
    """

    def __init__(self, trainer: Any, tokenizer: Any, pairs: Iterable[Any], count: int) -> None:
        self.record: RecordCallback = trainer.record
        self.tokenizer = tokenizer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            logger.warning("--sample_prompts has no effect: sharded models are not sampled from during training")
            count = 0
        limit = position_limit(trainer.model) or UNLIMITED
        self.prompts: list[list[int]] = []
        for ids in (pair.prompt_ids for pair in pairs if count):
            if len(self.prompts) == count:
                break
            if len(ids) + LENGTH <= limit and ids not in self.prompts:
                self.prompts.append(ids)

    @override
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._sample(model, state)

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._sample(model, state)

    def _sample(self, model: Any, state: Any) -> None:
        if not self.prompts:
            return
        sampling = Sampling(max_new_tokens=LENGTH, temperature=0.0)
        drawn = sample_ids(model, self.prompts, sampling, end_tokens(model, self.tokenizer))
        samples = [
            {
                "prompt": self.tokenizer.decode(prompt, skip_special_tokens=True),
                "response": decode_response(self.tokenizer, prompt, response),
            }
            for prompt, (response,) in zip(self.prompts, drawn, strict=True)
        ]
        self.record.write("samples", state, samples=samples)
