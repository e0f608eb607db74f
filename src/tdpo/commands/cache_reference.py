"""``tdpo cache-reference``: the reference's hidden states of all response tokens, computed once and kept on disk."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from tdpo.cli import COMMANDS
from tdpo.commands.common import check_writable, console, quieten, read_dataset, told_in_words
from tdpo.commands.options import parse
from tdpo.config import (
    CACHE_DTYPE,
    CACHE_HELP,
    EvalDataConfig,
    LayoutOptions,
    ModelConfig,
    PairOptions,
    check_at_least,
    check_choices,
    check_format,
)
from tdpo.data.dataset import PairDataset, check_fits, prepare_pairs
from tdpo.data.formats import FORMATS
from tdpo.data.sources import Source
from tdpo.errors import UserError
from tdpo.models.load import load_model, load_tokenizer
from tdpo.models.policy import head_of, position_limit
from tdpo.models.reference import FrozenCopy
from tdpo.models.store import HiddenStore
from tdpo.score import packer
from tdpo.train.references import FillOptions, cache_key, fill


@dataclass
class CacheOptions(PairOptions, LayoutOptions):
    """What is cached and where; lengths, layout, precision and dtype are to be those of the training that reads it."""

    reference_cache: str = field(metadata={"help": CACHE_HELP}, kw_only=True)
    reference_cache_dtype: str = field(default="auto", metadata=CACHE_DTYPE)
    per_device_eval_batch_size: int = field(default=8, metadata={"help": "Pairs run at a time."})
    bf16: bool = field(default=False, metadata={"help": "Run as training with --bf16 does."})
    fp16: bool = field(default=False, metadata={"help": "Run as training with --fp16 does."})
    use_cpu: bool = field(default=False, metadata={"help": "Run on the CPU although there is an accelerator."})

    def __post_init__(self) -> None:
        check_choices(self)
        check_format(self, FORMATS)
        check_at_least(self, 1, "per_device_eval_batch_size")
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 contradict each other")
        self.lengths()


def run(argv: Sequence[str]) -> None:
    """Runs the command; under torchrun or accelerate launch every process computes its part."""
    model_config, data, options = parse(
        "cache-reference", COMMANDS["cache-reference"], (ModelConfig, EvalDataConfig, CacheOptions), argv
    )
    reading = options.reading()
    data.check_reading(reading)
    quieten()
    folder = Path(options.reference_cache).expanduser()
    check_writable(folder)
    tokenizer = load_tokenizer(model_config)
    tokeniser = options.tokeniser(tokenizer)

    def prepare(rows: Source) -> PairDataset:
        return prepare_pairs(rows, tokeniser, reading, options.on_bad_row)

    sources = (data.open_training(reading), data.open_held_out(reading))
    datasets = [read_dataset(source, prepare) for source in sources if source is not None]
    device = PartialState(cpu=options.use_cpu or not torch.cuda.is_available()).device
    model = load_model(model_config)
    for dataset in datasets:
        check_fits(dataset, head_of(model).vocab_size, position_limit(model), dataset.report.source, len(tokenizer))
    pack = packer(options.layout, [model])
    reference = FrozenCopy(model)
    reference.to(device)
    precision, autocast = _precision(options, device)
    how = FillOptions(device, options.per_device_eval_batch_size, options.reference_cache_dtype, precision, autocast)
    pairs = [pair for dataset in datasets for pair in dataset]
    with told_in_words():
        store = HiddenStore(folder, cache_key(reference, pack, how))
        computed = fill(store, reference, pairs, pack, how)
    console().print(
        f"reference cache {folder}: {len(store)} different pairs, {computed} of them computed now; "
        f"{store.bytes_per_token()} bytes a response token ({store.key.dtype}, {store.key.layout} layout)",
        soft_wrap=True,
    )


def _precision(options: CacheOptions, device: torch.device) -> tuple[str, Callable[[], AbstractContextManager[Any]]]:
    """The mixed precision's name, as accelerate names it, and the context it stands for."""
    if not (options.bf16 or options.fp16):
        return "no", nullcontext
    dtype = torch.bfloat16 if options.bf16 else torch.float16
    return "bf16" if options.bf16 else "fp16", functools.partial(torch.autocast, device.type, dtype=dtype)
