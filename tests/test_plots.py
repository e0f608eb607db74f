"""Figures: what is drawn is what was measured, a legend names every line, and nothing global changes."""

from __future__ import annotations

import matplotlib
import numpy as np
from matplotlib.image import imread

from tdpo.report.plots import STYLES, FrontierPoint, KLCurve, overview_figure, save_figure, styles_of

FRONTIER = {
    "dpo": [FrontierPoint(0, 0, 0.0, 0.02), FrontierPoint(3, 0.1, 0.2, 0.02), FrontierPoint(7, 0.3, 0.3, 0.02)],
    "tdpo2": [FrontierPoint(0, 0, 0.0, 0.02), FrontierPoint(1.4, 0.05, 0.29, 0.02, note="beta 0.1")],
    "sft": [FrontierPoint(0, 0, 0.0, 0.02)],
}
GROWTH = {
    "dpo": KLCurve([0, 20, 40], [0, 1.0, 4.0], [0, 2.0, 7.0]),
    "tdpo2": KLCurve([0, 20, 40], [0, 0.4, 1.50], [0, 0.5, 1.55]),
}


def test_the_lines_carry_the_numbers_and_the_standard_errors():
    left, right = overview_figure(FRONTIER, GROWTH).axes
    lines = [container.lines[0] for container in left.containers]
    assert [list(line.get_xdata()) for line in lines] == [[0, 3, 7], [0, 1.4], [0]]
    assert [list(line.get_ydata()) for line in lines] == [[0.0, 0.2, 0.3], [0.0, 0.29], [0.0]]
    across, up = left.containers[0].lines[2]
    assert np.allclose([s[:, 0] for s in across.get_segments()], [[0, 0], [2.9, 3.1], [6.7, 7.3]])
    assert np.allclose([s[:, 1] for s in up.get_segments()], [[-0.02, 0.02], [0.18, 0.22], [0.28, 0.32]])
    assert [list(line.get_ydata()) for line in right.lines] == [
        [0, 2.0, 7.0], [0, 1.0, 4.0], [0, 0.5, 1.55], [0, 0.4, 1.50]
    ]  # fmt: skip


def test_axes_name_direction_and_unit():
    left, right = overview_figure(FRONTIER, GROWTH, reward_label="mean reward").axes
    assert left.get_xlabel() == "KL(policy || reference) along samples, nats per response"
    assert left.get_ylabel() == "mean reward"
    assert right.get_ylabel() == "KL(reference || policy), nats per response"
    assert "beta 0.1" in {text.get_text() for text in left.texts}


def test_the_legends_name_every_line_in_its_own_colour_and_style():
    left, right = overview_figure(FRONTIER, GROWTH).axes
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["DPO", "TDPO2", "SFT"]
    entries = {
        text.get_text(): (line.get_color(), line.get_marker(), line.get_linestyle())
        for text, line in zip(right.get_legend().get_texts(), right.get_legend().get_lines(), strict=True)
    }
    assert entries == {
        "DPO rejected": (*STYLES["dpo"], "-"),
        "DPO chosen": (*STYLES["dpo"], "--"),
        "TDPO2 rejected": (*STYLES["tdpo2"], "-"),
        "TDPO2 chosen": (*STYLES["tdpo2"], "--"),
    }


def test_saved_picture_has_its_size_and_is_light(tmp_path):
    figure = overview_figure(FRONTIER, GROWTH, caption="one line\nand another")
    picture = imread(save_figure(figure, tmp_path / "figure.png"))
    assert picture.shape[:2] == (720, 1600)
    assert picture[0, 0, :3].tolist() == [1.0, 1.0, 1.0]
    assert 0.02 < (picture[..., :3].min(-1) < 0.5).mean() < 0.1  # ink


def test_nothing_is_cut_off_at_the_edges(tmp_path):
    picture = imread(save_figure(overview_figure(FRONTIER, GROWTH, caption="below"), tmp_path / "figure.png"))[..., :3]
    edges = [picture[:8], picture[-8:], picture[:, :8], picture[:, -8:]]
    assert all(edge.min() == 1.0 for edge in edges)


def test_matplotlibs_settings_and_pyplot_are_left_alone():
    before = dict(matplotlib.rcParams)
    overview_figure(FRONTIER, GROWTH)
    assert dict(matplotlib.rcParams) == before


def test_ten_curves_and_the_sft_model_differ_in_colour_and_marker():
    names = ["sft", "mine", "dpo", "tdpo2", "kto", "ppo", *(f"run {n}" for n in range(5))]
    found = styles_of(names)
    assert len({colour for colour, _ in found.values()}) == len({marker for _, marker in found.values()}) == 11
    assert (found["dpo"], found["tdpo2"], found["ppo"]) == (STYLES["dpo"], STYLES["tdpo2"], STYLES["ppo"])
    assert styles_of(["dpo"])["dpo"] == found["dpo"]
