"""Several processes make of a dataset what one makes: the same pairs in their order, the same report or message."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import preference_rows, write_jsonl

from tdpo import TDPOConfig, UserError
from tdpo.data import dataset, workers
from tdpo.data.formats import DataReport
from tdpo.data.formats.report import OTHER_REASONS, REASONS_KEPT
from tdpo.data.options import make_tokeniser
from tdpo.data.sources import read_source
from tdpo.data.tokenise import Lengths, Tokeniser

LIMITS = Lengths(max_length=24, max_prompt_length=8)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sixty rows in chunks of seven: two say nothing, and some are too long."""
    found = [*preference_rows(60)]
    found[20] = found[20] | {"rejected": found[20]["chosen"]}
    found[41] = found[41] | {"rejected": found[41]["chosen"]}
    found[50] = found[50] | {"prompt": "The river and the garden " * 20}
    monkeypatch.setattr(dataset, "CHUNK", 7)
    return read_source(str(write_jsonl(tmp_path / "pairs.jsonl", found)), "train")


def test_two_processes_give_what_one_gives(rows: Any, tokenizer: Any) -> None:
    one = dataset.prepare_pairs(rows, Tokeniser(tokenizer, LIMITS))
    two = dataset.prepare_pairs(rows, Tokeniser(tokenizer, LIMITS, processes=2))
    assert list(two) == list(one) and len(two) == 58
    assert two.report == one.report
    assert sum(map(len, one.report.dropped.values())) == 2 and len(one.report.truncated["prompt"]) > 0
    with pytest.raises(UserError) as alone:
        dataset.prepare_pairs(rows, Tokeniser(tokenizer, replace(LIMITS, on_overlong="error")))
    with pytest.raises(UserError) as together:
        dataset.prepare_pairs(rows, Tokeniser(tokenizer, replace(LIMITS, on_overlong="error"), processes=2))
    assert str(together.value) == str(alone.value)


def test_a_worker_that_dies_is_reported(rows: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_begin", exit)
    with pytest.raises(UserError, match=r"pairs\.jsonl: a process .* ended without a message"):
        dataset.prepare_pairs(rows, Tokeniser(tokenizer, LIMITS, processes=2))


def test_a_script_without_a_main_guard_ends_with_a_message(tmp_path: Path, model_folder: Path) -> None:
    """Its workers run the script again, and would wait for the cache that their parent is making."""
    write_jsonl(tmp_path / "pairs.jsonl", preference_rows(8))
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nfrom transformers import AutoTokenizer\n"
        "from tdpo.data.dataset import prepare_pairs\n"
        "from tdpo.data.sources import open_source\nfrom tdpo.data.tokenise import Tokeniser\n"
        f"tokeniser = Tokeniser(AutoTokenizer.from_pretrained({str(model_folder)!r}), processes=2)\n"
        "prepare_pairs(open_source('pairs.jsonl', 'train'), tokeniser, cache=Path('cache'))\n"
    )
    run = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=50)
    assert run.returncode == 1
    assert "UserError: pairs.jsonl: a process that tokenised it ended without a message" in run.stderr
    assert "must begin with if __name__ == '__main__'" in run.stderr


def test_reports_of_parts_add_up() -> None:
    whole, part = DataReport("pairs.jsonl"), DataReport("pairs.jsonl")
    for number in range(REASONS_KEPT):
        whole.dropped[f"reason {number}"].append(number)
    part.dropped["reason 3"].append(70)
    part.dropped["a new one"].append(71)
    part.truncated["prompt"] += [72, 73]
    whole.add(part)
    assert whole.dropped["reason 3"] == [3, 70] and whole.dropped[OTHER_REASONS] == [71]
    assert whole.truncated == {"prompt": [72, 73]}


def test_fewer_than_one_process_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(UserError, match="--dataset_num_proc must be at least 1, got 0"):
        make_tokeniser(TDPOConfig(output_dir=str(tmp_path), dataset_num_proc=0), tokenizer)
