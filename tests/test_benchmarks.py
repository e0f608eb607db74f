"""The benchmarks count what they say, and the one for a GPU runs whole at toy sizes on a CPU."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY, make_tokenizer

pytest.importorskip("trl", reason="TRL is not installed; make install brings it (the extra 'bench')")
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import step

    return step


COUNTS = {
    "tdpo2": (4, 1), "dpo": (4, 1), "tbpo": (4, 1), "tdpo2-padded": (4, 2), "tdpo2-padded-naive": (4, 2),
    "trl-dpo-compacted": (5, 2), "trl-tdpo2": (11, 2),
}  # fmt: skip
"""Products with the head per scored token, and how often a prompt runs through a model."""
PROMPT, RESPONSE = 200, 50


@pytest.mark.parametrize("name", COUNTS)
def test_head_products_and_body_tokens(name: str, step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    products, prompts = COUNTS[name]
    vocab = 1500
    policy, reference = step.models(vocab, 512, 64, 2)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(vocab, (n,), generator=generator).tolist() for n in (PROMPT, RESPONSE, RESPONSE)]
    pairs = [step.TokenisedPair(*parts)]
    if name.startswith("trl-dpo"):
        from trl.trainer import utils

        monkeypatch.setattr(utils, "_use_triton", utils._use_triton)  # the benchmark replaces it
    loss = step.step_of(name, policy, reference, pairs, make_tokenizer())
    found = step.counts_of(lambda: loss().backward(), policy, reference.model, 1024, 2 * RESPONSE)
    # The authors' arithmetic, and TRL's without compaction, score every position.
    scored = 2 * (PROMPT + RESPONSE - 1) / (2 * RESPONSE) if name == "tdpo2-padded-naive" else 1.0
    assert found["head_products"] == pytest.approx(products * scored, rel=0.01)
    # The last token of a response predicts nothing; some leave it out.
    assert found["body_tokens"] == pytest.approx((prompts * PROMPT + 2 * RESPONSE) / RESPONSE, rel=0.01)
    logits = 2 * RESPONSE * scored * vocab * 4 / 2**20
    assert 2 * logits <= found["logits_mebibytes"] < (60 if name.startswith("trl") else 10) * logits
    # A product takes 2 m n k operations; one forward of the reference, forward and two products back of the policy.
    layers = sum(weight.numel() for weight in policy.model.layers.parameters() if weight.dim() == 2)
    least = 2 * products * scored * 2 * RESPONSE * vocab * 64 + 2 * layers * 4 * found["body_tokens"] / 2 * 2 * RESPONSE
    assert 0.97 * least / 1e9 < found["gigaflops"] < 1.5 * least / 1e9  # attention comes on top


def test_the_counts_of_the_documentation_are_those_of_the_result_file() -> None:
    text = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    with (BENCHMARKS / "results" / "counts-hh.csv").open(encoding="utf-8") as file:
        rows = {row["implementation"]: row for row in csv.DictReader(file)}
    assert set(rows) == {"tdpo2", "tdpo2-padded", "trl-dpo-compacted", "trl-dpo", "trl-tdpo2", "liger-dpo"}
    for row in rows.values():
        columns = ("head_products", "body_tokens", "logits_mebibytes", "gigaflops")
        assert "| " + " | ".join(row[column] for column in columns) + " |" in text
    losses = {row["loss_first_round"] for name, row in rows.items() if "tdpo2" in name}
    assert len(losses) == 1


def ratio_of(row: dict[str, str], figure: str) -> str:
    median, low, high = (float(row[f"{figure}_over_tdpo2{end}"]) for end in ("", "_min", "_max"))
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


def test_the_ratios_of_the_documentation_are_those_of_the_result_files() -> None:
    text = (REPOSITORY / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    files = sorted((BENCHMARKS / "results").glob("step*.csv"))
    assert len(files) == 6
    for path in files:
        with path.open(encoding="utf-8") as file:
            rows = {row["implementation"]: row for row in csv.DictReader(file)}
        assert {"tdpo2", "trl-dpo-compacted"} <= set(rows)
        cells = {name: f"{ratio_of(row, 'seconds')} | {ratio_of(row, 'mebibytes')}" for name, row in rows.items()}
        ours = f"{float(rows['tdpo2']['seconds']):.2f} s, {float(rows['tdpo2']['mebibytes']):,.0f} MiB"
        assert f"| {ours} | {cells['trl-dpo-compacted']} | {cells.get('trl-tdpo2', '- | -')} |" in text, path.name
        if path.name == "step.csv":
            lines = text[text.index("| `tdpo2` | 1 | 1 |") :].splitlines()[1 : len(cells)]
            assert sorted(line.split(" | ", 1)[1] for line in lines) == sorted(
                f"{cell} |" for name, cell in cells.items() if name != "tdpo2"
            )
    with (BENCHMARKS / "results" / "counts-frozen.csv").open(encoding="utf-8") as file:
        products = {row["implementation"]: float(row["head_products"]) for row in csv.DictReader(file)}
    assert products == {"tdpo2": 3, "trl-dpo-compacted": 4, "trl-tdpo2": 9}


def test_trls_parts_compute_the_same_loss(step: Any) -> None:
    policy, reference = step.models(300, 512, 64, 2)
    pairs = [step.TokenisedPair([1, 2, 3], [4, 5], [6, 7, 8]), step.TokenisedPair([9], [10, 11, 12], [13])]
    losses = [step.step_of(name, policy, reference, pairs, None)().item() for name in ("tdpo2", "trl-tdpo2")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_benchmark_for_a_gpu_runs_whole(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCHMARKS / "gpu.py"), "--csv", str(tmp_path / "gpu.csv")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with (tmp_path / "gpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    checks = [row for row in rows if row["passed"]]
    assert len(checks) >= 12 and all(row["passed"] == "True" for row in checks)
    parts = {row["part"].split()[0] for row in rows}
    assert parts == {"half", "layouts", "resumption", "fsdp2", "operation", "step"}
    assert {row["name"] for row in rows} >= {"autograd", "chunked", "TRL's parts", "TRL's DPO", "tdpo2, trees, sdpa"}
    assert "none failed" in done.stdout


def test_a_part_that_fails_is_reported_and_the_others_run(step: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu

    def fails() -> list[Any]:
        raise RuntimeError("out of memory\nand more")

    assert gpu.attempt("a part", fails)[0]["error"] == "RuntimeError: out of memory"
    found = gpu.run_part("no such part")
    assert found[0]["passed"] is False and "KeyError" in found[0]["error"]
