"""Preference training on ``transformers.Trainer``: loop, resume, saving, trackers are its; the loss is ours.

The step, top to bottom: a batch of packed pairs -> hidden states of the reference -> hidden states of the policy,
token statistics, pair statistics and objective inside the policy's forward -> sum of losses over the number of pairs
in the whole optimizer step. Left out on purpose: everything ``Trainer`` already does.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from tdpo.config import ModelConfig, TDPOConfig
from tdpo.data.dataset import Collator, PairDataset, check_fits, prepare_pairs
from tdpo.data.pack import pack_padded, pack_trees
from tdpo.errors import UserError
from tdpo.models.adapters import tell_of_dropout
from tdpo.models.compiling import uncompiled
from tdpo.models.inside import open_forward, run_inside
from tdpo.models.load import load_model, load_tokenizer
from tdpo.models.modes import prepare_reference_mode
from tdpo.models.multimodal import freeze_idle_parts, tokenizer_of
from tdpo.models.policy import head_of, position_limit, unwrapped
from tdpo.models.reference import FrozenCopy, Reference
from tdpo.models.sharding import narrow_dtype
from tdpo.objectives import Objective
from tdpo.ops.budget import LogitsBudget
from tdpo.score import PairScores, batch_loss_with_router, packer, tree_refusal
from tdpo.train.base import BatchMeanTrainer, find_own_loss, logger
from tdpo.train.inputs import check_keywords, check_types, prepare_held_out, prepare_training
from tdpo.train.metrics import DisplacementWatch, MetricSums, metric_names
from tdpo.train.references import (
    FillOptions,
    Following,
    Models,
    cached,
    describe_copy,
    prepare_models,
    told,
    warn_of_second_model,
)
from tdpo.types import PackedBatch


class TDPOTrainer(BatchMeanTrainer):
    """Trains a policy on preference pairs; takes what TRL's ``DPOTrainer`` takes.

    Args:
        model: The policy: a causal language model, a peft model, or a name to load.
        ref_model: The reference; by default the policy as it is handed over, in the form ``args.reference`` says.
        args: Options; see :class:`tdpo.TDPOConfig`.
        data_collator: Takes the place of :class:`tdpo.data.dataset.Collator`.
        train_dataset: Rows in any known format, records or tokenised pairs; see
            :func:`tdpo.data.dataset.prepare_pairs`.
        eval_dataset: The same, held out, or several of them by name.
        processing_class: The tokenizer, or a multimodal model's processor, whose tokenizer is used and which is saved
            with the model; by default the tokenizer saved with the model. Not needed for tokenised pairs.
        callbacks: Further transformers callbacks.
        optimizers: Optimizer and scheduler to use instead of those of ``args``.
        peft_config: Wraps the model in an adapter; the reference is the model without it.
        optimizer_cls_and_kwargs: Class and arguments of an optimizer to use instead of ``args.optim``.

    Raises:
        UserError: for anything in models, tokenizer, data and options that does not fit together.

    Metrics, in training and (prefixed ``eval_``) in evaluation: see :mod:`tdpo.train.metrics`.
    """

    label = "aligning"
    args: TDPOConfig
    objective: Objective
    reference: Reference

    def __init__(
        self,
        model: str | nn.Module,
        ref_model: str | nn.Module | None = None,
        args: TDPOConfig | None = None,
        data_collator: Any = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        check_keywords(unknown, TDPOConfig, inspect.signature(TDPOTrainer).parameters)
        args = TDPOConfig(output_dir="tdpo-output") if args is None else args
        check_types(TDPOConfig, args, processing_class, model=model, ref_model=ref_model)
        set_seed(args.seed)  # a new adapter's weights are drawn before the Trainer does it
        config = args.model_config(model)
        policy = load_model(config, trainable=True) if isinstance(model, str) else uncompiled(model)
        held_against = load_model(config, ref_model) if isinstance(ref_model, str) else unwrapped(ref_model)
        if held_against is policy:
            raise UserError("model and ref_model are one object; leave ref_model out and a frozen copy is made")
        self.objective = args.build_objective()
        models = prepare_models(policy, held_against, peft_config, args)
        policy, self.reference, self.reference_line = models.policy, models.reference, models.line
        prepare_reference_mode(policy, self.reference.models(), models.cache is not None, args.disable_dropout)
        if args.disable_dropout:
            tell_of_dropout(peft_config)
        freeze_idle_parts(policy)
        self._router = find_own_loss(policy, args)
        open_forward(policy)

        self._sums = MetricSums(args.beta)
        self._budget = LogitsBudget(args.logits_budget)
        self._watch = DisplacementWatch(args.beta)
        processing_class = processing_class or _tokenizer_of(policy, config, train_dataset)
        tokenizer = tokenizer_of(processing_class)
        limit = position_limit(policy, *self.reference.models())
        pack, self.layout = _layout(args.layout, [policy, *self.reference.models()])
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or Collator(_with_every_token(pack) if self._router else pack),
            train_dataset=None
            if train_dataset is None
            else prepare_training(
                train_dataset, args, lambda rows: _prepare(rows, tokenizer, policy, limit, args, "train")
            ),
            eval_dataset=prepare_held_out(
                eval_dataset, lambda rows, name: _prepare(rows, tokenizer, policy, limit, args, name)
            ),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if models.cache is None:
            if isinstance(self.reference, FrozenCopy):
                self.compile_if_asked(self.reference.model)
            self.reference.place(self.accelerator)
            self.reference_line += describe_copy(self.reference)
            if held_against is None:
                warn_of_second_model(self.reference, policy, args)
        else:
            self.reference.to(self.args.device)
            self._read_from(models.cache, models, pack)
        self._following = Following(self.reference, policy, args) if args.sync_ref_model else None
        if self._following is not None:
            self.add_callback(self._following)
            share, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
            self.reference_line += f"; every {every} steps it takes {share:g} of the policy"
        self.compile_if_asked(policy)  # a cache is filled without, so that it serves runs with and without
        logger.info(self.reference_line)

    def loss_sum(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, PairScores]:
        """Sum of the pairs' losses, and their scores; policy, head and loss run inside the model's forward."""
        batch = PackedBatch.from_dict(self._prepare_inputs(inputs))

        def step(policy: nn.Module) -> tuple[Tensor, PairScores]:
            options = self.objective, self.args.backend, self._budget
            return batch_loss_with_router(self._router, policy, self.reference, batch, *options)

        return run_inside(model, step)

    def count(self, outputs: PairScores, weight: float) -> None:
        """Adds a batch's scores to the metrics."""
        self._sums.add(outputs, weight)

    def run_state(self) -> dict[str, Any]:
        """As the base's, with the sums of the pairs since the last log and what displacement is watched by."""
        return super().run_state() | {"metrics": self._sums.state(), "displacement": self._watch.state()}

    def load_run_state(self, state: dict[str, Any]) -> None:
        """Takes back what :meth:`run_state` gave."""
        super().load_run_state(state)
        self._sums.load(state["metrics"], self.args.device)
        self._watch.load(state["displacement"])

    def _complete(self, written: Path, final: Path) -> None:
        """As the base's, with the reference where it moves."""
        super()._complete(written, final)
        if self._following is not None and self.args.should_save and not self.args.save_only_model:
            self._following.save(written)

    def _restore(self, folder: Path) -> None:
        """As the base's, with the reference where it moves."""
        super()._restore(folder)
        if self._following is not None:
            self._following.load(folder)

    def item_count(self, inputs: dict[str, Any]) -> int:
        """Pairs of a batch."""
        return inputs["pair_rows"].numel()

    def rows_of(self, inputs: dict[str, Any]) -> str:
        """The rows of a batch's pairs."""
        return f"the pairs of rows {', '.join(str(row) for row in inputs['pair_rows'].tolist())}"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the metrics of the pairs since the last log to a training log."""
        if "loss" in logs:
            metrics = self._take_metrics()
            metrics.pop("loss", None)  # the Trainer's own, the mean over optimizer steps, is there already
            logs |= metrics
            warning = self._watch.warning(metrics) if metrics else None
            if warning is not None:
                logger.warning(warning)
        super().log(logs, start_time)

    def prepare_rows(self, data: Any) -> Any:
        """Tokenises rows in any form ``train_dataset`` may be in; several by name stay several."""
        policy: Any = self.model
        limit, tokenizer = position_limit(policy, *self.reference.models()), tokenizer_of(self.processing_class)
        return prepare_held_out(data, lambda rows, name: _prepare(rows, tokenizer, policy, limit, self.args, name))

    def metric_names(self) -> list[str]:
        """Lists the metrics that an evaluation reports, without prefix."""
        return metric_names() + (["aux_loss"] if self._router else [])

    def reset_run_state(self) -> None:
        """Clears the sums of the pairs too, and what displacement is recognised by."""
        super().reset_run_state()
        self._sums, self._watch = MetricSums(self.args.beta), DisplacementWatch(self.args.beta)

    def begin_evaluation(self) -> None:
        """Sets the sums of training aside."""
        super().begin_evaluation()
        self._training_sums, self._sums = self._sums, MetricSums(self.args.beta)

    def end_evaluation(self) -> dict[str, float]:
        """Every metric of the pairs as its exact mean over the dataset, the loss among them."""
        metrics = super().end_evaluation() | self._take_metrics()
        self._sums = self._training_sums
        return metrics

    def _take_metrics(self) -> dict[str, float]:
        """The metrics' means over all processes, and a fresh start."""
        sums, self._sums = self._sums, MetricSums(self.args.beta)
        if sums.sums is not None:
            sums.merge(self.accelerator.gather(sums.sums[None]))
        return sums.means()

    def _read_from(self, folder: Path, models: Models, pack: Any) -> None:
        """Puts a cache in the reference's place, filled for all pairs of training and evaluation."""
        held_out = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        pairs = [pair for data in (self.train_dataset, *held_out.values()) for pair in data or ()]
        run = FillOptions(
            self.args.device,
            self.args.per_device_eval_batch_size,
            self.args.reference_cache_dtype,
            self.accelerator.mixed_precision,
            self.accelerator.autocast,
        )
        policy: Any = self.model
        place = next(policy.parameters()).device  # a launcher that shards wants it where it is
        moves = place != self.args.device
        if moves:
            policy.to(self.args.device)
        dtype = narrow_dtype(self.accelerator)
        if dtype is not None:
            models = replace(models, reference=models.reference.narrowed(dtype))
            run = replace(run, precision="no")  # the weights are narrow, and nothing is cast on the way
        self.reference = cached(models, folder, pairs, pack, run)
        if moves:
            policy.to(place)
        self.reference.place(self.accelerator)
        self.reference_line = told(models, self.reference.store)


