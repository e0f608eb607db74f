"""Preference training on ``transformers.Trainer``: loop, resume, saving, trackers are its; the loss is ours.

The loss of a batch: packed pairs -> hidden states of the reference -> hidden states of the policy, token statistics,
pair statistics and objective inside the policy's forward -> sum of the pairs' losses. What an optimizer step makes of
it is in :mod:`tdpo.train.step`.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from typing_extensions import override

from tdpo.config import ModelConfig, TDPOConfig
from tdpo.data.dataset import Collator, PairDataset, check_fits
from tdpo.data.options import check_format, make_tokeniser, prepare
from tdpo.data.pack import pack_padded, pack_trees
from tdpo.distributed.sharding import count_weights, frozen_weights_dtype
from tdpo.errors import UserError
from tdpo.models.adapters import has_adapter
from tdpo.models.load import load_model, load_tokenizer
from tdpo.models.modes import prepare_reference_mode
from tdpo.models.multimodal import tokenizer_of
from tdpo.models.policy import head_of, position_limit
from tdpo.models.probe import unwrapped
from tdpo.models.redirect import run_in_forward
from tdpo.models.reference import FrozenCopy, Reference
from tdpo.objectives import Objective, weighted
from tdpo.objectives.remembered import ObjectiveFile
from tdpo.score import LogitsBudget, PairScores, batch_loss, packer, tree_refusal
from tdpo.train.base import BatchMeanTrainer, load_policy, prepare_policy
from tdpo.train.metrics import displacement, metric_names, pair_columns, pair_means
from tdpo.train.preflight import check_call
from tdpo.train.references import prepare_models
from tdpo.types import PackedBatch

logger = logging.getLogger("tdpo")


class TDPOTrainer(BatchMeanTrainer):
    """Trains a policy on preference pairs; accepts the arguments of TRL's ``DPOTrainer``.

    Args:
        model: The policy: a causal language model, a peft model, or a name to load.
        ref_model: The reference; by default the policy as it is passed, in the form ``args.reference`` says.
        args: Options; see :class:`tdpo.TDPOConfig`.
        data_collator: Replaces :class:`tdpo.data.dataset.Collator`.
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

    label, rows_word = "aligning", "the pairs of rows"
    args: TDPOConfig
    objective: Objective
    reference: Reference
    _warned = False
    """Displacement has been reported."""

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
        args = TDPOConfig(output_dir="tdpo-output") if args is None else args
        known = inspect.signature(TDPOTrainer).parameters
        check_call(TDPOConfig, args, processing_class, unknown, known, model=model, ref_model=ref_model)
        check_format(args)
        policy, config = load_policy(model, args)
        given = load_model(config, ref_model) if isinstance(ref_model, str) else unwrapped(ref_model)
        if given is policy:
            raise UserError("model and ref_model are one object; leave ref_model out and a frozen copy is made")
        self.args, self.objective = args, args.build_objective()
        policy, self.reference, self.reference_line, cache = prepare_models(
            policy, given, peft_config, args, self.objective
        )
        prepare_reference_mode(policy, self.reference.models(), cache is not None, args.disable_dropout)
        self._router = prepare_policy(policy, args, peft_config)
        self._budget = LogitsBudget(args.logits_budget)
        processing_class = processing_class or _tokenizer_of(policy, config, train_dataset)
        self._tokenizer = tokenizer_of(processing_class)
        self._vocab_size = head_of(policy).vocab_size
        models = [policy, *self.reference.models()]
        self._positions = position_limit(*models)
        pack = self._choose_layout(models)
        # A router loss is over all tokens, those that predict nothing among them.
        every_token = partial(pack_trees, every_token=True) if self._router and pack is pack_trees else pack
        super().__init__(
            model=policy,
            args=args,
            data_collator=data_collator or Collator(weighted(every_token, args.token_weights)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.run_parts |= {"metrics": self.train_metrics, "logits_budget": self._budget}
        self.record.about |= {
            "objective": self.objective,
            "reward_scale": self.objective.reward_scale,
            "layout": self.layout,
        }
        self._objective_file = ObjectiveFile(self.objective, args.token_weights)
        self.checkpoint_files.append(self._objective_file)
        if cache is None:
            self._start_reference(own=ref_model is None)
        else:
            self._fill_cache(cache, pack)
        if args.torch_compile:
            self.compile_models(policy)  # a cache is filled without, so that it serves runs with and without
        self.record.about["reference"] = self.reference_line
        logger.info(self.reference_line)

    def _choose_layout(self, models: list[nn.Module]) -> Any:
        """Returns the function that packs pairs for the models, and logs the layout, with the reason if not trees."""
        pack = packer(self.args.layout, models)
        reason = tree_refusal(models) if self.args.layout == "auto" and pack is pack_padded else ""
        self.layout = f"layout: {'trees' if pack is pack_trees else 'padded rows'}" + (f" ({reason})" if reason else "")
        logger.info(self.layout)
        return pack

    def _start_reference(self, own: bool) -> None:
        """Moves the reference to its devices, sharded as the policy is, and syncs it with the policy if asked to.

        Args:
            own: Whether the trainer chose the reference itself.
        """
        args, policy, reference = self.args, self.model, self.reference
        if isinstance(reference, FrozenCopy) and args.torch_compile:
            self.compile_models(reference.model)
        reference.prepare(self.accelerator)
        if isinstance(reference, FrozenCopy) and reference.shared:
            copied, shared = (sum(weight.numel() for weight in part) for part in (reference.copied, reference.shared))
            self.reference_line += f"; {copied:,} weights are copied, {shared:,} are shared with the policy"
        elif isinstance(reference, FrozenCopy) and has_adapter(policy) and own and args.reference == "auto":
            size = f"{count_weights(reference.model)[1]:,}"
            logger.warning("the reference is a second model of %s weights beside the policy with its adapter", size)
        if args.sync_ref_model:
            from tdpo.train.reference_sync import ReferenceSyncCallback  # few runs need it

            sync = ReferenceSyncCallback(reference, policy, args)  # type: ignore[arg-type]
            self.add_callback(sync)
            self.checkpoint_files.append(sync)
            share, every = args.ref_model_mixup_alpha, args.ref_model_sync_steps
            self.reference_line += f"; every {every} steps it takes {share:g} of the policy"

    def _fill_cache(self, folder: Path, pack: Any) -> None:
        """Fills the cache of the reference for all pairs of training and evaluation, and reads from it instead."""
        from tdpo.train.reference_cache import FillOptions, cached_reference  # a run without a cache does not need it

        self.reference.to(self.args.device)
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
        device = next(policy.parameters()).device  # an engine that shards wants it back on this one
        if device != self.args.device:
            policy.to(self.args.device)
        dtype = frozen_weights_dtype(self.accelerator)
        if dtype is not None:
            self.reference = self.reference.cast_weights(dtype)
            run = replace(run, precision="no")  # the weights are cast, so autocast is not needed
        self.reference = cached_reference(self.reference, folder, pairs, pack, run)
        if device != self.args.device:
            policy.to(device)
        self.reference.prepare(self.accelerator)
        store = self.reference.store
        self.reference_line += (
            f"; {len(store)} different pairs in {store.folder}, {store.bytes_per_token()} bytes a token"
        )

    def loss_sum(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, PairScores, dict[str, Tensor]]:
        """Computes the sum of the pairs' losses, their scores and their metrics, inside the model's forward."""
        batch = PackedBatch.from_dict(self._prepare_inputs(inputs))
        score = partial(
            batch_loss, reference=self.reference, batch=batch, objective=self.objective, backend=self.args.backend,
            logits_budget=self._budget, router=self._router,
        )  # fmt: skip
        with self.accelerator.autocast():
            total, scores = run_in_forward(model, self.model, score)
        return total, scores, pair_columns(scores, self.objective)

    metric_means = staticmethod(pair_means)

    @override
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        warning = "" if self._warned else displacement(self.state.log_history, self.objective.reward_scale)
        if warning:
            self._warned = True
            logger.warning(warning)

    @override
    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            self._objective_file.save(output_dir or str(self.args.output_dir))

    @override
    def prepare_dataset(self, data: Iterable[Any], name: str) -> PairDataset:
        tokens = None if self._tokenizer is None else len(self._tokenizer)
        tokeniser = None if self._tokenizer is None else make_tokeniser(self.args, self._tokenizer)
        dataset = prepare(self.args, data, tokeniser, name)
        check_fits(dataset, self._vocab_size, self._positions, dataset.report.source, tokens)
        if dataset is not data:  # the caller has the report of a PairDataset
            for line in dataset.report.lines()[1:]:
                logger.warning("%s: %s", dataset.report.source, line)
        return dataset

    @override
    def metric_names(self) -> list[str]:
        return [*metric_names(self.objective)] + (["aux_loss"] if self._router else [])


def _tokenizer_of(policy: Any, config: ModelConfig, dataset: Any) -> Any:
    """Loads the tokenizer saved with the policy, as transformers would; None if the data needs none."""
    name = getattr(policy.config, "_name_or_path", "")
    if isinstance(dataset, PairDataset) or not name:
        return None
    revision = config.model_revision if name == config.model_name_or_path else "main"
    try:
        return load_tokenizer(replace(config, model_name_or_path=name, model_revision=revision))
    except UserError:
        return None
