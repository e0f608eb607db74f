"""The experiments: what decides their claims, README tables against result files, and the pipeline on a small world."""

from __future__ import annotations

import csv
import importlib.util
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import REPOSITORY

from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.frontier import read_rows

EXPERIMENTS = REPOSITORY / "experiments"


def load(path: Path, name: str):
    """Imports a script of the experiments."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(EXPERIMENTS))
claims = load(EXPERIMENTS / "claims.py", "claims")
sentiment = load(EXPERIMENTS / "sentiment.py", "sentiment")


def row(curve, seed, step, kl, reward, **columns):
    return {"objective": curve, "label": curve, "seed": seed, "step": step, "kl": kl, "reward": reward} | columns


START = row("sft", "", 0, 0.0, 0.4, entropy=4.0, learning_rate="")
ROWS = [
    START,
    # At KL k the reward of "a" is 0.4 + 0.1 k on seed 0 and 0.4 + 0.2 k on seed 1; of "b" it is 0.4 + 0.05 k.
    *(row("a", seed, 1, 2.0, 0.6 + 0.2 * seed, entropy=3.0, kl_rejected=5.0 + seed) for seed in (0, 1)),
    *(row("b", seed, 1, 4.0, 0.6, entropy=2.0, kl_rejected=1.0) for seed in (0, 1)),
]


def test_rewards_are_compared_over_the_kl_that_both_reach():
    found = claims.reward_at_equal_kl(ROWS, "a", "b")
    # Levels 0.2, 0.4, ..., 2.0 have mean 1.1; the differences are 0.05 and 0.15 a nat.
    assert (found.low, found.high) == (0.0, 2.0)
    expected = Estimate.over_seeds([0.05 * 1.1, 0.15 * 1.1])
    assert found.difference.mean == pytest.approx(expected.mean) and found.difference.low == pytest.approx(expected.low)
    back = claims.reward_at_equal_kl(ROWS, "b", "a")
    assert back.difference.mean == pytest.approx(-expected.mean)


def test_columns_are_compared_over_the_rewards_that_both_reach():
    found = claims.at_equal_reward(ROWS, "a", "b", "entropy")
    assert (found.low, found.high) == pytest.approx((0.4, 0.6))
    # Entropy falls by 5 (a, seed 0), 2.5 (a, seed 1) and 10 (b) per unit of reward; levels have mean 0.11 above 0.4.
    assert found.difference.mean == pytest.approx(0.11 * np.mean([10 - 5, 10 - 2.5]))


def test_last_measurements_are_paired_by_seed():
    early = row("a", 0, 0, 0.0, 0.0, kl_rejected=100.0)
    found = claims.at_the_end([early, *ROWS], "a", "b", "kl_rejected")
    assert found.difference == Estimate.over_seeds([4.0, 5.0])


def test_the_best_learning_rate_has_the_largest_reward_up_to_the_limit():
    rows = [
        START,
        row("a", 0, 1, 2.0, 0.6, learning_rate=1e-4),  # up to 6 nats: a third on the way, then 0.6
        row("a", 0, 1, 12.0, 0.8, learning_rate=1e-3),  # 0.6 at 6 nats
    ]
    found = claims.mean_reward(rows, 6.0)
    assert found["a", 1e-4] == pytest.approx(0.4 + 0.2 * (2 / 3 + 1 / 6), abs=1e-3)
    assert found["a", 1e-3] == pytest.approx(0.5, abs=1e-3)
    assert claims.best_learning_rates(rows, 6.0) == {"a": 1e-4}
    assert claims.best_learning_rates(rows, 60.0) == {"a": 1e-3}


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([(1.0, 1.1), (2.0, 2.1)], "reproduced"),
        ([(1.0, 1.1), (-2.0, 2.1)], "not decidable at this scale"),
        ([(1.0, 1.1), (-2.0, -2.1)], "not reproduced"),
        ([(1.0, 1.1), None], "not decidable at this scale"),
    ],
)
def test_verdicts(differences, expected):
    found = [None if values is None else Estimate.over_seeds(values) for values in differences]
    assert claims.verdict([claims.Comparison("", difference) for difference in found]) == expected


def test_reviews_are_cut_into_windows_and_prefixes():
    text = " ".join(map(str, range(10)))
    assert list(sentiment.windows([(text, 1)], 4)) == [
        ("0 1 2 3", 1),
        ("4 5 6 7", 1),
    ]  # a rest of half a window or less
    assert list(sentiment.windows([("a b", 0)], 4)) == [("a b", 0)]
    found = sentiment.prefixes([text, text, "x y z"] * 50, 4, (2, 3), seed=0)
    assert sorted(found) == ["0 1", "0 1 2", "x y", "x y z"]


def test_one_pair_of_every_prompt_is_kept():
    rows = [{"prompt": prompt, "number": number} for prompt in "abc" for number in range(6)]
    kept = sentiment.one_per_prompt(rows, seed=0)
    assert [row["prompt"] for row in kept] == ["a", "b", "c"]
    assert len({sentiment.one_per_prompt(rows, seed)[0]["number"] for seed in range(50)}) == 6


RESULTS = [path.parent for path in sorted(EXPERIMENTS.glob("*/report.py")) if (path.parent / "results").exists()]


@pytest.mark.parametrize("folder", RESULTS, ids=lambda folder: folder.name)
def test_readme_is_what_its_result_files_give(folder):
    report = load(folder / "report.py", f"{folder.name}_report")
    assert report.render() == claims.inserted(folder / "README.md")


def test_the_readme_states_the_verdicts():
    report = load(EXPERIMENTS / "imdb" / "report.py", "imdb_report")
    decided = report.decide(read_rows(report.RESULTS / "sweep.csv"))
    text = " ".join((REPOSITORY / "README.md").read_text().split())
    difference = decided["B, DPO"][0].difference
    interval = f"({difference.mean:.3f}, interval {difference.low:.3f} to {difference.high:.3f}, over the "
    for words, name in (
        ("on chosen and rejected responses: ", "A, TDPO2 below DPO"),
        ("TDPO1 above DPO: ", "A, TDPO1 above DPO"),
        ("TDPO2 has more reward than DPO at equal KL(policy || reference): ", "B, DPO"),
        ("TDPO2 has more reward than RLOO and PPO at equal KL: ", "B, RLOO and PPO"),
        ("Samples of TDPO2 are more diverse than DPO's at equal reward: ", "D"),
    ):
        assert words + claims.verdict(decided[name]) in text
    assert f"{interval}{decided['B, DPO'][0].high:.2f} nats" in text
    stories = load(EXPERIMENTS / "stories" / "report.py", "stories_report")
    found = claims.reward_at_equal_kl(read_rows(stories.RESULTS / "sweep.csv"), "tdpo2", "dpo")
    low, high = found.difference.low, found.difference.high
    words = f"up to {found.high:.0f} nats: {claims.verdict([found])} ({found.difference.mean:.3f}, interval "
    assert f"{words}{low:.3f} to {high:.3f})" in text
    dialogues = load(EXPERIMENTS / "hh" / "report.py", "hh_report")
    decided = dialogues.decide(dialogues.read("test"))
    for words, name in (
        ("Accuracy on Anthropic HH (Table 1), TDPO2 > TDPO1 > DPO > f-DPO: ", "C, accuracy"),
        ("Entropy, TDPO2 > TDPO1 > f-DPO > DPO: ", "C, entropy"),
    ):
        assert words + claims.verdict(decided[name]) in text


def test_times_are_those_of_the_table_and_below_the_limit() -> None:
    text = (REPOSITORY / "experiments" / "README.md").read_text(encoding="utf-8")
    with (REPOSITORY / "experiments" / "time.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["experiment"] for row in rows} == {"imdb", "stories", "hh"}
    for row in rows:
        assert f"| {row['experiment']} | {row['minutes']} |" in text and int(row["minutes"]) <= 100


def test_the_sensitivity_table_of_the_documentation_is_that_of_its_result_file():
    report = load(EXPERIMENTS / "stories" / "report.py", "stories_report")
    assert report.render() == claims.inserted(REPOSITORY / "docs" / "choosing.md")
    assert len(report.cells()) == 45 and all(len(found) == 5 for found in report.cells().values())


def test_learning_rates_of_the_sweep_are_those_that_validation_chose():
    if not (EXPERIMENTS / "imdb" / "results" / "validation.csv").exists():
        pytest.skip("no results yet")
    limit = load(EXPERIMENTS / "imdb" / "report.py", "imdb_report").KL_LIMIT
    best = claims.best_learning_rates(read_rows(EXPERIMENTS / "imdb" / "results" / "validation.csv"), limit)
    sweep = yaml.safe_load((EXPERIMENTS / "imdb" / "sweep.yaml").read_text())
    for run in sweep["runs"]:
        label = str(run.get("label", run["objective"]))
        assert run["learning_rate"] == best[label.partition(" alpha")[0]], run


@pytest.mark.slow
def test_the_reviews_experiment_runs_from_reviews_to_readme(tmp_path, model_folder):
    """Its own scripts and configurations, in a copy with few steps, on made-up reviews."""
    rng = random.Random(0)
    words = {0: ["bad", "dull", "awful", "poor"], 1: ["good", "fine", "great", "lovely"]}
    reviews = tmp_path / "reviews"
    reviews.mkdir()
    for split, count in (("train", 1200), ("test", 300)):
        rows = []
        for index in range(count):
            label = index // 2 % 2
            noise = [rng.choice(["the", "a", "river", "film", "garden"]) for _ in range(20)]
            text = " ".join(rng.sample([*noise, *rng.choices(words[label], k=10)], 30))
            rows.append(json.dumps({"text": text, "label": label}))
        (reviews / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    shutil.copytree(EXPERIMENTS, tmp_path / "experiments", ignore=shutil.ignore_patterns("work", "results"))
    here = tmp_path / "experiments" / "imdb"
    replace(
        here / "prepare.py",
        ('"train": 1000', '"train": 20'),
        ("256", "10"),
        ("MAX_NEW_TOKENS = 40", "MAX_NEW_TOKENS = 12"),
    )
    replace(here / "sft.yaml", ("max_steps: 200", "max_steps: 2"), ("warmup_steps: 20", "warmup_steps: 1"))
    replace(here / "contrast.yaml", ("max_steps: 40", "max_steps: 2"), ("warmup_steps: 5", "warmup_steps: 1"))
    for name in ("validation", "sweep"):
        path = here / f"{name}.yaml"
        options = yaml.safe_load(path.read_text())
        options |= {"max_steps": 2, "eval_steps": 1, "warmup_steps": 1, "max_new_tokens": 12}
        for run in options["runs"]:
            if "steps" in run:
                run |= {"steps": 2, "eval_every": 1, "batch_size": 4}
        path.write_text(yaml.safe_dump(options))
    run = [sys.executable, "experiments/imdb/prepare.py", "--reviews", str(reviews), "--base", str(model_folder)]
    frontier = [sys.executable, "-m", "tdpo", "frontier", "--config"]
    commands = [
        run,
        *(
            [*frontier, f"experiments/imdb/{name}.yaml", "--output_dir", f"experiments/imdb/work/{name}"]
            for name in ("validation", "sweep")
        ),
        [sys.executable, "experiments/imdb/collect.py"],
        [sys.executable, "experiments/imdb/report.py"],
    ]
    for command in commands:
        subprocess.run(command, cwd=tmp_path, check=True)
    report = load(here / "report.py", "copied_report")
    assert report.render() == claims.inserted(here / "README.md")
    assert (here / "frontier.png").exists() and (here / "results" / "samples.jsonl").exists()


def replace(path: Path, *changes: tuple[str, str]) -> None:
    """Replaces texts of a file, each of which must be in it."""
    text = path.read_text()
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
