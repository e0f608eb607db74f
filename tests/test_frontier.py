"""Frontiers by hand: fronts with ties, interpolation, Student's t, paired differences; files of equal bytes."""

from __future__ import annotations

import hashlib
import io
import math
import os
import subprocess
import sys

import matplotlib
import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console
from scipy import stats

from tdpo import UserError
from tdpo.evaluate.estimates import Estimate
from tdpo.evaluate.frontier import FIRST_COLUMNS, Frontier, SeedFront, pareto, read_rows, setting_names, write_rows
from tdpo.report.frontier import equal_kl_tables, frontier_figure, last_table, report_frontier
from tdpo.report.plots import SFT_STYLE, STYLES, save_figure, styles_of

EMPTY = {"beta": "", "alpha": "", "learning_rate": "", "seed": ""}
SFT_ROW = {"objective": "sft", **EMPTY, "step": 0, "reward": 0.0, "reward_se": 0.01, "kl": 0.0, "kl_se": 0.0}


def row(objective="dpo", seed=0, step=1, kl=1.0, reward=0.1, **more):
    errors = {"reward_se": 0.02, "kl_se": 0.1}
    setting = {"objective": objective, "beta": 0.1, "alpha": "", "learning_rate": 1e-4, "seed": seed, "step": step}
    return {**setting, "reward": reward, "kl": kl, **errors, **more}


def two_curves():
    """DPO and TDPO2 on three seeds; all fronts are lines from the SFT model over KL 1 to KL 2 (TDPO2: 4)."""
    rewards = {"dpo": [(0.1, 0.2), (0.2, 0.3), (0.3, 0.4)], "tdpo2": [(0.4, 0.6), (0.3, 0.7), (0.5, 0.8)]}
    return [SFT_ROW] + [
        row(objective, seed, step, kl, reward)
        for objective, last in (("dpo", 2.0), ("tdpo2", 4.0))
        for seed, pair in enumerate(rewards[objective])
        for step, kl, reward in ((1, 1.0, pair[0]), (2, last, pair[1]))
    ]


def text_of(*renderables, width=100):
    console = Console(width=width, record=True, markup=False, file=io.StringIO())
    console.print(*renderables)
    return console.export_text()


# --- analysis


def test_pareto_of_six_points_with_ties():
    points = [(2.0, 0.5), (1.0, 0.2), (2.0, 0.4), (3.0, 0.5), (1.0, 0.2), (0.0, 0.0)]
    # Equal KL: the larger reward; equal reward: the smaller KL; equal points: the first.
    assert pareto(points) == [5, 1, 0]
    assert pareto([(1.0, 0.1), (2.0, 0.0), (3.0, -1.0)]) == [0]
    assert pareto([]) == []


def test_reward_is_interpolated_along_the_front_and_none_outside_of_what_was_measured():
    rows = [SFT_ROW, row(step=1, kl=1.0, reward=0.2), row(step=2, kl=2.0, reward=0.1), row(step=3, kl=3.0, reward=0.6)]
    rows.append(row(step=4, kl=5.0, reward=0.4))
    (curve,) = Frontier.of(rows).curves
    front = curve.seeds[0]
    assert front.points.tolist() == [[0.0, 0.0], [1.0, 0.2], [3.0, 0.6]]
    found = {level: front.reward_at(level) for level in (0.0, 0.5, 2.0, 3.0, 4.0, 5.0, 5.001, -0.1)}
    expected = {0.0: 0.0, 0.5: 0.1, 2.0: 0.4, 3.0: 0.6, 4.0: 0.6, 5.0: 0.6, 5.001: None, -0.1: None}
    assert found == pytest.approx(expected)
    assert [(point.step, point.kl.mean) for point in curve.front] == [(1, 1.0), (3, 3.0)]
    assert (curve.best.step, curve.best.reward.mean) == (3, 0.6)
    (reordered,) = Frontier.of([*reversed(rows), row(step=5, kl=4.0, reward=0.6)]).curves
    assert {level: reordered.seeds[0].reward_at(level) for level in expected} == pytest.approx(expected)
    assert (reordered.best.step, reordered.best.kl.mean) == (3, 3.0)  # of two points with 0.6


