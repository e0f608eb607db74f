"""Tokenised pairs come back from disk as they were, only for the same data and options, and never damaged."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import make_tokenizer, preference_rows, write_jsonl

from tdpo import TokenisedPair, UserError
from tdpo.data import cache as cache_module
from tdpo.data.dataset import PairDataset, check_fits, prepare_pairs
from tdpo.data.formats import DataReport
from tdpo.data.sources import open_source, read_source
from tdpo.data.table import record_batch
from tdpo.data.tokenise import Lengths, Tokeniser


def prepared(file: Path, folder: Path, tokenizer: object = None, **lengths: object) -> PairDataset:
    tokeniser = Tokeniser(
        tokenizer or make_tokenizer(), Lengths(**{"max_length": 20, "max_prompt_length": 8, **lengths})
    )
    return prepare_pairs(open_source(str(file), "train"), tokeniser, cache=folder)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = preference_rows(30)
    rows[4]["rejected"] = rows[4]["chosen"]
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many records each tokenisation was given, in the order they happened."""
    calls: list[int] = []
    whole = Tokeniser.pairs

    def counted(self: Tokeniser, records: list, *more: object) -> list[TokenisedPair]:
        calls.append(len(records))
        return whole(self, records, *more)

    monkeypatch.setattr(Tokeniser, "pairs", counted)
    return calls


def test_the_second_start_reads_pairs_and_report_and_tokenises_nothing(
    file: Path, tmp_path: Path, tokenised: list[int]
) -> None:
    first, again = prepared(file, tmp_path / "cache"), prepared(file, tmp_path / "cache")
    assert tokenised == [29]
    assert list(again) == list(first) and again.report == first.report
    assert again.report.dropped["chosen and rejected are identical"] == [5]
    assert again.report.truncated and [pair.row for pair in again][3:5] == [4, 6]
    assert list(pickle.loads(pickle.dumps(again))) == list(first)
    assert prepare_pairs(read_source(str(file), "train"), Tokeniser(make_tokenizer(), Lengths(20, 8)))[:] == list(first)


def test_whatever_decides_over_the_ids_decides_over_the_key(file: Path, tmp_path: Path, tokenised: list[int]) -> None:
    folder = tmp_path / "cache"
    other_end, other_word = make_tokenizer(), make_tokenizer()
    other_end.eos_token = "a"
    other_word.add_tokens(["river"])
    for number, more in enumerate(
        [
            {},
            {"max_length": 21},
            {"truncation_mode": "keep_start"},
            {"tokenizer": other_end},
            {"tokenizer": other_word},
        ],
        1,
    ):
        prepared(file, folder, **more)
        assert len(tokenised) == number
    file.write_text(file.read_text().replace("river", "RIVER", 1))
    prepared(file, folder)
    assert len(tokenised) == 6
    used = make_tokenizer()
    used("text", truncation=True, max_length=4)  # leaves settings behind in its backend
    prepared(file, folder, tokenizer=used)
    assert len(tokenised) == 6


def test_rows_in_memory_are_found_again_by_their_content(tmp_path: Path, tokenised: list[int]) -> None:
    tokeniser, cache = Tokeniser(make_tokenizer()), tmp_path
    for rows in (preference_rows(8), preference_rows(8), preference_rows(9)):
        assert len(prepare_pairs(rows, tokeniser, cache=cache)) == len(rows)
    assert tokenised == [8, 9]
    odd = [{**row, "more": object()} for row in preference_rows(8)]  # no fingerprint, so no cache
    assert len(prepare_pairs(odd, tokeniser, cache=cache)) == len(prepare_pairs(odd, tokeniser, cache=cache)) == 8
    assert tokenised == [8, 9, 8, 8]


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "harm",
    [
        lambda pairs, about: flip_a_byte(pairs),
        lambda pairs, about: pairs.write_bytes(pairs.read_bytes()[:-50]),
        lambda pairs, about: pairs.unlink(),
        lambda pairs, about: about.write_text("{"),
        lambda pairs, about: about.write_text("{}"),
        lambda pairs, about: about.write_text("[]"),
    ],
)
def test_a_damaged_entry_is_reported_in_one_line_and_made_again(
    harm: object, file: Path, tmp_path: Path, tokenised: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    first = list(prepared(file, tmp_path / "cache"))
    ((pairs,), (about,)) = (tuple((tmp_path / "cache").glob(f"*.{kind}")) for kind in ("arrow", "json"))
    harm(pairs, about)
    assert list(prepared(file, tmp_path / "cache")) == first
    assert len(tokenised) == 2 and [r.message.count("is damaged") for r in caplog.records] == [1]
    assert list(prepared(file, tmp_path / "cache")) == first and len(tokenised) == 2


def test_a_full_disk_or_a_forbidden_folder_costs_a_warning(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "taken").write_text("a file")
    want = list(prepared(file, tmp_path / "cache"))
    assert list(prepared(file, tmp_path / "taken")) == want
    assert "taken: the tokenised pairs cannot be kept there" in caplog.text and "--cache_dir" in caplog.text

    def full(*_: object) -> object:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache_module.pa.ipc, "new_file", full)
    caplog.clear()
    assert list(prepared(file, tmp_path / "full")) == want
    assert "No space left on device" in caplog.text
    assert not [p for p in (tmp_path / "full").iterdir() if p.suffix != ".lock"]