def _layout(layout: str, models: list[nn.Module]) -> tuple[Any, str]:
    """The function that lays pairs out, and one line that says which it is and why; the line is logged."""
    pack = packer(layout, models)
    reason = tree_refusal(models) if layout == "auto" and pack is pack_padded else ""
    line = f"layout: {'trees' if pack is pack_trees else 'padded rows'}" + (f" ({reason})" if reason else "")
    logger.info(line)
    return pack, line


def _with_every_token(pack: Any) -> Any:
    """The same layout for a loss over all tokens, those that predict nothing among them."""
    return partial(pack_trees, every_token=True) if pack is pack_trees else pack


def _tokenizer_of(policy: Any, config: ModelConfig, dataset: Any) -> Any:
    """The tokenizer saved beside the policy, as transformers would load it; None if the data needs none."""
    name = getattr(policy.config, "_name_or_path", "")
    if isinstance(dataset, PairDataset) or not name:
        return None
    revision = config.model_revision if name == config.model_name_or_path else "main"
    try:
        return load_tokenizer(replace(config, model_name_or_path=name, model_revision=revision))
    except UserError:
        return None


def _prepare(
    data: Iterable[Any], tokenizer: Any, policy: nn.Module, limit: int | None, args: TDPOConfig, name: str
) -> PairDataset:
    tokeniser = args.tokeniser(tokenizer) if tokenizer is not None else None
    dataset = prepare_pairs(
        data,
        tokeniser,
        args.reading(),
        args.on_bad_row,  # type: ignore[arg-type]
        name,
        args.pair_cache(),
    )
    tokens = len(tokenizer) if tokenizer is not None else None
    check_fits(dataset, head_of(policy).vocab_size, limit, dataset.report.source, tokens)
    if dataset is not data:  # whoever hands over a PairDataset has its report
        for line in dataset.report.lines()[1:]:
            logger.warning("%s: %s", dataset.report.source, line)
    return dataset
