"""Supervised fine-tuning on response tokens: what makes the model that preference training starts from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, set_seed

from tdpo import ops
from tdpo.config import SFTConfig
from tdpo.data.pack import pack_trees
from tdpo.data.sft import SFTCollator, SFTDataset, check_lengths, prepare_sft
from tdpo.data.tokenise import Tokeniser
from tdpo.errors import UserError
from tdpo.models.adapters import check_tunes_weights, tell_of_dropout, with_adapter
from tdpo.models.compiling import uncompiled
from tdpo.models.hidden import response_states
from tdpo.models.inside import open_forward, run_in_head, run_inside
from tdpo.models.load import load_model
from tdpo.models.modes import prepare_training_mode
from tdpo.models.multimodal import freeze_idle_parts, tokenizer_of
from tdpo.models.neighbours import laid_out
from tdpo.models.own_loss import collect_router_logits
from tdpo.models.policy import head_of, position_limit, prove_head
from tdpo.score import packer
from tdpo.train.base import BatchMeanTrainer, find_own_loss
from tdpo.train.inputs import check_keywords, check_types, prepare_held_out, prepare_training
from tdpo.types import Hidden, PackedBatch


class SFTTrainer(BatchMeanTrainer):
    """Trains a causal language model on responses; the loss is the mean negative log-likelihood of their tokens.

    Args:
        model: A causal language model, or a name to load.
        args: Options; see :class:`tdpo.SFTConfig`.
        train_dataset: Conversations in ``messages`` or ``conversations``, questions with answers (``instruction`` and
            ``output``, ``prompt`` and ``completion``), ``text``, or preference rows, whose chosen responses are learnt.
        eval_dataset: The same, held out, or several of them by name.
        processing_class: The tokenizer, or a processor that has one.
        callbacks: Further transformers callbacks.
        optimizers: Optimizer and scheduler to use instead of those of ``args``.
        peft_config: Wraps the model in an adapter, which alone is trained.
        optimizer_cls_and_kwargs: Class and arguments of an optimizer to use instead of ``args.optim``.

    Raises:
        UserError: for data, tokenizer and options that do not fit together.
    """

    label = "fine-tuning"

    def __init__(
        self,
        model: str | nn.Module,
        args: SFTConfig | None = None,
        train_dataset: Iterable[Any] | None = None,
        eval_dataset: Iterable[Any] | Mapping[str, Iterable[Any]] | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: Any = None,
        optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] | None = None,
        **unknown: Any,
    ) -> None:
        check_keywords(unknown, SFTConfig, inspect.signature(SFTTrainer).parameters)
        args = SFTConfig(output_dir="sft-output") if args is None else args
        check_types(SFTConfig, args, processing_class, model=model)
        set_seed(args.seed)  # a new adapter's weights are drawn before the Trainer does it
        config = args.model_config(model)
        loaded = load_model(config, trainable=True) if isinstance(model, str) else uncompiled(model)
        if peft_config is not None:
            loaded = with_adapter(loaded, peft_config)
        check_tunes_weights(loaded)
        if processing_class is None:
            raise UserError("SFTTrainer needs the tokenizer: pass processing_class")
        tokenizer = tokenizer_of(processing_class)
        prove_head(loaded)
        if args.disable_dropout:
            tell_of_dropout(peft_config)
        prepare_training_mode(loaded, args.disable_dropout)
        freeze_idle_parts(loaded)
        self._router = find_own_loss(loaded, args)
        self._aux = torch.zeros(2)
        open_forward(loaded)

        def prepared(data: Iterable[Any], name: str) -> SFTDataset:
            dataset = prepare_sft(
                data,
                Tokeniser(tokenizer, args.lengths(), rendering=args.rendering()),
                args.reading(),
                args.on_bad_row,  # type: ignore[arg-type]
                name,
                args.train_on,  # type: ignore[arg-type]
            )
            check_lengths(dataset, position_limit(loaded), head_of(loaded).vocab_size, len(tokenizer))
            return dataset

        self.prepare_rows = lambda data: prepare_held_out(data, prepared)  # type: ignore[method-assign]
        super().__init__(
            model=loaded,
            args=args,
            data_collator=SFTCollator(packer(args.layout, [loaded]) is pack_trees, self._router is not None),
            train_dataset=None
            if train_dataset is None
            else prepare_training(train_dataset, args, lambda rows: prepared(rows, "train")),
            eval_dataset=prepare_held_out(eval_dataset, prepared),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.compile_if_asked(loaded)

    def loss_sum(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Any]:
        """Summed negative log-likelihood of the batch's response tokens; only they meet the vocabulary.

        The router loss of a mixture-of-experts model is part of every token's loss; it is returned beside the sum, for
        :meth:`count`.
        """
        batch = PackedBatch.from_dict(self._prepare_inputs(inputs))

        def step(lm: nn.Module) -> tuple[Tensor, Tensor | None]:
            def loss(states: Tensor) -> tuple[Tensor, Tensor]:
                logp = ops.response_logp(Hidden(states, head_of(lm)), batch.labels)
                return -logp.sum(), logp.detach()

            if self._router is None:
                return run_in_head(lm, response_states(lm, batch), loss)[0], None
            with collect_router_logits(lm) as router_logits:
                total, _ = run_in_head(lm, response_states(lm, batch), loss)
            aux = self._router.of_batch(router_logits[-1], laid_out(lm, batch))
            return total + batch.labels.numel() * self._router.coefficient * aux, aux.detach()

        return run_inside(model, step)

    def count(self, outputs: Tensor | None, weight: float) -> None:
        """Adds a batch's router loss to the mean since the last log."""
        model: Any = self.model
        if outputs is not None and weight and model.training:
            self._aux = self._aux.to(outputs.device) + torch.stack([outputs, torch.ones_like(outputs)])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the base's, with the mean router loss of the batches since the last log."""
        if "loss" in logs and self._router is not None:
            total, batches = self.accelerator.gather(self._aux.to(self.args.device)[None]).sum(0).tolist()
            logs["aux_loss"] = total / max(batches, 1.0)
            self._aux = torch.zeros_like(self._aux)
        super().log(logs, start_time)

    def reset_run_state(self) -> None:
        """Clears the sum of the router losses too."""
        super().reset_run_state()
        self._aux = torch.zeros_like(self._aux)

    def item_count(self, inputs: dict[str, Any]) -> int:
        """Response tokens of a batch."""
        return inputs["labels"].numel()

    def rows_of(self, inputs: dict[str, Any]) -> str:
        """The rows of a batch's examples."""
        return f"rows {', '.join(str(row) for row in inputs['pair_rows'].tolist())}"
