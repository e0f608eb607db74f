"""The demo's world: the reward by hand, the grammar, the tokenizer, ranked pairs, the folder, and one tiny run."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
import re
from itertools import islice

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tdpo import UserError
from tdpo.data.sources import read_source
from tdpo.demo import world
from tdpo.demo.grammar import LEXICON, distinct_texts, explain, reward, sample_text
from tdpo.demo.run import ENTRIES, MARK, DemoOptions, claim, run_demo
from tdpo.evaluate.generate import Sampling, sample_ids


def squashed(total: float) -> float:
    return total / math.sqrt(total**2 + 16)


@pytest.mark.parametrize(
    ("text", "total"),
    [
        ("", 0.0),
        ("We saw it in May.", 0.0),
        ("The plot was good.", 1.0),
        ("The plot was SUPERB!", 2.0),
        ("The plot was dreadful.", -2.0),
        ("The plot was very superb.", 3.0),
        ("The plot was slightly dull.", -0.5),
        ("The plot was not good.", -0.75),
        ("The plot was never dull.", 0.75),
        ("The plot was not very good.", -1.125),
        ("It was not in any way at all good.", 1.0),  # out of reach
        ("It was not long, good in fact.", 1.0),  # another clause
        ("It was not long but good.", 1.0),
        ("Good, good, very good and good.", 1.0),  # once
        ("The cast was warm, but the plot was bad.", 0.0),
        ("superb radiant gripping joyful warm", 8.0),  # ungrammatical, and what gaming looks like
        ("goodness", 0.0),  # no lexicon word
        ("日本 é \ufffd good", 1.0),
    ],
)
def test_reward_by_hand(text, total):
    assert sum(explain(text).values()) == pytest.approx(total)
    assert reward(text) == pytest.approx(squashed(total))


def test_reward_is_bounded_odd_and_saturating():
    everything = " ".join(word for word, weight in LEXICON.items() if weight > 0)
    assert 0.98 < reward(everything) < 1
    assert -1 < reward(" ".join(word for word, weight in LEXICON.items() if weight < 0)) < -0.98
    assert reward("superb " * 50) == reward("superb")
    assert reward("superb gripping wonderful brilliant") < 2 * reward("superb gripping")


def test_grammar_is_deterministic_varied_and_of_the_stated_length():
    texts = [sample_text(random.Random(seed)) for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    rng = random.Random(0)
    drawn = [sample_text(rng) for _ in range(4000)]
    assert len(set(drawn)) > 3900
    lengths = sorted(len(text.split()) for text in drawn)
    assert lengths[40] >= 12
    assert lengths[-41] <= 34
    assert all(re.fullmatch(r"[A-Z].*\.", text) and "{" not in text for text in drawn)


def test_grammar_covers_praise_blame_and_both_and_uses_the_whole_lexicon():
    rng = random.Random(0)
    drawn = [sample_text(rng) for _ in range(4000)]
    rewards = [reward(text) for text in drawn]
    assert abs(sum(rewards) / len(rewards)) < 0.03  # standard error 0.007
    assert 0.35 < sum(r > 0.1 for r in rewards) / len(rewards) < 0.48
    assert 0.35 < sum(r < -0.1 for r in rewards) / len(rewards) < 0.48
    both = [t for t in drawn if {weight > 0 for weight in explain(t).values()} == {True, False}]
    assert len(both) > 400
    assert set(LEXICON) <= {word for text in drawn for word in re.findall(r"[a-z]+", text.lower())}
    assert "no matter" not in " ".join(drawn)


def test_distinct_texts_repeat_nothing():
    texts = list(islice(distinct_texts(random.Random(3)), 2000))
    assert len(set(texts)) == 2000


def test_prompts_are_distinct_short_and_split_without_overlap():
    texts = sft, train, held_out = world.make_texts(sft=500, train_prompts=200, held_out_prompts=80, seed=0)
    assert [len(sft), len(train), len(held_out)] == [500, 200, 80]
    assert len({*train, *held_out}) == 280
    assert {len(prompt.split()) for prompt in train} == {3, 4, 5, 6}
    assert texts == world.make_texts(500, 200, 80, seed=0) != world.make_texts(500, 200, 80, seed=1)


def test_more_prompts_than_the_grammar_has_are_refused(monkeypatch):
    monkeypatch.setattr(world, "PREFIX_WORDS", (1, 1))
    with pytest.raises(UserError, match="no 100 distinct prompts"):
        world.make_texts(sft=1, train_prompts=60, held_out_prompts=40, seed=0)


@pytest.fixture(scope="module")
def tokenizer():
    return world.build_tokenizer(world.make_texts(1500, 1, 1, seed=0)[0])


@pytest.mark.parametrize("text", ["The plot was good.", " leading", "é 日本 🙂", "<|endoftext|>", "a\n\tb  c "])
def test_tokenizer_round_trips_any_text_also_from_its_folder(tokenizer, tmp_path, text):
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        ids = each(text, add_special_tokens=True, split_special_tokens=True)["input_ids"]
        assert each.eos_token_id not in ids
        assert each.decode(ids) == text
        assert [each.eos_token, each.pad_token, each.bos_token] == ["<|endoftext|>", "<|endoftext|>", None]


def test_tokenizer_knows_the_worlds_words(tokenizer):
    assert len(tokenizer) == 768
    text = "My sister watched Silver Harbour last night. The acting was truly superb, but the plot was dull."
    assert len(tokenizer(text)["input_ids"]) <= 24  # 18 words and 3 marks
    prompt, rest = "My sister watched", " Silver Harbour last night."
    joined = tokenizer(prompt)["input_ids"] + tokenizer(rest)["input_ids"]
    assert joined == tokenizer(prompt + rest)["input_ids"]


def test_model_is_seeded_small_and_leaves_the_random_state(tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again, other = (world.build_model(tokenizer, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert 3e5 < sum(parameter.numel() for parameter in first.parameters()) < 1e6
    weight = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])


def test_samples_are_ranked_by_reward_and_unfinished_ones_left_out(tokenizer):
    model = world.build_model(tokenizer, seed=0)
    eos = tokenizer.eos_token_id
    ends = torch.nn.functional.one_hot(torch.tensor(eos), len(tokenizer))
    model.lm_head.bias = torch.nn.Parameter(ends * math.log(100.0))  # about every ninth token ends the text
    prompts = ["We saw it", "My sister loved the"]
    sampling = Sampling(max_new_tokens=8, num_samples=30, batch_size=60)
    raw = sample_ids(model, tokenizer(prompts)["input_ids"], sampling, eos)
    finished = [[ids for ids in samples if ids[-1] == eos and len(ids) > 1] for samples in raw]
    ranked = world.rank_samples(model, tokenizer, prompts, sampling)
    assert [len(completions) for _, completions in ranked] == [len(samples) for samples in finished]
    assert 15 < sum(map(len, finished)) < 45
    assert any(len(ids) == 1 for samples in raw for ids in samples)  # an end token alone is no response
    for (prompt, completions), samples in zip(ranked, finished, strict=True):
        values = [value for value, _ in completions]
        assert values == sorted(values, reverse=True)
        assert values == [reward(prompt + text) for _, text in completions]
        assert sorted(text for _, text in completions) == sorted(tokenizer.decode(ids[:-1]) for ids in samples)


RANKED = [
    ("p", [(0.9, " a"), (0.5, " b"), (0.48, " c"), (0.1, " d")]),
    ("q", [(0.2, " e"), (0.2, " f")]),
    ("r", [(0.3, " g")]),
]


def test_a_prompt_without_a_finished_completion_gives_none(tokenizer):
    model = world.build_model(tokenizer, seed=0)
    sampling = Sampling(max_new_tokens=2, num_samples=2, seed=0)
    assert world.rank_samples(model, tokenizer, ["We saw it"], sampling) == [("We saw it", [])]


def test_every_pair_is_ordered_and_closer_ones_are_ties():
    pairs = world.every_pair(RANKED, margin=0.05)
    assert [(pair["chosen"], pair["rejected"]) for pair in pairs] == [
        (" a", " b"), (" a", " c"), (" a", " d"), (" b", " d"), (" c", " d")
    ]  # fmt: skip
    assert all(pair["chosen_reward"] - pair["rejected_reward"] >= 0.05 for pair in pairs)


def test_extreme_pairs_are_one_a_prompt():
    assert world.extreme_pairs(RANKED, margin=0.05) == [
        {"prompt": "p", "chosen": " a", "rejected": " d", "chosen_reward": 0.9, "rejected_reward": 0.1}
    ]


def test_a_margin_must_be_positive():
    with pytest.raises(UserError, match="--min_margin must be positive, got 0"):
        world.every_pair(RANKED, margin=0.0)


def test_claim_replaces_only_what_the_demo_wrote(tmp_path):
    folder = claim(tmp_path / "new")
    (folder / "sft").mkdir()
    (folder / "sft" / "model.safetensors").write_text("old")
    (folder / "prompts.jsonl").write_text("old")
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("keep")
    claim(folder)
    assert sorted(path.name for path in folder.iterdir()) == [MARK, "mine"]
    assert (folder / "mine" / "notes.txt").read_text() == "keep"


def test_claim_does_not_follow_links(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("keep")
    folder = claim(tmp_path / "demo")
    (folder / "sft").symlink_to(elsewhere)
    claim(folder)
    assert (elsewhere / "precious").read_text() == "keep"
    assert not (folder / "sft").exists()


def test_claim_refuses_a_folder_of_anybody_else(tmp_path):
    (tmp_path / "thesis.tex").write_text("keep")
    with pytest.raises(UserError, match=f"{tmp_path}: holds files that the demo did not write"):
        claim(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="cannot be written"):
        claim(tmp_path / "thesis.tex")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"samples_per_prompt": 1}, "--samples_per_prompt must be at least 2"), ({"steps": 0}, "--steps must be"),
     ({"min_margin": 0.0}, "--min_margin must be positive, got 0"), ({"beta": -1.0}, "tdpo2: beta must be"),
     ({"alpha": float("nan")}, "tdpo2: alpha must be")],
)  # fmt: skip
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(UserError, match=message):
        DemoOptions(**wrong)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """One run of seconds: everything is there, nothing is learnt well."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    options = DemoOptions(
        output_dir=str(folder), sft_texts=400, sft_steps=60, train_prompts=24, held_out_prompts=8, steps=4,
        eval_every=2, batch_size=8, learning_rate=5e-4, max_new_tokens=40,
    )  # fmt: skip
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        rows = run_demo(options)
    return rows, folder, printed.getvalue()


