"""The token view without a browser: texts of tokens, values against score_pairs, equations, output of the command."""

from __future__ import annotations

import copy
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_model
from numeric_worlds import moved, random_pairs, tiny_llama
from rich.console import Console
from transformers import PreTrainedTokenizerFast

import tdpo
from tdpo import objectives
from tdpo.cli import main
from tdpo.data.token_texts import pieces, token_ends
from tdpo.evaluate.inspect import inspect_pairs, top_tokens
from tdpo.models.hidden import response_hidden
from tdpo.objectives import OBJECTIVES, weighted
from tdpo.score import packer
from tdpo.types import PairStats, PairTokens, TokenisedPair

TEXTS = [
    "The river sees the garden.",
    "你好，世界",
    "مرحبا بالعالم",
    "👩‍🚀 and 🎉!",
    "line\n\nbreaks\tand  spaces ",
    "\N{REPLACEMENT CHARACTER} as it stands",
    "</script><script>hacked = 1</script>{{7*7}} ${1} <img src=x onerror=hacked=1>",
]
REFERENCE = tiny_llama(seed=0)
POLICY = moved(REFERENCE)


class Numbers:
    """A tokenizer whose tokens are spelled by their ids."""

    @staticmethod
    def decode(ids: list[int], **_: bool) -> str:
        return "".join(f" {i}" for i in ids)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("before", ["", "The letter:"])
def test_pieces_spell_the_text_and_join_the_bytes_of_a_character(
    tokenizer: PreTrainedTokenizerFast, text: str, before: str
) -> None:
    ids, context = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, before))
    found = pieces(ids, tokenizer.decode, context)
    assert "".join(piece.text for piece in found) == text
    assert sum(piece.tokens for piece in found) == len(ids)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        # No piece could be split further: all but the last of its tokens end inside a character.
        start = 0
        for piece in found:
            for cut in range(start + 1, start + piece.tokens):
                assert tokenizer.decode(ids[:cut]).endswith("\N{REPLACEMENT CHARACTER}")
            start += piece.tokens


