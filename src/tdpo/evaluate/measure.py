"""Measures samples of policies: reward, divergence from the reference, entropy, diversity, length.

Every command that measures samples, and the demo, uses this module, so that their results are comparable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import compress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tdpo.config.checks import check_values, documented
from tdpo.errors import UserError
from tdpo.evaluate.divergence import ResponseStats, response_stats
from tdpo.evaluate.diversity import Diversity, measure_diversity
from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.generate import Sampling, decode_response, end_tokens, sample_ids
from tdpo.evaluate.prompts import Prompt

if TYPE_CHECKING:
    from tdpo.evaluate.rewards import Reward

DIVERSITY_SHARE = 4
"""Diversity is measured on one in this many responses of a set: a number that models with shorter responses, or with
fewer good ones, reach as well."""


@documented
@dataclass
class MeasureOptions(Sampling):
    """Options for drawing and measuring samples.

    Attributes:
        entropy_samples: Responses per prompt for predictive entropy and diversity within a prompt, drawn with
            --entropy_top_p at temperature 1, as in the evaluation of f-DPO; 0 skips both.
        entropy_top_p: Nucleus sampling probability of these responses.
        matched_length: Diversity is measured on the first N tokens of a response; shorter responses are skipped.
            Default: a quarter of --max_new_tokens.
        reward_threshold: Diversity is also measured on samples with at least this reward. Default: the median
            reward of the reference's samples.
    """

    entropy_samples: int = 25
    entropy_top_p: float = 0.95
    matched_length: int | None = None
    reward_threshold: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_values(self, entropy_samples=0, matched_length=1)
        if not 0 < self.entropy_top_p <= 1:
            raise UserError(f"--entropy_top_p must be in (0, 1], got {self.entropy_top_p}")

    def nucleus(self) -> Sampling:
        """Returns the sampling options of the predictive entropy."""
        names = [field.name for field in fields(Sampling)]
        sampling = Sampling(**{name: getattr(self, name) for name in names})
        return replace(sampling, num_samples=self.entropy_samples, top_p=self.entropy_top_p, temperature=1.0, top_k=0)


@dataclass(frozen=True)
class Samples:
    """Responses of one model to P prompts, S each.

    Attributes:
        ids: Token ids, ``ids[p][s]``, including the end token if there is one.
        texts: The decoded responses, without special tokens.
        rewards: ``[P, S]`` float64, or None without a reward.
    """

    ids: list[list[list[int]]]
    texts: list[list[str]]
    rewards: Tensor | None


@dataclass(frozen=True)
class Measurement:
    """Metrics of the samples of one model. Intervals are over prompts; KLs and entropies are in nats.

    Attributes:
        reward: Reward of a sample; None without a reward.
        kl_policy_reference: KL(policy || reference) of whole responses: the sum over the tokens of a sample of the KL
            of the next-token distributions, along the policy's samples.
        kl_reference_policy: KL(reference || policy) of whole responses: the same along the reference's samples.
        entropy: Entropy of the policy's next-token distribution, averaged over the tokens of a sample.
        length: Tokens of a sample, its end token included.
        finished: Share of samples with an end token.
        diversity: Diversity of all samples; None if too few are long enough.
        good_share: Share of samples with at least the threshold's reward; None without a reward.
        good_diversity: Diversity of these; None without a reward, or if they are too few.
        predictive_entropy: ``entropy`` over nucleus samples; None without them.
        prompt_diversity: Diversity of the nucleus samples of one prompt, averaged over prompts; None without them.
    """

    reward: Estimate | None
    kl_policy_reference: Estimate
    kl_reference_policy: Estimate
    entropy: Estimate
    length: Estimate
    finished: float
    diversity: Diversity | None
    good_share: float | None
    good_diversity: Diversity | None
    predictive_entropy: Estimate | None
    prompt_diversity: Diversity | None

    def columns(self) -> dict[str, float]:
        """Returns all metrics under flat names: ``entropy``, ``entropy_se``, ``good_distinct_1``, ...

        An estimate becomes its mean, ``_se``, ``_low`` and ``_high``; metrics that were not measured are left out.
        """
        columns: dict[str, float] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Estimate):
                columns |= value.columns(field.name)
            elif isinstance(value, Diversity):
                before = field.name.removesuffix("diversity")
                for name in ("distinct_1", "distinct_2", "self_bleu", "compression_ratio"):
                    columns |= getattr(value, name).columns(before + name)
            elif value is not None:
                columns[field.name] = value
        return columns


class Evaluator:
    """Measures policies against one reference on the same prompts, with the same seed.

    The reference is sampled once, regardless of the number of policies.

    Args:
        reference: The reference, a causal language model.
        tokenizer: The tokenizer of all models.
        prompts: At least one prompt.
        reward: Scores samples; None to skip the reward.
        options: Options for drawing and measuring samples.
    """

    def __init__(
        self,
        reference: nn.Module,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        reward: Reward | None = None,
        options: MeasureOptions | None = None,
    ) -> None:
        self.reference, self.tokenizer, self.prompts, self.reward = reference, tokenizer, prompts, reward
        self.options = options or MeasureOptions()
        self._prompt_ids = [prompt.ids for prompt in prompts]

    @cached_property
    def reference_samples(self) -> Samples:
        """The samples of the reference."""
        return self.sample(self.reference)

    @cached_property
    def threshold(self) -> float:
        """Smallest reward of a good sample; NaN without a reward."""
        if self.options.reward_threshold is not None:
            return self.options.reward_threshold
        rewards = self.reference_samples.rewards
        return math.nan if rewards is None else rewards.median().item()

    def sample(self, model: nn.Module) -> Samples:
        """Draws and scores responses of a causal language model."""
        drawn = sample_ids(model, self._prompt_ids, self.options, end_tokens(model, self.tokenizer))
        texts = [
            [decode_response(self.tokenizer, prompt.ids, ids) for ids in found]
            for prompt, found in zip(self.prompts, drawn, strict=True)
        ]
        return Samples(drawn, texts, self._rewards(texts))

    def _rewards(self, texts: list[list[str]]) -> Tensor | None:
        if self.reward is None:
            return None
        rows = [
            {"prompt": prompt.content, "response": text}
            for prompt, found in zip(self.prompts, texts, strict=True)
            for text in found
        ]
        return torch.tensor(self.reward(rows), dtype=torch.float64).reshape(len(texts), -1)

    def measure(self, policy: nn.Module, samples: Samples | None = None) -> Measurement:
        """Measures a policy.

        Args:
            policy: A causal language model; the reference itself has KLs of 0.
            samples: Its samples; None to draw them.
        """
        samples = self.sample(policy) if samples is None else samples
        stats = self._stats(policy, samples.ids)
        reverse = self._stats(policy, self.reference_samples.ids)
        shape, ends = (len(samples.ids), -1), end_tokens(policy, self.tokenizer)
        flat = [ids for found in samples.ids for ids in found]
        rewards, good = samples.rewards, None
        if rewards is not None:
            good = (rewards >= self.threshold).flatten()
        nucleus = self._nucleus(policy) if self.options.entropy_samples else (None, None)
        return Measurement(
            reward=None if rewards is None else Estimate.of(rewards),
            kl_policy_reference=Estimate.of(stats.kl_policy_reference.reshape(shape)),
            kl_reference_policy=Estimate.of(reverse.kl_reference_policy.reshape(shape)),
            entropy=Estimate.of((stats.entropy / stats.length).reshape(shape)),
            length=Estimate.of(stats.length.reshape(shape)),
            finished=sum(ids[-1] in ends for ids in flat) / len(flat),
            diversity=self._diversity([flat], len(flat)),
            good_share=None if good is None else good.double().mean().item(),
            good_diversity=None if good is None else self._diversity([list(compress(flat, good.tolist()))], len(flat)),
            predictive_entropy=nucleus[0],
            prompt_diversity=nucleus[1],
        )

    def _stats(self, policy: nn.Module, responses: Sequence[Sequence[list[int]]]) -> ResponseStats:
        """Computes the statistics of ``responses[p][s]``, flattened."""
        prompts = [prompt for prompt, found in zip(self._prompt_ids, responses, strict=True) for _ in found]
        flat = [ids for found in responses for ids in found]
        return response_stats(policy, self.reference, prompts, flat, min(self.options.batch_size, 32))

    def _nucleus(self, policy: nn.Module) -> tuple[Estimate, Diversity | None]:
        """Computes predictive entropy and diversity within a prompt on nucleus samples."""
        sampling = self.options.nucleus()
        drawn = sample_ids(policy, self._prompt_ids, sampling, end_tokens(policy, self.tokenizer))
        stats = self._stats(policy, drawn)
        by_prompt = (stats.entropy / stats.length).reshape(len(drawn), -1)
        return Estimate.of(by_prompt), self._diversity(drawn, sampling.num_samples)

    def _diversity(self, sets: Sequence[Sequence[list[int]]], size: int) -> Diversity | None:
        """Measures diversity on a share of each set, which had ``size`` responses before any were left out."""
        length = self.options.matched_length or max(1, self.options.max_new_tokens // 4)
        return measure_diversity(sets, self.tokenizer, length, size // DIVERSITY_SHARE)
