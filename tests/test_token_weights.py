"""Token weights: from columns and by position, through tokenising, truncation, tables, packing and training."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from numeric_worlds import assert_same_gradients, gradients, moved, random_pairs, tiny_llama
from test_cli import mistake
from test_objective_family import FAMILY

from tdpo import TokenisedPair, UserError, objectives, pair_loss, score_pairs
from tdpo.cli import main
from tdpo.config.tokens import Lengths
from tdpo.data.dataset import prepare_pairs
from tdpo.data.pack import as_padded, pack_padded, pack_trees
from tdpo.data.sources import open_source
from tdpo.data.tokenise import Tokeniser
from tdpo.objectives import PositionWeights, weighted
from tdpo.types import WEIGHTS, PairTokens

ROW = {"prompt": "The cat", "chosen": " sat on the mat", "rejected": " ran away"}


def weighted_pairs() -> list[TokenisedPair]:
    """Returns random pairs of which the first and the last carry weights."""
    generator = torch.Generator().manual_seed(4)

    def draw(ids: list[int]) -> list[float]:
        return (2 * torch.rand(len(ids), generator=generator)).tolist()

    pairs = random_pairs()
    first = {"chosen_weights": draw(pairs[0].chosen_ids), "rejected_kl_weights": draw(pairs[0].rejected_ids)}
    last = {"rejected_weights": draw(pairs[-1].rejected_ids), "chosen_kl_weights": draw(pairs[-1].chosen_ids)}
    return [replace(pairs[0], **first), *pairs[1:-1], replace(pairs[-1], **last)]


@pytest.mark.parametrize(
    "objective", [objectives.tdpo1(0.3), objectives.tdpo2(0.3, 0.7), objectives.tbpo(0.3)], ids=str
)
@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_a_weighted_pair_is_its_weighted_sums(objective, layout) -> None:
    """The one-pass loss of a model equals the objective on weighted statistics, which are taken one pair at a time."""
    reference = tiny_llama()
    policy = moved(reference)
    pairs = weighted_pairs()
    total, scores = pair_loss(policy, reference, pairs, objective, layout=layout)
    expected = []
    for pair in pairs:
        plain = replace(pair, **dict.fromkeys(WEIGHTS))
        alone = score_pairs(policy, reference, [plain], objective, layout="padded", backend="naive")
        ones = {"chosen": [1.0] * len(pair.chosen_ids), "rejected": [1.0] * len(pair.rejected_ids)}
        w = torch.tensor([*(pair.chosen_weights or ones["chosen"]), *(pair.rejected_weights or ones["rejected"])])
        v = torch.tensor([*(pair.chosen_kl_weights or ones["chosen"]), *(pair.rejected_kl_weights or ones["rejected"])])
        tokens = PairTokens(
            w * (alone.tokens.logp - alone.tokens.ref_logp), v * alone.tokens.kl, w * alone.tokens.logp,
            alone.batch.sequence_ids, 1,
        )  # fmt: skip
        expected.append(objective.pair_loss(tokens).loss)
    expected_total = torch.cat(expected).sum()
    torch.testing.assert_close(total, expected_total, rtol=1e-6, atol=1e-9)
    assert_same_gradients(gradients(total, policy), gradients(expected_total, policy), rtol=1e-5)
    unweighted = score_pairs(policy, reference, random_pairs(), objective)
    torch.testing.assert_close(scores.stats.chosen_kl, unweighted.stats.chosen_kl, rtol=1e-6, atol=1e-9)
    assert (scores.loss[1] - unweighted.loss[1]).abs() < 1e-6 and (scores.loss[0] - unweighted.loss[0]).abs() > 1e-4


@pytest.mark.parametrize("objective", FAMILY, ids=str)
@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_one_pass_equals_plain_autograd_on_a_model_in_either_layout(objective, layout) -> None:
    reference = tiny_llama()
    policy = moved(reference)
    (ours, scores), (theirs, expected) = (
        pair_loss(policy, reference, weighted_pairs(), objective, layout=layout, backend=backend)
        for backend in ("chunked", "naive")
    )
    torch.testing.assert_close(scores.loss, expected.loss, rtol=1e-9, atol=1e-12)
    assert_same_gradients(gradients(ours, policy), gradients(theirs, policy), rtol=1e-9)


def test_both_layouts_carry_the_same_weights() -> None:
    pairs = weighted_pairs()
    padded, trees = pack_padded(pairs), pack_trees(pairs)
    expected = [
        [x for p in pairs for x in (*(p.chosen_weights or [1.0] * len(p.chosen_ids)),
                                    *(p.rejected_weights or [1.0] * len(p.rejected_ids)))],
        [x for p in pairs for x in (*(p.chosen_kl_weights or [1.0] * len(p.chosen_ids)),
                                    *(p.rejected_kl_weights or [1.0] * len(p.rejected_ids)))],
    ]  # fmt: skip
    for batch in (padded, trees, as_padded(trees)):
        torch.testing.assert_close(batch.weights, torch.tensor(expected))
    assert pack_trees(random_pairs()).weights is None


def test_a_swapped_pair_swaps_its_weights() -> None:
    pair = TokenisedPair([1], [2, 3], [4], chosen_weights=[0.5, 2.0], rejected_kl_weights=[3.0])
    swapped = pair.swapped
    assert (swapped.rejected_weights, swapped.chosen_kl_weights, swapped.chosen_weights) == ([0.5, 2.0], [3.0], None)
    assert swapped.swapped == pair


# --- columns --------------------------------------------------------------------------------------------------------


def prepared(tokenizer: Any, **columns: Any) -> TokenisedPair:
    return prepare_pairs([ROW | columns], Tokeniser(tokenizer, Lengths(40, 20)))[0]


def test_a_column_has_one_number_per_token_or_all_but_the_end_token(tokenizer) -> None:
    plain = prepared(tokenizer)
    count = len(plain.chosen_ids)
    numbers = [0.5 + index for index in range(count)]
    assert prepared(tokenizer, chosen_weights=numbers).chosen_weights == numbers
    assert prepared(tokenizer, chosen_weights=numbers[:-1]).chosen_weights == [*numbers[:-1], 1.0]
    assert prepared(tokenizer, rejected_kl_weights=[2] * len(plain.rejected_ids)).rejected_kl_weights == [2.0] * len(
        plain.rejected_ids
    )


def test_spans_of_characters_weigh_the_tokens_that_begin_in_them(tokenizer) -> None:
    text = ROW["chosen"]
    start, end = text.index("the"), text.index("the") + len("the mat")
    weights = prepared(tokenizer, chosen_weights=[[start, end, 3.0]]).chosen_weights
    ids = prepared(tokenizer).chosen_ids
    shown = [tokenizer.decode(ids[: count + 1]) for count in range(len(ids))]
    begins = [len(before) for before in ["", *shown[:-1]]]
    spaces = [len(tokenizer.decode([token])) - len(tokenizer.decode([token]).lstrip()) for token in ids]
    expected = [
        3.0 if start <= begin + space < end else 1.0 for begin, space in zip(begins[:-1], spaces[:-1], strict=True)
    ]
    assert weights == [*expected, 1.0]
    assert 3.0 in expected and 1.0 in expected


def test_weights_are_truncated_with_their_tokens(tokenizer) -> None:
    whole = prepared(tokenizer)
    numbers = [1.0 + index for index in range(len(whole.chosen_ids))]
    room = len(whole.prompt_ids) + 2
    (pair,) = prepare_pairs([ROW | {"chosen_weights": numbers}], Tokeniser(tokenizer, Lengths(room, room - 1)))
    assert len(pair.chosen_ids) == 2 and pair.chosen_weights == numbers[:2]


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 2.0], "field 'chosen_weights' has 2 numbers for"),
        ([-1.0], "field 'chosen_weights' has -1.0 for token 1; a weight is a finite number of at least 0"),
        ([math.nan], "field 'chosen_weights' has nan for token 1"),
        ([0.0], "field 'chosen_weights' is 0 for every token"),
        ([1e39], "field 'chosen_weights' has 1e.39 for token 1"),
        ([[0, 2, 10**400]], "span 1: a weight is a finite number"),
        ([], "field 'chosen_weights' must list numbers or"),
        ("high", "field 'chosen_weights' must list numbers or"),
        ([[0, 400, 2.0]], "field 'chosen_weights', span 1: 0 to 400 of a text of 15 characters"),
        ([[0, 2, -2.0]], "span 1: a weight is a finite number of at least 0, found -2.0"),
        ([[0, 2]], r"span 1: expected \[start, end, weight\]"),
        ([1.0, [0, 2, 1.0]], "numbers alone or"),
    ],
)
def test_bad_weights_name_row_and_field(tokenizer, weights, message) -> None:
    count = len(prepared(tokenizer).chosen_ids)
    if isinstance(weights, list) and len(weights) == 1 and isinstance(weights[0], float):
        weights = weights * count if weights[0] == 0 else weights + [1.0] * (count - 1)
    rows = [ROW, {**ROW, "chosen_weights": weights}]
    with pytest.raises(UserError, match=message) as raised:
        prepare_pairs(rows, Tokeniser(tokenizer), name="pairs")
    assert "row 2" in str(raised.value)


def test_tables_and_caches_keep_weights(tokenizer, tmp_path: Path) -> None:
    pairs = weighted_pairs()
    dataset = prepare_pairs(pairs, None)
    for pair, stored in zip(pairs, dataset, strict=True):
        for name in WEIGHTS:
            given = getattr(pair, name)
            assert getattr(stored, name) == (None if given is None else pytest.approx(given, rel=1e-6))
    rows = [ROW | {"chosen_weights": [0.5] * len(prepared(tokenizer).chosen_ids)}]
    first, again = (prepare_pairs(rows, Tokeniser(tokenizer), cache=tmp_path) for _ in range(2))
    assert first[0] == again[0] and again[0].chosen_weights[0] == 0.5
    other = prepare_pairs([ROW], Tokeniser(tokenizer), cache=tmp_path)
    assert other[0].chosen_weights is None


# --- by position ----------------------------------------------------------------------------------------------------


def test_weights_by_position() -> None:
    pairs = [TokenisedPair([1], [2, 3, 4], [5], chosen_weights=[1.0, 2.0, 4.0])]
    batch = weighted(pack_trees, "ld:0.5")(pairs)
    assert batch.weights.tolist() == [[1.0, 1.0, 2.0, 1.0], [1.0, 0.5, 0.5, 1.0]]
    batch = weighted(pack_padded, "decay:0.5")(pairs)
    assert batch.weights.tolist() == [[1.0, 1.0, 1.0, 1.0], [1.0, 0.5, 0.25, 1.0]]
    assert weighted(pack_trees, None) is pack_trees


@pytest.mark.parametrize("text", ["ld", "ld:2", "ld:x", "decay:-1", "tail:0.5"])
def test_other_spellings_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="expected ld:A or decay:A with a number A from 0 to 1"):
        PositionWeights.parse(text)


# --- through the command line ---------------------------------------------------------------------------------------


def test_training_with_a_column_differs_and_weights_of_one_do_not(tmp_path: Path, model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    rows = [{"prompt": f"The cat {i}", "chosen": f" sat {i}", "rejected": f" ran {i}"} for i in range(8)]
    losses = {}
    for name, weight in (("none", None), ("one", 1.0), ("two", 2.0)):
        file = tmp_path / f"{name}.jsonl"
        lines = []
        for row in rows:
            count = len(Tokeniser(tokenizer).encode([row["chosen"]])[0])
            more = {} if weight is None else {"chosen_weights": [weight] * count}
            lines.append(json.dumps(row | more))
        file.write_text("\n".join(lines) + "\n")
        words = ["train", "--model_name_or_path", model_folder, "--dataset_name", file, "--output_dir", tmp_path / name]
        words += ["--max_steps", 3, "--learning_rate", 1e-2, "--per_device_train_batch_size", 4, "--report_to", "none"]
        words += ["--save_strategy", "no", "--logging_steps", 1, "--use_cpu", "--cache_dataset", "false"]
        assert main([str(word) for word in words]) == 0
        history = json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"]
        losses[name] = [log["loss"] for log in history if "loss" in log]
    assert losses["none"] == losses["one"]
    assert losses["none"][0] == losses["two"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses["none"][2] - losses["two"][2]) > 1e-4


def test_weights_of_two_models_are_written_and_trained_on(tmp_path: Path, model_folder: Path, capsys) -> None:
    rows = [{"prompt": f"The cat {i}", "chosen": f" sat {i} on", "rejected": f" ran {i}"} for i in range(6)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    other = moved(AutoModelForCausalLM.from_pretrained(model_folder))
    other.save_pretrained(tmp_path / "other")
    common = ["--model_name_or_path", model_folder, "--dataset_name", tmp_path / "pairs.jsonl"]
    words = ["weights", *common, "--positive_model", tmp_path / "other", "--negative_model", model_folder]
    words += ["--output_dir", tmp_path / "weighted"]
    assert main([str(word) for word in words]) == 0
    (file,) = (tmp_path / "weighted").glob("*.parquet")
    table = pq.read_table(file).to_pylist()
    assert len(table) == 6
    for row in table:
        assert len(row["chosen_weights"]) == len(row["chosen_ids"])
        assert min(row["chosen_weights"]) == pytest.approx(0.7) and max(row["chosen_weights"]) == pytest.approx(1.3)
    written = file.stat().st_mtime_ns
    assert main([str(word) for word in words]) == 0
    assert file.stat().st_mtime_ns == written and "0 of 1 files computed now" in capsys.readouterr().out
    assert "is of other models, options or pairs" in mistake(capsys, *words, "--weights_clamp", 3)
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    moved(weights, seed=9).save_pretrained(tmp_path / "other")  # another model under the same name
    assert "is of other models, options or pairs" in mistake(capsys, *words)
    train = ["train", "--model_name_or_path", model_folder, "--dataset_name", tmp_path / "weighted", "--max_steps", 1]
    train += ["--output_dir", tmp_path / "run", "--objective", "dpo", "--report_to", "none", "--use_cpu"]
    assert main([str(word) for word in train]) == 0


def test_one_kind_of_weights_at_a_time(tmp_path: Path, model_folder: Path, capsys) -> None:
    words = [
        "weights",
        "--model_name_or_path",
        model_folder,
        "--dataset_name",
        "x.jsonl",
        "--output_dir",
        tmp_path / "w",
    ]
    assert "give either --positive_model and --negative_model" in mistake(capsys, *words)
    held_out = ["--eval_dataset_name", "y.jsonl", "--guide_model", "c"]
    assert "--eval_dataset_name: weights are of one dataset" in mistake(capsys, *words, *held_out)
    assert "give either" in mistake(capsys, *words, "--positive_model", "a")
    assert "give either" in mistake(
        capsys, *words, "--positive_model", "a", "--negative_model", "b", "--guide_model", "c"
    )


def test_check_data_shows_weights(tmp_path: Path, model_folder: Path, capsys) -> None:
    rows = [{"prompt": "The cat", "chosen": " sat on the mat", "rejected": " ran", "chosen_weights": [[1, 4, 2.5]]}]
    (tmp_path / "pairs.jsonl").write_text(json.dumps(rows[0]) + "\n")
    words = ["check-data", "--model_name_or_path", model_folder, "--dataset_name", tmp_path / "pairs.jsonl"]
    words += ["--json", tmp_path / "found.json", "--fix", tmp_path / "clean.jsonl"]
    assert main([str(word) for word in words]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert "with token weights: chosen_weights from 1 to 2.5" in output and "weights 1 to 2.5, heaviest" in output
    (example,) = json.loads((tmp_path / "found.json").read_text())["examples"]
    assert 2.5 in example["chosen_weights"] and len(example["chosen_weights"]) == len(example["chosen_ids"])
    assert json.loads((tmp_path / "clean.jsonl").read_text())["chosen_weights"] == [[1, 4, 2.5]]


def test_spans_of_a_chat_count_in_its_last_message(model_folder: Path) -> None:
    from test_tokenise import chat_tokenizer

    tokenizer = chat_tokenizer("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    turns = [
        {"role": role, "content": text} for role, text in (("assistant", "mat"), ("user", "why"), ("assistant", "mat"))
    ]
    row = {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": turns,
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    (pair,) = prepare_pairs([row | {"chosen_weights": [[0, 3, 5.0]]}], Tokeniser(tokenizer))
    heavy = [index for index, weight in enumerate(pair.chosen_weights) if weight == 5.0]
    text = tokenizer.decode(pair.chosen_ids)
    assert heavy and len(tokenizer.decode(pair.chosen_ids[: heavy[0]])) > text.index("why")


def test_rows_of_token_ids_are_split_and_weighed_as_texts_are(tmp_path: Path, tokenizer) -> None:
    from tdpo.config.row_spec import RowSpec, Side

    rows = [{"prompt_ids": [i + 1], "chosen_ids": [5, 6], "rejected_ids": [7]} for i in range(40)]
    parts = [
        prepare_pairs(rows, Tokeniser(tokenizer), RowSpec("auto", side=Side(0.25, 0, test))) for test in (False, True)
    ]
    prompts = [{tuple(pair.prompt_ids) for pair in part} for part in parts]
    assert not prompts[0] & prompts[1] and len(prompts[0] | prompts[1]) == 40 and 4 <= len(prompts[1]) <= 18
    assert parts[0].report.elsewhere == len(parts[1]) and parts[0].report.kept == len(parts[0])
    assert len(prepare_pairs(rows, Tokeniser(tokenizer), RowSpec("auto", weight=2))) == 80
    with pytest.raises(UserError, match="row 2: no column 'prompt_ids', and the first row has token ids"):
        prepare_pairs([rows[0], ROW], Tokeniser(tokenizer))
    dropped = prepare_pairs([rows[0], ROW, rows[1]], Tokeniser(tokenizer), on_bad_row="drop")
    assert (len(dropped), dropped.report.read, [*dropped.report.dropped.values()]) == (2, 3, [[2]])
    weighed = [rows[0] | {"chosen_weights": [0.5, 2.0]}]
    assert prepare_pairs(weighed, Tokeniser(tokenizer))[0].chosen_weights == [0.5, 2.0]
    ignored = RowSpec("auto", ignore_columns=("chosen_weights",))
    assert prepare_pairs(weighed, Tokeniser(tokenizer), ignored)[0].chosen_weights is None
    with pytest.raises(UserError, match="--ignore_columns: there is no column 'chosen_weight'"):
        prepare_pairs(weighed, Tokeniser(tokenizer), RowSpec("auto", ignore_columns=("chosen_weight",)))
    broken = tmp_path / "ids.jsonl"
    broken.write_text(json.dumps(rows[0]) + "\n{broken\n")
    with pytest.raises(UserError, match=r"ids\.jsonl, row 2: not valid JSON"):
        prepare_pairs(open_source(str(broken), "train"), Tokeniser(tokenizer))