def test_bytes_that_never_become_a_character_are_kept(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("é", add_special_tokens=False)["input_ids"][:1] * 40
    found = pieces(ids, tokenizer.decode)
    assert sum(piece.tokens for piece in found) == 40
    assert "".join(piece.text for piece in found) == tokenizer.decode(ids)


def test_ends_count_the_complete_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = tokenizer("a好b", add_special_tokens=False)["input_ids"]
    assert token_ends(ids, tokenizer.decode) == [1, 1, 1, 2, 3]


@pytest.mark.parametrize("name", [*OBJECTIVES])
@pytest.mark.parametrize("token_weights", [None, "ld:0.5"])
def test_values_are_those_of_score_pairs(name: str, token_weights: str | None) -> None:
    objective = objectives.build(name)
    drawn = random_pairs(seed=3, count=5)
    first = drawn[0]
    weights = [0.5 + 0.25 * i for i in range(len(first.chosen_ids))]
    pairs = [TokenisedPair(first.prompt_ids, first.chosen_ids, first.rejected_ids, 1, weights), *drawn[1:]]
    found = inspect_pairs(POLICY, REFERENCE, pairs, objective, Numbers, batch_size=2, token_weights=token_weights)
    reference = REFERENCE if objective.uses_reference else None
    pack = weighted(packer("padded", [POLICY, REFERENCE]), token_weights)
    for pair, seen in zip(pairs, found, strict=True):
        with torch.no_grad():
            truth = tdpo.score.score_batch(POLICY, reference, pack([pair]), objective)
            plain = tdpo.score_pairs(POLICY, REFERENCE, [pair], objectives.dpo())
        assert seen.loss == pytest.approx(truth.loss.item(), abs=1e-9)
        assert seen.margin == pytest.approx((truth.chosen_reward - truth.rejected_reward).item(), abs=1e-9)
        assert seen.chosen.logratio.sum() == pytest.approx(plain.stats.chosen_logratio.item(), abs=1e-9)
        assert seen.rejected.kl.sum() == pytest.approx(plain.stats.rejected_kl.item(), abs=1e-9)
        assert seen.kl == pytest.approx((plain.stats.chosen_kl + plain.stats.rejected_kl).item(), abs=1e-9)
        assert seen.largest_kl == pytest.approx(plain.tokens.kl.max().item(), abs=1e-9)
        assert np.concatenate([seen.chosen.logp, seen.rejected.logp]) == pytest.approx(plain.tokens.logp.numpy())
        assert seen.chosen.text == Numbers.decode(pair.chosen_ids) and seen.row == pair.row


def test_token_weights_are_those_of_the_loss() -> None:
    pair = TokenisedPair([1], [2, 3, 4], [5], chosen_weights=[1.0, 2.0, 0.5], rejected_kl_weights=[3.0])
    (seen,) = inspect_pairs(POLICY, REFERENCE, [pair], objectives.tdpo2(), Numbers, token_weights="ld:0.5")
    assert seen.chosen.weights.tolist() == [1.0, 1.0, 0.25]
    assert seen.chosen.kl_weights.tolist() == [1.0, 0.5, 0.5]
    assert seen.rejected.kl_weights.tolist() == [3.0]


@pytest.mark.parametrize("logits_budget", [None, 1])
def test_top_tokens_are_those_of_the_whole_distribution(logits_budget: int | None) -> None:
    batch = packer("padded", [POLICY])(random_pairs(seed=1, count=2))
    with torch.no_grad():
        sides = [response_hidden(model, batch) for model in (POLICY, REFERENCE)]
        ids, *probabilities = top_tokens(*sides, 4, logits_budget)
        for number, (side, found) in enumerate(zip(sides, probabilities, strict=True)):
            truth = (side.states @ side.head.weight.T).softmax(-1)
            assert torch.allclose(found, truth.gather(1, ids))
            own = ids[:, 4 * number : 4 * number + 4]
            assert torch.equal(truth.gather(1, own).amin(1), truth.sort(1, descending=True).values[:, 3])


EQUATIONS = [
    *((name, {}) for name in OBJECTIVES if name != "tbpo"),
    ("fdpo", {"divergence": "js"}),
    ("fdpo", {"divergence": "alpha", "alpha": 0.3}),
]


@pytest.mark.parametrize(("name", "parameters"), EQUATIONS)
def test_an_equation_gives_the_loss(name: str, parameters: dict) -> None:
    objective = objectives.build(name, **parameters)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        r_w, r_l, k_w, k_l, p_w, p_l = torch.randn(6, 1, dtype=torch.float64, generator=generator)
        n_w, n_l = torch.tensor([[3.0], [5.0]], dtype=torch.float64)
        stats = PairStats(r_w, r_l, k_w.abs(), k_l.abs(), p_w, p_l, n_w, n_l)
        symbols = {"r_w": r_w, "r_l": r_l, "k_w": k_w.abs(), "k_l": k_l.abs(), "p_w": p_w, "p_l": p_l, "n_w": n_w}
        values = {symbol: value.item() for symbol, value in (symbols | {"n_l": n_l}).items()} | objective.parameters
        functions = {"log": math.log, "exp": math.exp, "max": max, "sigmoid": lambda u: 1 / (1 + math.exp(-u))}
        assert eval(objective.equation, functions, values) == pytest.approx(objective(stats).loss.item(), rel=1e-9)


def test_an_objective_that_sums_do_not_determine_has_no_equation() -> None:
    assert objectives.tbpo().equation == ""


def world(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple:
    """Policy, reference and pairs whose responses are the texts."""
    reference = make_model(len(tokenizer))
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    pairs = [TokenisedPair(ids[i - 2], one, ids[i - 1], row=i + 1) for i, one in enumerate(ids)]
    return moved(reference, step=0.02), reference, pairs


def test_lines_are_json_with_the_values(tokenizer: PreTrainedTokenizerFast) -> None:
    policy, reference, pairs = world(tokenizer, TEXTS)
    inspection = tdpo.inspect(policy, reference, pairs, objectives.tdpo2(), tokenizer)
    for text, line, pair in zip(TEXTS, inspection.lines(), inspection.pairs, strict=True):
        line = json.loads(json.dumps(line))
        chosen = line["chosen"]
        assert "".join(piece for piece, _ in chosen["pieces"]) == text
        assert chosen["kl"] == pair.chosen.kl.tolist() and chosen["sequential_kl"] == sum(chosen["kl"])
        assert line["margin"] == chosen["reward"] - line["rejected"]["reward"]
        for entries, logp, ref_logp, label in zip(
            chosen["alternatives"], chosen["logp"], chosen["ref_logp"], chosen["ids"], strict=True
        ):
            assert len(entries) == 10
            for entry in entries:
                assert entry["text"] == tokenizer.decode([entry["id"]])
                if entry["id"] == label:
                    assert math.log(entry["policy"]) == pytest.approx(logp, abs=1e-5)
                    assert math.log(entry["reference"]) == pytest.approx(ref_logp, abs=1e-5)


def test_values_that_are_not_numbers_are_shown_as_such(tokenizer: PreTrainedTokenizerFast) -> None:
    policy, reference, pairs = world(tokenizer, TEXTS)
    inspection = tdpo.inspect(policy, reference, pairs, objectives.tdpo2(), tokenizer)
    inspection.pairs[0].chosen.logp[1] = -math.inf
    inspection.pairs[1].rejected.kl[0] = math.nan
    page = inspection.html()
    meta = json.loads(re.search(r'id="meta">(.*?)</script>', page, re.S)[1], parse_constant=pytest.fail)
    assert meta["index"]["r_w"][0] == "-Infinity" and meta["index"]["k_l"][1] == "NaN"
    assert all(0 < scale < 100 for scale in meta["scales"].values())
    first, second = list(inspection.lines())[:2]
    assert first["chosen"]["logp"][1] == "-Infinity" and second["rejected"]["kl"][0] == "NaN"
    json.dumps([first, second], allow_nan=False)
    Console(file=io.StringIO()).print(inspection)


def test_a_terminal_gets_no_control_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    policy, reference, pairs = world(tokenizer, ["a\x1b]0;title\x07b", *TEXTS[:2]])
    output = io.StringIO()
    Console(file=output).print(tdpo.inspect(policy, reference, pairs, objectives.tdpo2(), tokenizer))
    assert "a\N{REPLACEMENT CHARACTER}]0;title\N{REPLACEMENT CHARACTER}b" in output.getvalue()
    assert "\x1b" not in output.getvalue()


def test_a_notebook_shows_the_page_in_a_frame_without_rights(tokenizer: PreTrainedTokenizerFast) -> None:
    policy, reference, pairs = world(tokenizer, TEXTS)
    shown = tdpo.inspect(policy, reference, pairs, objectives.tdpo2(), tokenizer)._repr_html_()
    assert shown.startswith('<iframe title="token view" sandbox="allow-scripts"') and shown.count("<") == 2


def test_text_of_the_data_does_not_end_an_element_of_the_page(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    policy, reference, pairs = world(tokenizer, TEXTS)
    names = {"policy_name": TEXTS[-1], "reference_name": TEXTS[-1], "dataset_name": TEXTS[-1]}
    path = tdpo.inspect(policy, reference, pairs, objectives.tdpo2(), tokenizer, **names).save(tmp_path / "page.html")
    page = path.read_text(encoding="utf-8")
    assert page.count("<script") == page.count("</script>") == 4  # values, texts, one chunk of pairs, the program
    assert "hacked" in page and "<img" not in page


def command(model_folder: Path, *words: str) -> int:
    paths = ["--model_name_or_path", str(model_folder), "--ref_model_name_or_path", str(model_folder)]
    return main(["inspect", *paths, *words])


def test_the_command_writes_a_page_lines_and_terminal_output(
    model_folder: Path, pairs_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = ["--dataset_name", str(pairs_file), "--max_pairs", "3"]
    page, lines = tmp_path / "page.html", tmp_path / "pairs.jsonl"
    assert command(model_folder, *data, "--output", str(page)) == 0
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert command(model_folder, *data, "--output", str(lines), "--format", "jsonl", "--objective", "dpo") == 0
    rows = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [row["row"] for row in rows] == [1, 2, 3]
    assert all(row["loss"] == pytest.approx(math.log(2)) for row in rows)  # policy and reference are equal
    assert rows[0]["prompt"] == "The river and the garden were near"
    capsys.readouterr()
    typed = ["--prompt", "The river", "--chosen", " sees 好", "--rejected", " likes"]
    assert command(model_folder, *typed, "--format", "terminal") == 0
    shown = capsys.readouterr().out
    assert " sees 好<|endoftext|>" in shown and "row 1: loss 0.6931, margin 0" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--output", "x.html"], "give either --dataset_name, or --prompt, --chosen and --rejected"),
        (["--prompt", "a", "--chosen", "b", "--output", "x.html"], "a pair needs --prompt, --chosen and --rejected"),
        (["--dataset_name", "DATA"], "--output is missing: the file for --format html"),
        (["--dataset_name", "DATA", "--format", "terminal", "--output", "x"], "--format terminal writes no file"),
        (["--dataset_name", "DATA", "--output", "x", "--max_pairs", "0"], "--max_pairs must be at least 1, got 0"),
        (["--prompt", "a", "--chosen", "b", "--rejected", "b", "--format", "terminal"], "are the same tokens"),
    ],
)
def test_mistakes_are_named(
    model_folder: Path, pairs_file: Path, words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    assert command(model_folder, *(str(pairs_file) if word == "DATA" else word for word in words)) == 2
    assert message in capsys.readouterr().err


def test_a_missing_reference_is_named(model_folder: Path, pairs_file: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--model_name_or_path", str(model_folder), "--dataset_name", str(pairs_file), "--output", "page.html"]
    assert main(["inspect", *words]) == 2
    assert "--ref_model_name_or_path is missing" in capsys.readouterr().err


def test_models_are_left_in_their_mode(tokenizer: PreTrainedTokenizerFast) -> None:
    policy, reference, pairs = world(tokenizer, TEXTS[:2])
    policy.train()
    tdpo.inspect(policy, copy.deepcopy(reference), pairs, objectives.tdpo2(), tokenizer)
    assert policy.training


def test_statistics_of_pairs_are_sums_of_the_tokens() -> None:
    (pair,) = random_pairs(seed=9, count=1)
    (seen,) = inspect_pairs(POLICY, REFERENCE, [pair], objectives.tdpo1(beta=0.3), Numbers)
    tokens = [torch.tensor(np.concatenate([getattr(side, name) for side in (seen.chosen, seen.rejected)]))
              for name in ("logratio", "kl", "logp")]  # fmt: skip
    ids = torch.tensor([0] * len(pair.chosen_ids) + [1] * len(pair.rejected_ids))
    outcome = objectives.tdpo1(beta=0.3).pair_loss(PairTokens(*tokens, ids, 1))
    assert seen.loss == pytest.approx(outcome.loss.item())
    assert seen.chosen.reward == pytest.approx(outcome.chosen_reward.item())
