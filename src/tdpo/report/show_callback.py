"""Looks at a run while it trains: responses to a few prompts, and the token view at the end."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import TrainerCallback
from typing_extensions import override

from tdpo.config.data import UNLIMITED
from tdpo.errors import first_line
from tdpo.evaluate.generate import Sampling, decode_response, end_tokens, sample_ids
from tdpo.models.policy import position_limit
from tdpo.report.inspect import inspect
from tdpo.train.trackers import track_page, track_samples

logger = logging.getLogger("tdpo")
LENGTH = 64
"""Most tokens of a response."""
TOKEN_VIEW = "tokens.html"
"""Name of the token view in the run's folder."""


class ShowCallback(TrainerCallback):
    """Samples before training, at every evaluation and after it, and writes the token view after training.

    Samples, the most likely responses, go to the record of the run, the progress shown and the run's trackers. The
    token view goes to the run's folder and to trackers that keep files. An error here stops nothing.

    Args:
        trainer: The trainer. The callback is added to it, before those of trackers, which close theirs at the end.
        tokenizer: The policy's tokenizer.
        pairs: Pairs to show; prompts that do not fit the model with a response are skipped.
        prompts: Number of different prompts to sample from.
        inspected: Number of pairs in the token view.
    """

    def __init__(self, trainer: Any, tokenizer: Any, pairs: Sequence[Any], prompts: int, inspected: int) -> None:
        self.trainer, self.tokenizer = trainer, tokenizer
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            logger.warning("no samples and no token view: sharded models are not sampled from during training")
            prompts = inspected = 0
        self.inspected = list(islice(pairs, inspected))
        limit = position_limit(trainer.model) or UNLIMITED
        self.prompts: list[list[int]] = []
        for ids in (pair.prompt_ids for pair in pairs if prompts):
            if len(self.prompts) == prompts:
                break
            if len(ids) + LENGTH <= limit and ids not in self.prompts:
                self.prompts.append(ids)
        self._training, self._sampled = False, -1
        trainer.callback_handler.callbacks.insert(0, self)

    @override
    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._training = True
        if state.global_step == 0 and self._sampled < 0:
            self._try(self._sample, model, state)

    @override
    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self._training:
            self._try(self._sample, model, state)

    @override
    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._training = False
        if self._sampled < state.global_step or args.load_best_model_at_end:
            self._try(self._sample, model, state)
        if self.inspected and state.is_world_process_zero:
            self._try(self._inspect, model, state)

    def _try(self, work: Callable[[Any, Any], None], model: Any, state: Any) -> None:
        try:
            work(model, state)
        except Exception as error:
            logger.warning("step %d cannot be shown: %s", state.global_step, first_line(error))

    def _sample(self, model: Any, state: Any) -> None:
        if not self.prompts:
            return
        self._sampled = state.global_step
        sampling = Sampling(max_new_tokens=LENGTH, temperature=0.0)
        drawn = sample_ids(model, self.prompts, sampling, end_tokens(model, self.tokenizer))
        samples = [
            {
                "prompt": self.tokenizer.decode(prompt, skip_special_tokens=True),
                "response": decode_response(self.tokenizer, prompt, response),
            }
            for prompt, (response,) in zip(self.prompts, drawn, strict=True)
        ]
        trainer = self.trainer
        trainer.record.write("samples", state, samples=samples)
        if not trainer.args.disable_tqdm:
            trainer.progress.show_sample(state, samples[-1]["prompt"], samples[-1]["response"])
        track_samples(trainer.callback_handler.callbacks, state, samples)

    def _inspect(self, model: Any, state: Any) -> None:
        trainer = self.trainer
        if not trainer.objective.uses_reference:
            logger.warning("no token view: the objective has no reference to compare with")
            return
        with trainer.compute_loss_context_manager():
            view = inspect(
                model, trainer.reference, self.inspected, trainer.objective, self.tokenizer,
                trainer.args.per_device_eval_batch_size, trainer.args.token_weights,
                policy_name=trainer.args.output_dir, reference_name=trainer.reference_line,
            )  # fmt: skip
        path = view.save(Path(trainer.args.output_dir).expanduser() / TOKEN_VIEW)
        track_page(trainer.callback_handler.callbacks, state, path)