def test_without_an_sft_row_a_front_begins_at_its_first_point():
    (curve,) = Frontier.of([row(step=1, kl=1.0, reward=0.2), row(step=2, kl=2.0, reward=0.3)]).curves
    assert [curve.seeds[0].reward_at(level) for level in (0.5, 1.5)] == [None, pytest.approx(0.25)]


def test_each_seed_starts_from_its_own_sft_row_or_from_their_mean():
    starts = [{**SFT_ROW, "seed": seed, "reward": reward} for seed, reward in ((0, 0.1), (1, 0.3))]
    (curve,) = Frontier.of([*starts, *(row(seed=seed, reward=0.9) for seed in (0, 1, 2))]).curves
    assert [curve.seeds[seed].reward_at(0.0) for seed in (0, 1, 2)] == pytest.approx([0.1, 0.3, 0.2])


def test_interval_over_seeds_is_students():
    values = [0.31, 0.28, 0.40, 0.35]
    found = Estimate.over_seeds(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.standard_error) == pytest.approx((np.mean(values), stats.sem(values)), rel=1e-12)
    assert (found.low, found.high, found.half) == pytest.approx((low, high, (high - low) / 2), rel=1e-10)
    one = Estimate.over_seeds([0.3])
    assert (one.mean, one.count) == (0.3, 1)
    assert all(map(math.isnan, (one.low, one.high, one.half, one.standard_error)))


def test_points_are_means_over_seeds_or_say_that_their_interval_is_over_prompts():
    rows = [row(seed=seed, kl=1.0 + seed, reward=0.1 * seed) for seed in (0, 1, 2)] + [row(seed=7, step=2, kl=6.0)]
    (curve,) = Frontier.of(rows).curves
    first, second = curve.points
    assert (first.interval, first.kl.mean, first.reward.count) == ("seeds", 2.0, 3)
    assert first.reward.half == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3))
    assert (second.interval, second.reward.mean, second.reward.standard_error) == ("prompts", 0.1, 0.02)
    assert (second.reward.low, second.kl.high) == pytest.approx((0.1 - 1.96 * 0.02, 6.0 + 1.96 * 0.1))


def test_differences_at_equal_kl_are_paired_by_seed():
    dpo, tdpo2 = Frontier.of(two_curves()).curves
    assert dpo.reward_at(2.0).mean == pytest.approx(0.3)
    # At KL 2 the rewards of TDPO2 are a third of the way: 0.4 + 0.2 / 3, 0.3 + 0.4 / 3, 0.5 + 0.3 / 3.
    assert tdpo2.reward_at(2.0).mean == pytest.approx((1.2 + 0.9 / 3) / 3)
    pairs = [0.4 + 0.2 / 3 - 0.2, 0.3 + 0.4 / 3 - 0.3, 0.5 + 0.1 - 0.4]
    found, (low, high) = tdpo2.difference(dpo, 2.0), stats.t.interval(0.95, 2, np.mean(pairs), stats.sem(pairs))
    assert (found.mean, found.low, found.high, found.count) == pytest.approx((np.mean(pairs), low, high, 3))
    assert dpo.reward_at(2.5) is tdpo2.difference(dpo, 2.5) is dpo.difference(tdpo2, 2.5) is None
    assert tdpo2.reward_at(2.5) is not None


def test_differences_are_of_the_seeds_both_have():
    rows = [SFT_ROW, *(row("dpo", seed, reward=0.1 * seed) for seed in (0, 1, 2)), row("ipo", 2, reward=0.5)]
    dpo, ipo = Frontier.of(rows).curves
    found = ipo.difference(dpo, 1.0)
    assert (found.mean, found.count) == (pytest.approx(0.3), 1)
    assert math.isnan(found.half)
    rows[-1]["seed"] = 3
    assert Frontier.of(rows).curves[1].difference(dpo, 1.0) is None


