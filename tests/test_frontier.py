"""Frontiers: Pareto fronts, intervals over seeds and rewards at equal KL by hand; tables and figures of them."""

from __future__ import annotations

import io
import math
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from runs import environment
from scipy import stats

from tdpo import UserError
from tdpo.evaluate.frontier import Frontier, Mean, pareto, read_rows, reward_at, write_rows
from tdpo.report.frontier import STYLES, frontier_figure, last_table, report_frontier, save_figure, style_of


def row(objective: str, seed: object, step: int, kl: float, reward: float, **more: object) -> dict[str, object]:
    values = {"objective": objective, "beta": 0.1, "alpha": "", "learning_rate": 1e-4, "seed": seed, "step": step}
    return {**values, "reward": reward, "reward_se": 0.01, "kl": kl, "kl_se": 0.1, **more}


SFT = {**row("sft", "", 0, 0.0, 0.0), "beta": "", "learning_rate": ""}
ROWS = [
    SFT,
    row("dpo", 0, 2, 2.0, 0.2, kl_chosen=1.0, kl_rejected=2.0),
    row("dpo", 0, 4, 6.0, 0.4, kl_chosen=3.0, kl_rejected=5.0),
    row("dpo", 1, 2, 4.0, 0.4, kl_chosen=2.0, kl_rejected=4.0),
    row("dpo", 1, 4, 8.0, 0.6, kl_chosen=5.0, kl_rejected=7.0),
    row("tdpo2", 0, 2, 1.0, 0.3, alpha=0.5, kl_chosen=0.5, kl_rejected=0.7),
    row("tdpo2", 0, 4, 4.0, 0.2, alpha=0.5, kl_chosen=0.6, kl_rejected=0.8),
    row("tdpo2", 1, 2, 1.0, 0.5, alpha=0.5, kl_chosen=0.5, kl_rejected=0.9),
    row("tdpo2", 1, 4, 5.0, 0.6, alpha=0.5, kl_chosen=0.6, kl_rejected=1.0),
]  # fmt: skip


def test_pareto_by_hand():
    points = [(1.0, 0.2), (1.0, 0.3), (2.0, 0.3), (3.0, 0.1), (4.0, 0.5), (4.0, 0.5), (0.0, 0.0)]
    assert pareto(points) == [(0.0, 0.0), (1.0, 0.3), (4.0, 0.5)]
    assert pareto([]) == []


def test_the_front_is_what_no_other_point_beats():
    rng = np.random.default_rng(0)
    points = [tuple(pair) for pair in rng.random((60, 2)).round(1)]
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]}
    assert pareto(points) == sorted(set(points) - beaten)


def test_interpolation_by_hand():
    front = np.array([[0.0, 0.0], [2.0, 0.4], [6.0, 0.6]])
    assert [reward_at(front, kl) for kl in (0, 1, 2, 5, 6, 9)] == pytest.approx([0, 0.2, 0.4, 0.55, 0.6, 0.6])
    assert math.isnan(reward_at(front[1:], 1.0))


def test_intervals_over_seeds_are_students():
    values = [0.1, 0.4, 0.3, 0.6]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    found = Mean.of(values)
    assert (found.mean - found.half, found.mean + found.half) == (pytest.approx(low), pytest.approx(high))
    assert Mean.of([0.5]) == (0.5, None, 1)
    assert f"{Mean.of([0.5]):+.2f}" == "+0.50"


def test_points_fronts_and_rewards_at_equal_kl():
    frontier = Frontier.of(ROWS)
    dpo, tdpo2 = frontier.curves
    assert frontier.sft == (0.0, 0.0)
    assert [(p.step, p.kl.mean, p.reward.mean) for p in dpo.points] == [(2, 3.0, pytest.approx(0.3)), (4, 7.0, 0.5)]
    assert dpo.points[0].kl.half == pytest.approx(stats.t.ppf(0.975, 1) * 1.0)
    assert [p.step for p in tdpo2.front] == [2]  # step 4: KL 4.5, reward 0.4 again
    assert dpo.at(3.0) == {0: pytest.approx(0.25), 1: pytest.approx(0.3)}
    assert tdpo2.at(3.0) == {0: pytest.approx(0.3), 1: pytest.approx(0.55)}
    assert tdpo2.at(4.5) == {1: pytest.approx(0.5875)}  # seed 0 never came so far
    assert tdpo2.differences(dpo, 3.0) == [pytest.approx(0.05), pytest.approx(0.25)]
    assert frontier.levels() == [1.0, 2.0, 3.0, 4.0]


def test_runs_that_differ_in_a_further_option_are_no_seeds_of_each_other():
    rows = [SFT, *(row("dpo", 0, 2, kl, 0.2, options=text) for kl, text in ((2.0, "warmup_steps=1"), (3.0, "x=2")))]
    (curve,) = Frontier.of(rows).curves
    assert [(point.kl.mean, point.kl.seeds) for point in curve.points] == [(2.0, 1), (3.0, 1)]
    table = last_table(rows)
    assert list(table.columns[0].cells) == ["SFT", "DPO warmup_steps=1", "DPO x=2"]


