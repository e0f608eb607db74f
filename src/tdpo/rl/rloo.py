"""RLOO (arXiv 2402.14740) by TRL's ``RLOOTrainer``, with the same prompts, reward and reference as PPO."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.random import fork_rng
from transformers import GenerationConfig, PrinterCallback, TrainerCallback
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from typing_extensions import override

from tdpo.config.checks import check_values, documented
from tdpo.errors import UserError
from tdpo.models.adapters import has_adapter
from tdpo.models.probe import evaluating
from tdpo.rl.common import OnLog, OnMeasure, Reward, RLOptions, ScoredPrompts, check_steps, claim_folder
from tdpo.train.checkpointing import CheckpointingTrainer, clear_partial, latest_complete, step_of

LOGGED = {"reward": "reward", "entropy": "entropy", "completions/mean_length": "length"}
"""Names of the logged metrics, by TRL's names."""


@documented
@dataclass
class RLOOOptions(RLOptions):
    """Options of RLOO.

    Attributes:
        num_samples: Responses per prompt; the baseline of a response is the mean reward of the others.
        micro_batch_size: Responses per forward and backward pass, a divisor of the responses of an iteration; a
            smaller one saves memory and gives the same gradient. Default: all of them.
    """

    num_samples: int = 4
    micro_batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, num_samples=2, micro_batch_size=1)
        if self.responses % (self.micro_batch_size or self.responses):
            raise UserError(
                f"--micro_batch_size {self.micro_batch_size} does not divide the {self.responses} responses of an "
                f"iteration (--batch_size {self.batch_size} times --num_samples {self.num_samples})"
            )

    @property
    def responses(self) -> int:
        """Responses per iteration."""
        return self.batch_size * self.num_samples


def train_rloo(
    policy: Any,
    reference: Any,
    tokenizer: Any,
    prompts: Sequence[Any],
    reward: Reward,
    options: RLOOOptions,
    on_measure: OnMeasure,
    folder: Path | None = None,
    on_log: OnLog | None = None,
) -> None:
    r"""Trains a policy with RLOO, in place: maximises E[reward] - beta KL(policy || reference) over its own responses.

    An iteration is one optimizer step on ``batch_size * num_samples`` responses, with the gradient of

    .. math::
        -\frac{1}{S} \sum_i \log \pi(y_i) \Big(R_i - \frac{1}{k-1} \sum_{j \ne i} R_j\Big), \qquad
        R_i = r(y_i) - \beta \, \log \frac{\pi(y_i)}{\pi_{ref}(y_i)}

    where j runs over the k responses to the same prompt. The same seed gives the same weights, bit for bit on the same
    hardware. Torch's random state is restored; those of Python and NumPy are seeded.

    Args:
        policy: A causal language model without an adapter. It runs without dropout.
        reference: The reference, which is not changed. TRL loads a copy of it from a temporary folder.
        tokenizer: The tokenizer of both.
        prompts: Texts or lists of chat messages, or :class:`~tdpo.evaluate.prompts.Prompt` with their token ids.
        reward: Scores rows with ``prompt`` and ``response``.
        options: Options of the run.
        on_measure: Called with the number of finished iterations and the policy, every ``eval_every`` of them and at
            the end.
        folder: Where TRL writes a checkpoint after every measurement, and continues from the latest; None for none.
        on_log: Called with the metrics of every iteration: ``reward`` (less penalties for missing ends), ``kl`` (the
            mean log-ratio of the sampled responses in nats, which estimates KL(policy || reference); left out for beta
            0, where TRL computes none), ``entropy`` (nats per token) and ``length``.

    Raises:
        UserError: without TRL; for a policy with an adapter; for prompts that do not fit the model or that TRL encodes
            differently; for a reward that is not one finite number for each response; for a folder that is not
            writable or holds another run.

    Source: Ahmadian et al. (arXiv 2402.14740), eq. 7.
    """
    trainer_class, config_class = _trl_classes()
    if has_adapter(policy):
        raise UserError(
            "TRL's RLOO uses the base model of a LoRA policy as its reference; merge the adapter first (tdpo merge)"
        )
    scored = ScoredPrompts(policy, tokenizer, prompts, reward, options)
    _check_encoding(scored)
    latest: Path | None = None
    if folder is not None:
        claim_folder(Path(folder), scored, policy, reference)
        clear_partial(folder)
        latest, _ = latest_complete(folder)
        if latest is not None:
            check_steps(latest, step_of(latest), options)
    with _quiet(), tempfile.TemporaryDirectory() as scratch, _restored(policy), _restored(reference), fork_rng():
        reference.generation_config = GenerationConfig()  # an inconsistent one could not be saved
        reference.save_pretrained(scratch)
        policy.config.name_or_path = scratch  # where TRL loads its reference from
        policy.generation_config = GenerationConfig(eos_token_id=scored.ends)
        trainer = trainer_class(
            model=policy,
            reward_funcs=_reward_function(scored),
            args=config_class(**_arguments(policy, options, folder or Path(scratch), save=folder is not None)),
            train_dataset=_dataset(scored),
            processing_class=copy.deepcopy(tokenizer),
            callbacks=[_Callback(options, on_measure, on_log)],
        )
        trainer.remove_callback(PrinterCallback)  # prints every log where there is no progress bar
        trainer.run_parts, trainer.checkpoint_files = {}, []  # only the Trainer's own state
        trainer.train(resume_from_checkpoint=None if latest is None else str(latest))