def test_a_level_that_one_seed_does_not_reach_has_no_mean():
    rows = [SFT_ROW, row(seed=0, kl=1.0), row(seed=1, kl=3.0)]
    frontier = Frontier.of(rows)
    assert frontier.curves[0].reward_at(2.0) is None
    assert frontier.levels(4) == [0.25, 0.5, 0.75, 1.0]


def test_levels_are_inside_the_range_that_all_reach_with_steps_of_two_digits():
    assert Frontier.of(two_curves()).levels(4) == [0.5, 1.0, 1.5, 2.0]
    odd = [SFT_ROW, row(kl=1.4237), row("ipo", kl=9.0)]
    assert Frontier.of(odd).levels(5) == [0.28, 0.56, 0.84, 1.12, 1.4]
    assert Frontier.of(odd[1:]).levels(4) == []  # from KL 9 on alone, and up to 1.4237 alone
    tenths = Frontier.of([SFT_ROW, row(kl=0.3)])
    assert tenths.levels(3) == [0.1, 0.2, 0.3]
    assert tenths.curves[0].reward_at(0.3).mean == pytest.approx(0.1)


def test_labels_name_curves_and_the_baseline_is_the_first():
    rows = [SFT_ROW, row("dpo"), row("dpo", label="weighted", kl=2.0), row("tdpo2", alpha=0.5)]
    assert [curve.name for curve in Frontier.of(rows).curves] == ["dpo", "weighted", "tdpo2"]
    assert [curve.name for curve in Frontier.of(rows, "tdpo2").curves] == ["tdpo2", "dpo", "weighted"]
    with pytest.raises(UserError, match=r"--baseline tdpo: there are dpo, weighted, tdpo2. Did you mean 'tdpo2'"):
        Frontier.of(rows, "tdpo")


def test_text_and_parameters_tell_settings_apart_and_measurements_do_not():
    rows = [row(seed=0, token_weights="decay:0.9", distinct_1=0.5), row(seed=0, token_weights="", distinct_1=0.6)]
    rows += [row(seed=1, penalty=5.0, token_weights="", distinct_1=0.7)]
    assert setting_names(rows) == ["beta", "alpha", "learning_rate", "penalty", "token_weights"]
    (curve,) = Frontier.of(rows).curves
    assert [point.settings.get("token_weights") for point in curve.points] == ["decay:0.9", None, None]
    twice = [row(seed=3), row(seed=3, kl=2.0, batch=64)]
    with pytest.raises(UserError, match=r"2 rows of 'dpo' have seed 3, beta 0.1, learning_rate 0.0001, step 1: give"):
        Frontier.of(twice)


def test_rows_that_are_not_finite_are_left_out_and_counted_by_run():
    rows = two_curves() + [
        row("ppo", 1, step, kl=kl, reward=0.1) for step, kl in ((1, 1.0), (2, math.nan), (3, math.inf))
    ]
    rows += [row("ppo", 2, 1, reward="", kl=2.0)]
    frontier = Frontier.of(rows)
    assert frontier.left_out == {
        "ppo beta 0.1 learning_rate 0.0001 seed 1": 2,
        "ppo beta 0.1 learning_rate 0.0001 seed 2": 1,
    }
    assert {seed: front.largest for seed, front in frontier.curves[2].seeds.items()} == {1: 1.0}
    with pytest.raises(UserError, match="--baseline ipo: no measurement of it is finite"):
        Frontier.of([*rows, row("ipo", kl=math.nan)], "ipo")


# --- files


