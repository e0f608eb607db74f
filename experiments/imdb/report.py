"""Computes the tables and verdicts of the README from ``results/`` and writes them into it.

python experiments/imdb/report.py
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import claims
import sentiment
from claims import Comparison

from tdpo.evaluate.frontier import SFT, Row, read_rows
from tdpo.report.frontier import frontier_figure
from tdpo.report.plots import save_figure

HERE = Path(__file__).parent
RESULTS = HERE / "results"
KL_LIMIT = 3.0
"""Learning rates are compared by their reward up to this KL, in nats."""
ALPHAS = ("tdpo2 alpha 0.1", "tdpo2 alpha 0.3", "tdpo2", "tdpo2 alpha 0.7")
"""The curves of TDPO2; without a number, alpha is 0.5."""
CURVES = (SFT, "dpo", "tdpo1", *ALPHAS, "fdpo", "tis-dpo", "tbpo", "rloo", "ppo")
MAIN = (SFT, "dpo", "tdpo1", "tdpo2", "rloo", "ppo")
"""Curves of the main figure."""
EQUAL_KL = tuple(curve for curve in CURVES if curve not in (SFT, "dpo"))
"""Curves whose reward at equal KL is compared with DPO's."""
PAPER = {
    "dpo": (23, 44), "tdpo1": (29, 49), ALPHAS[0]: (18, 36), ALPHAS[1]: (10, 25), ALPHAS[2]: (6.5, 16.5),
    ALPHAS[3]: (4.3, 9),
}  # fmt: skip
"""Sequential KL of chosen and rejected responses, read off the paper's figure."""
COLUMNS = {
    "reward": ".3f", "independent": ".3f", "kl": ".2f", "kl_chosen": ".2f", "kl_rejected": ".2f", "accuracy": ".3f",
    "entropy": ".3f", "distinct_2": ".3f",
}  # fmt: skip
HEADER = (
    "curve", "learning rate", "reward", "independent scorer", "KL(policy \\|\\| ref)", "seq. KL chosen",
    "seq. KL rejected", "accuracy", "entropy", "distinct 2-grams",
)  # fmt: skip


def decide(rows: Sequence[Row]) -> dict[str, list[Comparison]]:
    """Returns the comparisons of every part of a claim, by its name."""
    found: dict[str, list[Comparison]] = {"A, TDPO2 below DPO": [], "A, TDPO1 above DPO": []}
    for column in ("kl_rejected", "kl_chosen"):
        pairs = itertools.pairwise(["dpo", *ALPHAS])
        found["A, TDPO2 below DPO"] += [claims.at_the_end(rows, *pair, column) for pair in pairs]
        found["A, TDPO1 above DPO"].append(claims.at_the_end(rows, "tdpo1", "dpo", column))
    found["B, DPO"] = [claims.reward_at_equal_kl(rows, "tdpo2", "dpo")]
    found["B, RLOO and PPO"] = [claims.reward_at_equal_kl(rows, "tdpo2", other) for other in ("rloo", "ppo")]
    columns = ("entropy", "distinct_2", "good_distinct_2")
    found["D"] = [claims.at_equal_reward(rows, "tdpo2", "dpo", column) for column in columns]
    return found


def last_table(rows: Sequence[Row]) -> str:
    """Renders the last measurement of every curve."""
    ratings = sentiment.read_rows(RESULTS / "independent.jsonl")
    rated = {(rating["curve"], rating["seed"]): rating["independent"] for rating in ratings}
    lines = []
    for curve in CURVES:
        last = claims.last_rows(rows, curve)
        if not last:
            continue
        full = [{**row, "independent": rated[curve, seed]} for seed, row in last.items()]
        rate = next(iter(last.values()))["learning_rate"]
        values = [[row[name] for row in full if row.get(name, "") != ""] for name in COLUMNS]
        cells = [claims.cell(found, spec) for found, spec in zip(values, COLUMNS.values(), strict=True)]
        lines.append([curve, f"{rate:g}" if rate else "-", *cells])
    return claims.table(HEADER, lines)


def rates_table(rows: Sequence[Row]) -> str:
    """Renders the reward of every learning rate on the validation prompts; the chosen one is in bold."""
    rewards, best = claims.mean_reward(rows, KL_LIMIT), claims.best_learning_rates(rows, KL_LIMIT)
    rates = sorted({rate for _, rate in rewards})
    lines = []
    for curve, chosen in best.items():
        cells = [f"{rewards[curve, rate]:.3f}" if (curve, rate) in rewards else "-" for rate in rates]
        lines.append([curve, *(f"**{c}**" if rate == chosen else c for rate, c in zip(rates, cells, strict=True))])
    return claims.table(["curve", *(f"{rate:g}" for rate in rates)], lines)


def paper_table(rows: Sequence[Row]) -> str:
    """Renders the sequential KLs beside those of the paper."""
    lines = []
    for curve, (chosen, rejected) in PAPER.items():
        last = claims.last_rows(rows, curve).values()
        ours = [claims.cell([row[f"kl_{side}"] for row in last]) for side in ("chosen", "rejected")]
        lines.append([curve, f"{chosen:g}", ours[0], f"{rejected:g}", ours[1]])
    return claims.table(["curve", "chosen, paper", "chosen", "rejected, paper", "rejected"], lines)


def render() -> str:
    """Returns the computed part of the README."""
    rows, validation = (read_rows(RESULTS / f"{name}.csv") for name in ("sweep", "validation"))
    scorers = json.loads((RESULTS / "scorers.json").read_text())
    seeds = len(claims.last_rows(rows, "dpo"))
    decided = decide(rows)
    verdicts = [f"- Claim {name}: **{claims.verdict(found)}**." for name, found in decided.items()]
    equal_kl = {curve: [claims.reward_at_equal_kl(rows, curve, "dpo")] for curve in EQUAL_KL}
    return "\n\n".join(
        [
            "## Verdicts",
            "\n".join(verdicts),
            f"The intervals are over {seeds} training seeds; SFT model, pairs and test prompts are always the same.",
            claims.comparison_table(decided),
            "## Sequential KL",
            f"KL(reference || policy) on held-out pairs after training, nats per response; mean ± half-width of the "
            f"95% confidence interval over {seeds} seeds.",
            paper_table(rows),
            "## Last measurements",
            f"Test prompts; the scorers' accuracy on the first 32 words of test reviews is {scorers['reward']:.3f} "
            f"(reward) and {scorers['independent']:.3f} (independent).",
            last_table(rows),
            "![reward against KL](frontier.png)",
            "## Reward at equal KL",
            "Reward of each objective minus that of DPO, averaged over the KL(policy || reference) both reach (nats).",
            claims.comparison_table(equal_kl),
            "## Learning rates",
            f"Reward on the validation prompts, averaged over KLs from 0 to {KL_LIMIT:g} nats.",
            rates_table(validation),
        ]
    )


def main() -> None:
    """Updates README and figure."""
    claims.insert(HERE / "README.md", render())
    rows = [row for row in read_rows(RESULTS / "sweep.csv") if row["label"] in MAIN]
    save_figure(frontier_figure(rows, "dpo"), HERE / "frontier.png")


if __name__ == "__main__":
    main()