def test_one_seed_has_the_interval_of_its_prompts():
    (dpo,) = Frontier.of([row for row in ROWS if row["seed"] == 0 and row["objective"] == "dpo"]).curves
    assert dpo.points[0].reward.half == pytest.approx(1.959964 * 0.01)
    assert list(dpo.at(6.0)) == [0]
    assert dpo.at(6.1) == {}


def test_labels_name_curves_and_what_is_not_finite_is_left_out():
    rows = [*ROWS, row("dpo", 0, 2, 1.0, 0.1, label="weighted"), row("dpo", 1, 2, math.nan, 0.1, label="weighted")]
    frontier = Frontier.of(rows)
    assert [curve.name for curve in frontier.curves] == ["dpo", "tdpo2", "weighted"]
    assert frontier.diverged == ["weighted seed 1 step 2"]
    assert len(frontier.curves[2].points) == 1
    with pytest.raises(UserError, match="--baseline ppo: there are dpo, tdpo2, weighted"):
        frontier.curve("ppo")
    assert frontier.curve(None).name == "dpo"


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "frontier.csv"
    write_rows(path, [{**SFT, "reward": 0.1 + 0.2}, *ROWS[1:]])
    assert path.read_text().startswith(
        "objective,beta,alpha,learning_rate,seed,step,reward,reward_se,kl,kl_se,entropy,length,"
    )
    found = read_rows(path)
    assert found[0]["reward"] == 0.1 + 0.2
    assert (found[0]["seed"], found[0]["kl_chosen"], found[1]["seed"], found[5]["alpha"]) == ("", "", 0, 0.5)
    before = path.read_bytes()
    write_rows(path, found)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("text", "message"), [("a,b\n1,2\n", "no column 'objective'"), ("", "no rows")])
def test_another_table_is_refused(tmp_path, text, message):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / "x.csv")


def test_tables_and_figures(tmp_path):
    console = Console(width=100, record=True, file=io.StringIO(), markup=False, highlight=False)
    report_frontier(ROWS, tmp_path, console, baseline="dpo", equal_kl=[3.0, 4.5, 9.0])
    lines = console.export_text().splitlines()
    (dpo,) = (line for line in lines if "DPO" in line and "0.275" in line)
    assert dpo.split() == ["DPO", "0.275", "±0.318", "0.375", "±0.635", "-"]
    (gain,) = (line for line in lines if "minus DPO" in line)
    assert "+0.150 ±1.271" in gain
    assert max(map(len, lines)) <= 100
    picture = imread(tmp_path / "frontier.png")
    assert picture.shape[:2] == (720, 1600)
    assert picture[..., :3].mean() > 0.9  # light
    assert "KL(policy || reference)" in (tmp_path / "frontier.svg").read_text()


def test_what_is_drawn_is_what_was_measured():
    left, right = frontier_figure(ROWS).axes
    fronts = [list(zip(*line.get_data(), strict=True)) for line in left.lines if line.get_linestyle() == "-"]
    assert fronts == [[(0, 0), (3, pytest.approx(0.3)), (7, 0.5)], [(0, 0), (1, pytest.approx(0.4))]]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["SFT", "DPO", "TDPO2"]
    assert left.get_xlabel() == "KL(policy || reference) along samples, nats per response"
    assert right.get_ylabel() == "KL(reference || policy), nats per response"
    assert [list(line.get_ydata()) for line in right.lines] == [
        [0, 1.5, 4.0], [0, 3.0, 6.0], [0, 0.5, pytest.approx(0.6)], [0, pytest.approx(0.8), pytest.approx(0.9)],
    ]  # fmt: skip
    several = frontier_figure([*ROWS, {**row("dpo", 0, 2, 1.0, 0.1, kl_chosen=1.0, kl_rejected=1.0), "beta": 0.5}])
    assert len(several.axes) == 1  # no single curve over steps


DRAW = """
import sys
from pathlib import Path
from test_frontier import ROWS
from tdpo.report.frontier import frontier_figure, save_figure
for name in ("a.png", "a.svg"):
    save_figure(frontier_figure(ROWS), Path(sys.argv[1]) / name)
"""


def test_equal_rows_give_equal_bytes_in_another_process(tmp_path):
    for name in ("a.png", "a.svg"):
        save_figure(frontier_figure(ROWS), tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in ("a.png", "a.svg")}
    here = __file__.rpartition("/")[0]
    subprocess.run([sys.executable, "-c", DRAW, tmp_path], check=True, env=environment(PYTHONPATH=here))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_styles_are_distinct():
    assert len(set(STYLES.values())) == len(STYLES)
    names = ["dpo", "tdpo1", "tdpo2", "ppo", "rloo", "a", "b", "c", "d", "e"]
    assert len({style_of(name, index) for index, name in enumerate(names)}) == 10