def test_rows_survive_the_file_to_the_byte(tmp_path):
    path = tmp_path / "frontier.csv"
    rows = [
        {**SFT_ROW, "label": "sft", "entropy": 0.1},
        row(kl=0.1 + 0.2, reward=-1e-17, label="007", accuracy=1 / 3, pairs=7),
        row(kl=math.nan, reward=math.inf, label='a "b", c\nd', token_weights="decay:0.9", accuracy=None),
    ]
    write_rows(path, rows)
    lines, found = path.read_text().splitlines(), read_rows(path)
    names = [*FIRST_COLUMNS, "label", "accuracy", "pairs", "token_weights"]
    assert ",".join(FIRST_COLUMNS[6:]) == "reward,reward_se,kl,kl_se,entropy,length"
    assert lines[0] == ",".join(names)
    assert lines[2] == "dpo,0.1,,0.0001,0,1,-1e-17,0.02,0.30000000000000004,0.1,,,007,0.3333333333333333,7,"
    assert [list(row) for row in found] == [names] * 3
    assert {name: found[1][name] for name in rows[1]} == rows[1]
    assert found[0]["seed"] == found[1]["alpha"] == found[2]["accuracy"] == ""
    assert (found[0]["entropy"], found[2]["label"], found[2]["reward"]) == (0.1, rows[2]["label"], math.inf)
    assert [type(found[1][name]) for name in ("seed", "step", "kl", "label")] == [int, int, float, str]
    before = path.read_bytes()
    write_rows(path, found)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a table of a sweep: there is no column 'objective'"),
        ("objective,seed,step,reward\n", "there is no column 'kl'"),
        ("objective,seed,step,reward,kl\ndpo,0,1,0.5\n", "row 1: 4 cells; the first line names 5 columns"),
        ("objective,seed,step,reward,kl\ndpo,0,1,0.5,1\n,0,1,0.5,1\n", "row 2: `objective` is empty"),
        ("objective,seed,step,reward,kl\ndpo,0,1,high,1\n", "row 1: `reward` is 'high', not a number"),
    ],
)
def test_what_is_not_a_table_of_a_sweep_is_refused(tmp_path, text, message):
    path = tmp_path / "rows.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_rows(path)
    with pytest.raises(UserError, match=r"missing\.csv: cannot be read: No such file"):
        read_rows(tmp_path / "missing.csv")


# --- report


def test_table_of_rewards_at_equal_kl():
    frontier = Frontier.of(two_curves())
    (table,) = equal_kl_tables(frontier, [1.0, 2.0, 3.0])
    text = text_of(table)
    half = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    assert [line.split() for line in text.splitlines() if line.startswith("DPO")] == [
        ["DPO", "0.200", f"±{half:.3f}", "0.300", f"±{half:.3f}", "-", "0.300", f"±{half:.3f}"]
    ]
    lines = text.splitlines()
    (index,) = [i for i, line in enumerate(lines) if line.startswith("TDPO2")]
    assert lines[index].split()[:2] == ["TDPO2", "0.400"]
    assert lines[index + 1].split()[0] == "+0.200"  # 0.3, 0.1, 0.2
    assert lines[index + 1].split()[2] == "+0.200"  # 0.2667, 0.1333, 0.2
    assert lines[index + 1].split()[4] == "-"
    assert "second line: minus DPO, paired by seed" in " ".join(text.split())
    assert "a seed does not reach this KL" in " ".join(text.split())


def test_tables_fit_100_columns_with_nine_curves_and_twelve_levels():
    names = ["dpo", "tdpo1", "tdpo2", "a label that is long enough to be folded", *(f"run {n}" for n in range(5))]
    extra = {"entropy": 1.0, "distinct_2": 0.5, "length": 40.0, "accuracy": 0.8, "kl_chosen": 10.0, "kl_rejected": 12.0}
    rows = [SFT_ROW] + [
        row("dpo", seed, kl=10.0 + seed, reward=-1.5 * seed, label=name, learning_rate=rate, **extra)
        for name in names
        for seed in (0, 1)
        for rate in (1e-4, 2e-4)
    ]
    tables = equal_kl_tables(Frontier.of(rows), [level / 2 for level in range(12)])
    assert len(tables) == 3
    wide = text_of(*tables, last_table(rows), width=300).splitlines()
    assert max(len(line.rstrip()) for line in wide) <= 100
    assert sum("KL 5.5" in line for line in wide) == 1


