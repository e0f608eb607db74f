"""Copies the results of the sweeps into ``results/``: rows, samples, and how the independent scorer rates them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import sentiment

from tdpo.commands.frontier import OPTIONS
from tdpo.commands.options import parse
from tdpo.evaluate.frontier import SFT, read_rows, write_rows
from tdpo.evaluate.rewards import RewardOptions, load_reward
from tdpo.sweep import plan

HERE = Path(__file__).parent
WORK, RESULTS = HERE / "work", HERE / "results"
SWEEP = WORK / "sweep"
SHOWN = 8
"""Prompts whose samples are kept, of the run with seed 0 of every curve."""


def main() -> None:
    """Collects the runs of a finished sweep."""
    RESULTS.mkdir(exist_ok=True)
    shutil.copy(WORK / "scorers.json", RESULTS / "scorers.json")
    shutil.copy(WORK / "validation" / "frontier.csv", RESULTS / "validation.csv")
    write_rows(RESULTS / "sweep.csv", read_rows(SWEEP / "frontier.csv"))
    arguments = ["--config", str(HERE / "sweep.yaml"), "--output_dir", str(SWEEP)]
    *_, options, args = parse("frontier", OPTIONS, arguments, ["output_dir"])
    sources: list[tuple[str, Any, Path]] = [(SFT, "", SWEEP / "samples-sft.jsonl")]
    runs = plan(options, args)
    if missing := [run.name for run in runs if not (SWEEP / "runs" / run.name / "finished").exists()]:
        raise SystemExit(f"not finished yet: {', '.join(missing)}")
    sources += [(run.label, run.args.seed, SWEEP / "runs" / run.name / "samples.jsonl") for run in runs]
    scorer = load_reward(RewardOptions(reward=str(WORK / "independent.skops")))
    ratings, shown = [], []
    for curve, seed, path in sources:
        samples = sentiment.read_rows(path)
        ratings.append({"curve": curve, "seed": seed, "independent": float(np.mean(scorer(samples)))})
        if seed in ("", 0):
            shown += [{"curve": curve, **sample} for sample in samples[:SHOWN]]
    for name, rows in (("independent", ratings), ("samples", shown)):
        sentiment.write_rows(RESULTS / f"{name}.jsonl", rows)


if __name__ == "__main__":
    main()