def test_run_measures_every_objective_from_one_sft_model(tiny):
    rows, folder, _ = tiny
    steps = [(row["objective"], row["step"]) for row in rows]
    assert steps == [("sft", 0), *((name, step) for name in ("dpo", "tdpo1", "tdpo2") for step in (2, 4))]
    assert {row["seed"] for row in rows[1:]} == {0}
    assert [rows[0]["kl"], rows[0]["kl_reference_policy"]] == [0.0, 0.0]
    assert all(row["kl"] > 0 and row["kl_chosen"] > 0 for row in rows[1:])
    start = load_file(folder / "sft" / "model.safetensors")
    for path in (folder / "frontier" / "runs").iterdir():
        trained = load_file(path / "model" / "model.safetensors")
        assert trained.keys() == start.keys()
        assert any(not torch.equal(trained[key], start[key]) for key in start)


def test_run_leaves_models_pairs_figures_and_plot(tiny):
    rows, folder, _ = tiny
    assert {path.name for path in folder.iterdir()} == {*ENTRIES, MARK}
    assert {"frontier.csv", "frontier.png", "frontier.svg"} <= {path.name for path in (folder / "frontier").iterdir()}
    for row in (row for row in rows if row["step"] == 4):
        (path,) = (folder / "frontier" / "runs").glob(f"{row['objective']}*/samples.jsonl")
        samples = [json.loads(line) for line in path.read_text().splitlines()]
        assert len(samples) == 8
        assert all(sample["reward"] == reward(sample["prompt"] + sample["response"]) for sample in samples)
        assert row["reward"] == pytest.approx(sum(sample["reward"] for sample in samples) / 8)