def test_last_measurements_are_averaged_over_the_seeds_that_have_them():
    rows = [row(seed=seed, step=step, reward=seed + step) for seed in (0, 1) for step in (1, 2)]
    rows += [row(seed=2, step=1), row("ipo", 0, 2, reward=0.5)]
    lines = text_of(last_table(rows)).splitlines()
    (dpo,) = [i for i, line in enumerate(lines) if line.startswith("DPO")]
    assert lines[dpo].split() == ["DPO", "2.500", "1.00"]
    assert lines[dpo + 1].split() == ["2", "of", "3", "seeds", f"±{stats.t.ppf(0.975, 1) * 0.5:.3f}", "±0.00"]
    (ipo,) = [i for i, line in enumerate(lines) if line.startswith("IPO")]
    assert lines[ipo].split() + lines[ipo + 1].split() == ["IPO", "0.500", "1.00", "±0.039", "±0.20"]
    note = " ".join(" ".join(lines).split())
    assert "Student's t over seeds; of one seed, 1.96 standard errors over prompts" in note


def test_figure_draws_fronts_intervals_and_dominated_points():
    rows = [*two_curves(), *(row("dpo", seed, 3, kl=3.0, reward=0.0) for seed in (0, 1, 2))]
    figure = frontier_figure(rows, baseline="tdpo2", reward_label="reward")
    (axes,) = figure.axes
    fronts = [line for line in axes.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 1]
    assert [list(line.get_xdata()) for line in fronts] == [[0.0, 1.0, 4.0], [0.0, 1.0, 2.0]]
    assert np.allclose([line.get_ydata() for line in fronts], [[0.0, 0.4, 0.7], [0.0, 0.2, 0.3]])
    light = [c for c in axes.containers if c.lines[0].get_alpha() == 0.25 and len(c.lines[0].get_xdata())]
    assert [list(c.lines[0].get_xdata()) for c in light] == [[3.0]]
    strong = [c for c in axes.containers if c.lines[0].get_alpha() is None and len(c.lines[0].get_xdata()) == 2]
    half = stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3)
    bars = strong[1].lines[2][1].get_segments()  # reward of DPO: 0.1 apart over three seeds
    assert np.allclose([bar[:, 1] for bar in bars], [[0.2 - half, 0.2 + half], [0.3 - half, 0.3 + half]])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["TDPO2", "DPO", "SFT", "dominated"]
    assert (axes.get_ylabel(), axes.get_xscale()) == ("reward", "linear")
    assert axes.get_xlabel() == "KL(policy || reference) along samples, nats per response"


def test_axis_of_kl_is_logarithmic_beyond_two_decades():
    rows = [SFT_ROW, row(kl=0.05, reward=0.01), row(step=2, kl=5.0, reward=0.4)]
    assert frontier_figure(rows).axes[0].get_xscale() == "linear"  # exactly two
    rows.append(row(step=3, kl=5.1, reward=0.5))
    axes = frontier_figure(rows).axes[0]
    assert (axes.get_xscale(), axes.get_xlabel()[-11:]) == ("log", "(log scale)")
    assert [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == ":"] == [[0.0, 0.0]]  # SFT
    assert frontier_figure(rows, log_x=False).axes[0].get_xscale() == "linear"


def test_second_panel_shows_sequential_kl_of_single_settings():
    rows = [SFT_ROW] + [
        row(objective, seed, step, kl_chosen=1.0 * step + seed, kl_rejected=2.0 * step + seed)
        for objective in ("dpo", "tdpo2")
        for seed in (0, 1)
        for step in (5, 10)
    ]
    left, right = frontier_figure(rows).axes
    assert [list(line.get_xdata()) for line in right.lines] == [[0, 5, 10]] * 4
    assert [list(line.get_ydata()) for line in right.lines[:2]] == [[0.0, 10.5, 20.5], [0.0, 5.5, 10.5]]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["rejected", "chosen"]
    assert {line.get_color() for line in right.lines} <= {line.get_color() for line in left.lines}
    several = [*rows, row("dpo", beta=0.3, kl_chosen=1.0, kl_rejected=1.0)]
    assert len(frontier_figure(several).axes) == 1


