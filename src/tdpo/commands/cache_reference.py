"""``tdpo cache-reference``: computes the reference's hidden states of all response tokens and keeps them on disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from tdpo.commands.common import console, quieten, read_datasets, user_errors
from tdpo.commands.options import parse
from tdpo.config import EvalDataConfig, LayoutOptions, ModelConfig, PairOptions
from tdpo.config.checks import check_values, documented, option
from tdpo.config.training import CACHE_DTYPES
from tdpo.data.dataset import check_fits
from tdpo.data.options import check_format
from tdpo.errors import UserError
from tdpo.files import check_writable
from tdpo.models.load import load_model
from tdpo.models.policy import head_of, position_limit
from tdpo.models.reference import FrozenCopy
from tdpo.models.store import HiddenStore
from tdpo.score import packer
from tdpo.train.reference_cache import FillOptions, cache_key, fill


@documented
@dataclass
class CacheOptions(PairOptions, LayoutOptions):
    """Options of the cache; lengths, layout, precision and dtype must be those of the training that reads it.

    Attributes:
        reference_cache: Folder for the reference's hidden states; filled where it is empty, refused where it belongs to
            other weights, tokens or settings.
        reference_cache_dtype: Dtype of the cached hidden states; auto is that of the reference, which loses nothing.
        per_device_eval_batch_size: Pairs run at a time.
        bf16: Run as training with --bf16 does.
        fp16: Run as training with --fp16 does.
        use_cpu: Run on the CPU although there is an accelerator.
    """

    reference_cache: str = field(kw_only=True)
    reference_cache_dtype: str = option("auto", choices=CACHE_DTYPES)
    per_device_eval_batch_size: int = 8
    bf16: bool = False
    fp16: bool = False
    use_cpu: bool = False

    def __post_init__(self) -> None:
        check_values(self, per_device_eval_batch_size=1)
        check_format(self)
        if self.bf16 and self.fp16:
            raise UserError("--bf16 and --fp16 contradict each other")
        self.lengths()


def run(argv: Sequence[str]) -> None:
    """Runs the command; under torchrun or accelerate launch each process computes a part."""
    model_config, data, options = parse("cache-reference", (ModelConfig, EvalDataConfig, CacheOptions), argv)
    quieten()
    folder = Path(options.reference_cache).expanduser()
    check_writable(folder)
    tokenizer, *datasets = read_datasets(model_config, data, options)
    datasets = [dataset for dataset in datasets if dataset is not None]
    device = PartialState(cpu=options.use_cpu or not torch.cuda.is_available()).device
    model = load_model(model_config)
    for dataset in datasets:
        check_fits(dataset, head_of(model).vocab_size, position_limit(model), dataset.report.source, len(tokenizer))
    pack = packer(options.layout, [model])
    reference = FrozenCopy(model)
    reference.to(device)
    precision = "bf16" if options.bf16 else "fp16" if options.fp16 else "no"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    autocast: Any = nullcontext if dtype is None else partial(torch.autocast, device.type, dtype=dtype)
    fill_options = FillOptions(
        device, options.per_device_eval_batch_size, options.reference_cache_dtype, precision, autocast
    )
    pairs = [pair for dataset in datasets for pair in dataset]
    with user_errors():
        store = HiddenStore(folder, cache_key(reference, pack, fill_options))
        computed = fill(store, reference, pairs, pack, fill_options)
    console().print(
        f"reference cache {folder}: {len(store)} different pairs, {computed} of them computed now; "
        f"{store.bytes_per_token()} bytes a response token ({store.key.dtype}, {store.key.layout} layout)",
        soft_wrap=True,
    )
