"""Supervised fine-tuning on response tokens, for the model that preference training starts from."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from typing_extensions import override

from tdpo import ops
from tdpo.config import SFTConfig
from tdpo.data.dataset import Collator
from tdpo.data.options import check_format, make_tokeniser, prepare
from tdpo.data.pack import pack_trees
from tdpo.data.sft import SFTDataset, check_lengths, pack_examples
from tdpo.errors import UserError
from tdpo.models.adapters import check_tunes_weights, with_adapter
from tdpo.models.hidden import response_states
from tdpo.models.modes import prepare_training_mode
from tdpo.models.multimodal import tokenizer_of
from tdpo.models.neighbours import laid_out, neighbour_plan
from tdpo.models.own_loss import collect_router_logits
from tdpo.models.policy import head_of, position_limit, prove_head
from tdpo.models.redirect import run_in_forward, run_in_head
from tdpo.score import packer
from tdpo.train.base import BatchMeanTrainer, load_policy, place, prepare_policy
from tdpo.train.preflight import check_call
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

    label, items_key = "fine-tuning", "labels"
    args: SFTConfig

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
        args = SFTConfig(output_dir="sft-output") if args is None else args
        check_call(SFTConfig, args, processing_class, unknown, inspect.signature(SFTTrainer).parameters, model=model)
        check_format(args)
        policy, _ = load_policy(model, args)
        if peft_config is not None:
            policy = with_adapter(policy, peft_config)
        check_tunes_weights(policy)
        place(policy, args)
        if processing_class is None:
            raise UserError("SFTTrainer needs the tokenizer: pass processing_class")
        self.args, self._tokenizer = args, tokenizer_of(processing_class)
        prove_head(policy)
        prepare_training_mode(policy, args.disable_dropout)
        self._router = prepare_policy(policy, args, peft_config)
        self._vocab_size, self._positions = head_of(policy).vocab_size, position_limit(policy)
        # Beyond a switch of rotary frequencies trees run as padded rows, which lack the turns that are not learnt.
        trees = packer(args.layout, [policy]) is pack_trees and neighbour_plan(policy).switch is None
        super().__init__(
            model=policy,
            args=args,
            data_collator=Collator(partial(pack_examples, trees=trees, every_token=self._router is not None)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        if self._router is not None:
            self.run_parts["metrics"] = self.train_metrics
        if args.torch_compile:
            self.compile_models(policy)

    def loss_sum(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Computes the summed negative log-likelihood of the response tokens; only their logits are computed.

        The router loss of a mixture-of-experts model is part of every token's loss; it is also returned separately.
        """
        batch = PackedBatch.from_dict(self._prepare_inputs(inputs))

        def step(lm: nn.Module) -> tuple[Tensor, Tensor | None]:
            """Computes the summed loss and the router loss inside the forward of the wrapped model."""

            def loss(states: Tensor) -> tuple[Tensor, Tensor]:
                logp = ops.response_logp(Hidden(states, head_of(lm)), batch.labels)
                return -logp.sum(), logp.detach()

            if self._router is None:
                return run_in_head(lm, response_states(lm, batch), loss)[0], None
            with collect_router_logits(lm) as router_logits:
                total, _ = run_in_head(lm, response_states(lm, batch), loss)
            aux = self._router.of_batch(router_logits[-1], laid_out(lm, batch))
            return total + batch.labels.numel() * self._router.coefficient * aux, aux.detach()

        with self.accelerator.autocast():
            total, aux = run_in_forward(model, self.model, step)
        return total, aux, {} if aux is None else {"aux_loss": aux, "batches": torch.ones_like(aux)}

    @override
    @staticmethod
    def metric_means(sums: dict[str, float]) -> dict[str, float]:
        return {"aux_loss": sums["aux_loss"] / max(sums["batches"], 1.0)} if sums else {}

    @override
    def prepare_dataset(self, data: Iterable[Any], name: str) -> SFTDataset:
        dataset = prepare(self.args, data, make_tokeniser(self.args, self._tokenizer), name)
        check_lengths(dataset, self._positions, self._vocab_size, len(self._tokenizer))
        return dataset
