"""What the demo prints and draws: the table, one prompt side by side, the figure, and what to try next."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from tdpo.demo.results import DemoResult, Point
from tdpo.evaluate.estimates import Estimate
from tdpo.report.plots import LABELS, FrontierPoint, KLCurve, overview_figure, save_figure


def result_table(rows: Mapping[str, Point]) -> Table:
    """Renders the models side by side, 80 columns wide; :func:`legend` explains the columns."""
    table = _table("Measured on held-out prompts and pairs")
    for header in (
        "model", "reward", "KL(pi||\nref)", "entropy", "distinct\n2-grams", "tokens", "accuracy",
        "seq. KL\nchosen", "seq. KL\nrejected",
    ):  # fmt: skip
        table.add_column(header, justify="left" if header == "model" else "right", no_wrap=True)
    for name, point in rows.items():
        samples, held_out = point.samples, point.held_out
        table.add_row(
            LABELS[name], f"{point.reward:.3f}", f"{samples.kl:.2f}", f"{samples.entropy.mean:.3f}",
            f"{samples.distinct_2:.3f}", f"{samples.length.mean:.1f}",
            "-" if name == "sft" else f"{held_out['implicit_rewards/accuracies']:.3f}",
            f"{held_out['kl/chosen']:.2f}", f"{held_out['kl/rejected']:.2f}",
        )  # fmt: skip
    return table


def legend(result: DemoResult) -> str:
    """Explains the columns, in plain lines."""
    options, pairs = result.options, result.data["held_out_pairs"]
    return (
        f"On {options.held_out_prompts} samples, one a prompt, ± standard errors: reward, the sentiment from -1 to 1 "
        "(tdpo.demo.grammar); KL(policy || reference) in nats per response; predictive entropy of the policy in nats "
        "per token; distinct 2-grams over all; response length.\n"
        f"On {pairs} held-out pairs: accuracy, how often log pi / pi_ref ranks a pair as the reward does (the SFT "
        "model is the reference and has none); sequential KL(reference || policy) in nats per response.\n"
        f"One run, seed {options.seed}: the objectives share SFT model, pairs, data order, {options.steps} steps of "
        f"{options.batch_size}, learning rate {options.learning_rate:g}, beta {options.beta:g}; alpha "
        f"{options.alpha:g} (TDPO2)."
    )


def draw(result: DemoResult, path: Path) -> Path:
    """Draws the demo's figure: every measured point, and the sequential KL on held-out pairs over training."""
    options = result.options
    figure = overview_figure(
        frontier={
            name: [_frontier_point(p.samples.kl, p.reward) for p in points]
            for name, points in (*result.trajectories.items(), ("sft", [result.sft]))
        },
        growth={
            name: KLCurve(
                steps=[p.step for p in points],
                chosen=[p.held_out["kl/chosen"] for p in points],
                rejected=[p.held_out["kl/rejected"] for p in points],
            )
            for name, points in result.trajectories.items()
        },
        reward_label="mean reward of samples (from -1 to 1)",
        caption=(
            f"tdpo demo, seed {options.seed}: one run each with the same SFT model, pairs, order, {options.steps} "
            f"steps and learning rate {options.learning_rate:g}; beta {options.beta:g}, alpha {options.alpha:g} "
            f"(TDPO2).\nA point every {options.eval_every} steps; crosses are standard errors over "
            f"{options.held_out_prompts} held-out prompts. Left: up and to the left is better."
        ),
    )
    return save_figure(figure, path)


def side_by_side(prompt: str, completions: Mapping[str, tuple[str, float]]) -> Table:
    """Renders one held-out prompt with the completion and reward of every model."""
    table = _table(escape(f'One held-out prompt: "{prompt} ..."'))
    table.add_column("model", no_wrap=True)
    table.add_column("sample")
    table.add_column("reward", justify="right")
    for name, (text, value) in completions.items():
        table.add_row(LABELS[name], escape(text.strip()), f"{value:.2f}")
    return table


def next_commands(output_dir: Path) -> Sequence[str]:
    """Returns commands that use the models of the demo."""
    folder = shlex.quote(str(output_dir))
    return (
        f"tdpo eval --model_name_or_path {folder}/tdpo2 --ref_model_name_or_path {folder}/sft "
        f"--dataset_name {folder}/pairs --objective tdpo2",
        f"tdpo generate --model_name_or_path {folder}/tdpo2 --ref_model_name_or_path {folder}/sft "
        f"--dataset_name {folder}/prompts.jsonl",
        f"tdpo train --model_name_or_path {folder}/sft --dataset_name {folder}/pairs --objective tdpo2 --alpha 1.0 "
        f"--learning_rate 2e-4 --output_dir my-tdpo2",
    )


def _frontier_point(kl: Estimate, reward: Estimate) -> FrontierPoint:
    return FrontierPoint(kl.mean, kl.standard_error, reward.mean, reward.standard_error)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", header_style="bold", box=SIMPLE_HEAD, padding=0, show_edge=False)