def _trl_classes() -> tuple[Any, Any]:
    """Returns TRL's trainer, with checkpoints that are complete or absent, and its config.

    Raises:
        UserError: if TRL is not installed.
    """
    try:
        from trl import RLOOConfig, RLOOTrainer
    except ImportError as error:
        raise UserError("RLOO needs TRL: pip install 'tdpo[experiments]'") from error

    return type("ResumableRLOOTrainer", (CheckpointingTrainer, RLOOTrainer), {}), RLOOConfig


def _arguments(policy: nn.Module, options: RLOOOptions, folder: Path, save: bool) -> dict[str, Any]:
    """Returns the arguments of ``RLOOConfig``; those whose defaults depend on version or hardware are explicit."""
    micro = options.micro_batch_size or options.responses
    return {
        "output_dir": str(folder),
        "beta": options.beta,
        "num_generations": options.num_samples,
        "max_completion_length": options.max_new_tokens,
        "temperature": options.temperature,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "max_grad_norm": options.max_grad_norm,
        "max_steps": options.steps,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": options.responses // micro,
        "num_iterations": 1,
        "shuffle_dataset": False,  # the rows are in the order of the iterations
        "seed": options.seed,
        "disable_dropout": True,
        "use_cpu": next(policy.parameters()).device.type == "cpu",
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "steps" if save else "no",
        "save_steps": options.eval_every,
        "save_total_limit": 1,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def _dataset(scored: ScoredPrompts) -> Any:
    """Returns one row for each prompt of each iteration, in order."""
    from datasets import Dataset

    return Dataset.from_list([{"prompt": scored.prompts[i], "index": i} for i in scored.order])


def _reward_function(scored: ScoredPrompts) -> Any:
    """Returns the reward with the signature that TRL expects: columns of the rows, and the sampled ids."""

    def reward(completion_ids: list[list[int]], index: list[int], **columns: Any) -> list[float]:
        return scored.score(index, completion_ids)

    return reward


def _check_encoding(scored: ScoredPrompts) -> None:
    """Raises an error for prompts that TRL's trainer would encode differently from the rest of the package.

    Raises:
        UserError: naming the first of them, or for texts beside lists of messages.
    """
    if len({isinstance(prompt, str) for prompt in scored.prompts}) > 1:
        raise UserError("TRL's trainer takes prompts of one kind: make all of them texts, or all lists of messages")
    for number, (prompt, ids) in enumerate(zip(scored.prompts, scored.ids, strict=True), start=1):
        if isinstance(prompt, str):
            found = scored.tokenizer(text=[prompt])["input_ids"][0]
        else:
            chat = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            found = scored.tokenizer.apply_chat_template(conversation=[prompt], **chat)["input_ids"][0]
        if list(found) != ids:
            raise UserError(
                f"prompt {number}: TRL's trainer encodes it differently ({len(found)} tokens, not {len(ids)}); "
                "remove special tokens from its text, or drop it"
            )


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restores everything but the weights that TRL changes in a model: attributes, config, dropout and mode."""
    config: Any = model.config
    attributes = [(part, dict(vars(part))) for part in (model, config, config.get_text_config())]
    dropout = [(module, module.p) for module in model.modules() if isinstance(module, nn.Dropout)]
    try:
        with evaluating(model):
            yield
    finally:
        for part, before in attributes:
            for added in vars(part).keys() - before.keys():
                delattr(part, added)
            vars(part).update(before)
        for module, p in dropout:
            module.p = p


@contextmanager
def _quiet() -> Iterator[None]:
    """Turns off transformers' progress bars and its warnings about option names that TRL uses."""
    bars = is_progress_bar_enabled()
    disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            yield
    finally:
        if bars:
            enable_progress_bar()


class _Callback(TrainerCallback):
    """Measures the policy and reports metrics."""

    def __init__(self, options: RLOOOptions, on_measure: OnMeasure, on_log: OnLog | None) -> None:
        self.options, self.on_measure, self.on_log_ = options, on_measure, on_log

    @override
    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if self.options.measured(state.global_step):
            with fork_rng():  # the samples of later iterations do not depend on what is measured
                self.on_measure(state.global_step, model)

    @override
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.on_log_ is not None and "reward" in logs:
            metrics = {name: float(logs[theirs]) for theirs, name in LOGGED.items()}
            if self.options.beta > 0:  # without a penalty TRL has no reference
                metrics["kl"] = float(logs["kl"]) * metrics["length"]  # TRL's is the mean over tokens
            self.on_log_(state.global_step, metrics)