def test_run_pairs_are_ordered_by_the_reward_and_split_by_prompt(tiny):
    _, folder, _ = tiny
    train, test = ([row.fields for row in read_source(str(folder / "pairs"), split)] for split in ("train", "test"))
    assert train and test
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    for row in train + test:
        assert row["chosen_reward"] == reward(row["prompt"] + row["chosen"])
        assert row["rejected_reward"] == reward(row["prompt"] + row["rejected"])
        assert row["chosen_reward"] - row["rejected_reward"] >= 0.05


def test_run_models_load_as_ordinary_folders(tiny):
    _, folder, _ = tiny
    for path in (folder / "base", folder / "sft", *folder.glob("frontier/runs/*/model")):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
        assert model.config.vocab_size == len(tokenizer) == 768


def test_run_prints_its_commands_and_what_to_try_next(tiny):
    _, folder, text = tiny
    assert f"$ tdpo sft --model_name_or_path {folder}/base --dataset_name {folder}/sft.jsonl" in text
    assert f"$ tdpo frontier --model_name_or_path {folder}/sft" in text
    (model,) = folder.glob("frontier/runs/tdpo2*/model")
    assert f"tdpo eval --model_name_or_path {model} --ref_model_name_or_path {folder}/sft" in text
    assert "measuring took" in text
