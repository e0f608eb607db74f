"""``tdpo check-data``: checks a dataset as training would read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from tdpo.commands.common import console, is_main_process, quieten, write_json, write_text
from tdpo.commands.options import parse
from tdpo.config import EvalDataConfig, ModelConfig, PairOptions
from tdpo.config.checks import check_values, documented
from tdpo.data.check import DataCheck, check, whole
from tdpo.data.options import check_format, make_tokeniser, open_held_out, open_training, pair_cache
from tdpo.data.sources import Source
from tdpo.errors import UserError
from tdpo.files import check_outputs, json_lines
from tdpo.models.load import load_tokenizer, model_limits
from tdpo.report.data import counts_table, example, histogram, legend, lengths_table
from tdpo.types import PreferenceRecord


@documented
@dataclass
class CheckOptions(PairOptions):
    """Options of reading, truncating and reporting rows.

    Attributes:
        num_examples: Pairs to show with their parts marked, and with their ids in --json.
        json: File to write the findings to, as one object.
        fix: JSONL file to write the clean pairs to, as prompt, chosen and rejected: without bad, dropped and repeated
            rows and without those whose prompt is in the evaluation data.
    """

    num_examples: int = 2
    json: str | None = None
    fix: str | None = None

    def __post_init__(self) -> None:
        check_values(self, num_examples=0)
        self.rendering()
        check_format(self)
        if self.fix and not self.fix.endswith(".jsonl"):
            raise UserError(f"--fix {self.fix}: JSONL is written, so its name has to end in .jsonl")
        check_outputs(self.json, self.fix)


def run(argv: Sequence[str]) -> None:
    """Runs the command.

    Raises:
        UserError: if training would stop at the data, after everything about it is reported; not with ``--fix``.
    """
    model_config, data, options = parse("check-data", (ModelConfig, EvalDataConfig, CheckOptions), argv)
    spec = options.row_spec()
    source, held_out_rows = open_training(data, spec), open_held_out(data, spec)
    _check_outputs(options, source, held_out_rows)
    quieten()
    tokeniser = make_tokeniser(options, load_tokenizer(model_config))
    limits = model_limits(model_config)

    def checked(rows: Source, records: Sequence[PreferenceRecord] = ()) -> DataCheck:
        return check(rows, tokeniser, spec, options.on_bad_row, pair_cache(options), limits, records)

    held_out = checked(held_out_rows) if held_out_rows else None
    train = checked(source, held_out.records if held_out else ())
    out = console()
    for name, found in (("train", train), ("eval", held_out)):
        if found:
            _show(out, found, name, options)
    if options.num_examples and train.records:
        out.print(legend())
    for record, pair in zip(train.records[: options.num_examples], train.pairs[: options.num_examples], strict=True):
        title = f"row {record.row} of {record.source}"
        out.print(example(pair, whole(record, tokeniser), tokeniser.tokenizer, title))
    if options.json and is_main_process():
        content = train.as_json() | {"examples": train.examples(tokeniser, options.num_examples)}
        write_json(options.json, content | ({"eval": held_out.as_json()} if held_out else {}))
        out.print(f"written to {options.json}", soft_wrap=True)
    if options.fix and is_main_process():
        rows = train.clean_rows()
        write_text(options.fix, json_lines(rows))
        out.print(f"{len(rows):,} clean pairs written to {options.fix}", soft_wrap=True)
    errors = [found.errors for found in ((held_out,) if options.fix else (train, held_out)) if found and found.errors]
    if errors:
        raise UserError("training would stop at this data:\n" + "\n".join(errors))


def _check_outputs(options: CheckOptions, *sources: Source | None) -> None:
    """Refuses to write over what is read."""
    read = {path.resolve() for source in sources if source for part in source.parts for path in part.files}
    for name in ("json", "fix"):
        path = getattr(options, name)
        if path and Path(path).resolve() in read:
            raise UserError(f"--{name} {path} is a file of the dataset; it would be overwritten")


def _show(out: Console, found: DataCheck, name: str, options: CheckOptions) -> None:
    out.print(counts_table(found, f"{name}: {found.report.source}"), "")
    if len(found.lengths):
        out.print(lengths_table(found), "")
        out.print(histogram(found.lengths[:, 3], options.max_length), "")
    for hint in found.hints():
        out.print(f"label noise? {hint}", style="yellow", soft_wrap=True)
    if found.hints():
        out.print()