def test_bad_rows_are_reported_and_leave_nothing_behind(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", [*preference_rows(3), {"prompt": "a", "chosen": 3, "rejected": "b"}])
    for _ in range(2):
        with pytest.raises(UserError, match=r"row 4: field 'chosen' must be"):
            prepared(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.arrow"))


def rank(number: int, file: Path, folder: Path, start: object, output: object) -> None:
    whole, count = Tokeniser.pairs, []

    def counted(self: Tokeniser, records: list, *more: object) -> list[TokenisedPair]:
        count.append(len(records))
        return whole(self, records, *more)

    Tokeniser.pairs = counted
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # threads that the parent had started are not there after a fork
    start.wait()
    dataset = prepared(file, folder, max_length=60)
    output.put((number, count, [(p.prompt_ids, p.chosen_ids, p.rejected_ids, p.row) for p in dataset]))


def test_two_processes_see_the_same_pairs_in_the_same_order_tokenised_once(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "pairs.jsonl", preference_rows(4000))
    context = multiprocessing.get_context("fork")
    start, output = context.Barrier(2), context.Queue()
    ranks = [context.Process(target=rank, args=(n, file, tmp_path / "cache", start, output)) for n in range(2)]
    for process in ranks:
        process.start()
    (_, one, first), (_, other, second) = (output.get(timeout=120) for _ in ranks)
    for process in ranks:
        process.join()
    assert first == second and len(first) == 4000
    assert sorted([sum(one), sum(other)]) == [0, 4000]


def test_a_dataset_is_a_sequence_of_pairs_and_checks_like_one() -> None:
    pairs = [TokenisedPair([n, n + 1], [7] * n, [8, 9], n) for n in range(1, 6)]
    table = pa.Table.from_batches([record_batch(pairs[:2]), record_batch([]), record_batch(pairs[2:])])
    for dataset in (PairDataset(table, DataReport("pairs")), prepare_pairs(pairs, None)):
        assert list(dataset) == pairs and dataset[1:4] == pairs[1:4] and dataset[-1] == pairs[-1] and len(dataset) == 5
        assert [dataset[n] for n in range(5)] == pairs and dataset.table["row"].to_pylist() == [1, 2, 3, 4, 5]
        assert dataset.side_lengths().tolist() == [[2, n, 2] for n in range(1, 6)]
        assert list(pickle.loads(pickle.dumps(dataset))) == pairs
        with pytest.raises(IndexError):
            dataset[5]
    dataset = prepare_pairs(preference_rows(6), Tokeniser(make_tokenizer()))
    assert dataset.lengths() == [len(p.prompt_ids + p.chosen_ids + p.rejected_ids) for p in dataset]
    check_fits(dataset, 400, 64)
    with pytest.raises(UserError, match=r"row \d+: token id \d+ is outside the model's vocabulary of 300"):
        check_fits(dataset, 300)
    with pytest.raises(UserError, match=r"row 1: \d+ tokens, but the model has 4 positions"):
        check_fits(dataset, 400, 4)


def test_the_entry_says_what_it_is(file: Path, tmp_path: Path) -> None:
    prepared(file, tmp_path / "cache")
    (about,) = (tmp_path / "cache").rglob("*.json")
    output = json.loads(about.read_text())
    assert output["report"]["source"] == str(file) and output["report"]["kept"] == 29
