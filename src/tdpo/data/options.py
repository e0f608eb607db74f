"""Opens and prepares data as the options of :mod:`tdpo.config` ask for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, overload

from tdpo.config import EvalDataConfig, FormatOptions, PairOptions, SFTConfig
from tdpo.config.checks import check_values
from tdpo.config.row_spec import AUTO, RowSpec
from tdpo.data.dataset import PairDataset, prepare_pairs
from tdpo.data.formats import FORMATS, OnBadRow, find_format
from tdpo.data.sources import Source, open_source
from tdpo.data.tokenise import Tokeniser

if TYPE_CHECKING:
    from tdpo.data.sft import SFTDataset


def open_training(data: EvalDataConfig, spec: RowSpec, held_out: bool = False) -> Source:
    """Opens the rows to train on, each with the options it is read by.

    Args:
        data: The options that name the data.
        spec: How rows of ``dataset_name`` become records; those of ``datasets`` have their own.
        held_out: Opens the rows that ``test_fraction`` holds out instead.

    Raises:
        UserError: for options of a single dataset beside ``datasets``, and for data that is not there.
    """
    data.check_row_spec(spec)
    split, side = data.dataset_train_split, data.side(held_out)
    if data.dataset_name:
        return open_source(data.dataset_name, split, data.dataset_config, replace(spec, side=side))
    from tdpo.data.mixture import open_mixture

    return open_mixture(data.datasets, split, data.split_seed, side, data.dataset_config)


def open_held_out(data: EvalDataConfig, spec: RowSpec) -> Source | None:
    """Opens the rows of ``eval_dataset_name``, or those that ``test_fraction`` holds out; None without either."""
    if data.eval_dataset_name:
        return open_source(data.eval_dataset_name, data.dataset_test_split, data.dataset_config, spec)
    return None if data.test_fraction is None else open_training(data, spec, held_out=True)


def check_format(options: FormatOptions) -> None:
    """Refuses an unknown format, and options that contradict each other, before any data is read.

    Raises:
        UserError: naming the option.
    """
    formats = FORMATS
    if isinstance(options, SFTConfig):
        from tdpo.data.supervised import SFT_FORMATS as formats
    if options.dataset_format != AUTO:
        find_format(options.dataset_format, formats)
    options.row_spec()


def make_tokeniser(options: PairOptions | SFTConfig, tokenizer: Any) -> Tokeniser:
    """Returns the tokenizer under these options.

    Raises:
        UserError: if it has no end-of-sequence token, or the options do not go together.
    """
    processes = 1
    if isinstance(options, PairOptions):
        check_values(options, dataset_num_proc=1)
        processes = options.dataset_num_proc
    return Tokeniser(tokenizer, options.lengths(), processes=processes, rendering=options.rendering())


def pair_cache(options: PairOptions) -> Path | None:
    """Returns the folder of tokenised pairs, or None if they are not kept."""
    folder = options.cache_dir or os.environ.get("TDPO_CACHE") or "~/.cache/tdpo"
    return Path(folder).expanduser() / "pairs" if options.cache_dataset else None


@overload
def prepare(options: PairOptions, data: Any, tokeniser: Tokeniser | None, name: str = ...) -> PairDataset: ...
@overload
def prepare(options: SFTConfig, data: Any, tokeniser: Tokeniser | None, name: str = ...) -> SFTDataset: ...
def prepare(
    options: PairOptions | SFTConfig, data: Iterable[Any], tokeniser: Tokeniser | None, name: str = "dataset"
) -> PairDataset | SFTDataset:
    """Tokenises preference or supervised data under these options.

    See :func:`tdpo.data.dataset.prepare_pairs` and :func:`tdpo.data.sft.prepare_sft`.
    """
    spec, on_bad_row = options.row_spec(), cast("OnBadRow", options.on_bad_row)
    if isinstance(options, PairOptions):
        return prepare_pairs(data, tokeniser, spec, on_bad_row, name, pair_cache(options))
    from tdpo.data.sft import prepare_sft  # preference training does not need it

    return prepare_sft(data, tokeniser, spec, on_bad_row, name, options.train_on)  # type: ignore[arg-type]