def test_report_prints_tables_and_what_was_left_out_and_writes_both_files(tmp_path):
    console = Console(width=100, record=True, markup=False, file=io.StringIO())
    rows = [*two_curves(), row("ppo", 1, kl=1.0, label="[b]_x$"), row("ppo", 1, 2, kl=math.nan, label="[b]_x$")]
    report_frontier(rows, tmp_path, console, "tdpo2", [0.5])
    text = console.export_text()
    assert "Last measurement" in text and "KL 0.5" in text and "minus TDPO2" in text
    assert "not finite, left out of the comparison: [b]_x$ beta 0.1 learning_rate 0.0001 seed 1, 1 measurement" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["frontier.png", "frontier.svg"]
    picture = imread(tmp_path / "frontier.png")[..., :3]
    assert picture.shape == (720, 1200, 3)
    assert all(edge.min() == 1.0 for edge in (picture[:5], picture[-5:], picture[:, :5], picture[:, -5:]))
    assert b"<text" not in (tmp_path / "frontier.svg").read_bytes()  # glyphs are paths: no font is needed to see them


def test_a_sweep_without_a_finite_measurement_is_reported(tmp_path):
    console = Console(width=100, record=True, markup=False, file=io.StringIO())
    report_frontier([SFT_ROW, row(kl=math.nan)], tmp_path, console)
    text = console.export_text()
    assert "not finite, left out of the comparison: dpo beta 0.1 learning_rate 0.0001 seed 0, 1 measurement" in text
    assert "there is no frontier to draw" in text
    assert not list(tmp_path.iterdir())


def test_labels_are_text_whatever_they_look_like(tmp_path):
    figure = frontier_figure([SFT_ROW, row(label=r"$\no$"), row(label="_hidden")])
    save_figure(figure, tmp_path / "labels.png")  # "$...$" is a formula to matplotlib, and this one is an error
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [r"$\no$", " _hidden", "SFT"]
    with pytest.raises(ValueError, match=r"labels\.jpg: figures are written as \.png or \.svg"):
        save_figure(figure, tmp_path / "labels.jpg")


def test_ten_curves_differ_in_colour_and_marker():
    names = ["mine", "dpo", "tdpo2", "kto", "ppo", *(f"run {n}" for n in range(5))]
    found = styles_of(names)
    assert len({colour for colour, _ in found.values()}) == len({marker for _, marker in found.values()}) == 10
    assert SFT_STYLE not in found.values()
    assert (found["dpo"], found["tdpo2"], found["ppo"]) == (STYLES["dpo"], STYLES["tdpo2"], STYLES["ppo"])
    assert styles_of(["dpo"])["dpo"] == found["dpo"]


def test_matplotlibs_settings_are_left_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    save_figure(frontier_figure(two_curves()), tmp_path / "figure.svg")
    assert dict(matplotlib.rcParams) == before


def test_two_processes_write_equal_bytes(tmp_path):
    write_rows(tmp_path / "rows.csv", two_curves())
    script = (
        "import sys; from pathlib import Path; from rich.console import Console\n"
        "from tdpo.evaluate.frontier import read_rows; from tdpo.report.frontier import report_frontier\n"
        "folder = Path(sys.argv[1]); folder.mkdir()\n"
        "report_frontier(read_rows(folder.parent / 'rows.csv'), folder, Console(quiet=True))"
    )
    digests = []
    for name, hash_seed in (("one", "1"), ("two", "2")):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "SOURCE_DATE_EPOCH": hash_seed}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], env=environment, check=True)
        files = [(tmp_path / name / f"frontier.{suffix}").read_bytes() for suffix in ("png", "svg")]
        digests.append([hashlib.sha256(content).hexdigest() for content in files])
    assert digests[0] == digests[1]


def test_a_seed_front_of_one_point_has_a_range():
    assert SeedFront(np.array([[0.0, 0.3]]), largest=2.0).reward_at(1.0) == 0.3
