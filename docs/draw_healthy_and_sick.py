"""Draws the pictures of docs/report.md: the charts of a healthy run, and of runs in trouble, on the demo's pairs.

    make demo && python docs/draw_healthy_and_sick.py [DEMO_FOLDER]

Three runs of a minute or less each, kept in DEMO_FOLDER/signs; remove that folder to train new ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tdpo.commands import train
from tdpo.report.collect import RECORD, read_run
from tdpo.report.run_figures import charts, draw

ASSETS = Path(__file__).with_name("assets")
COMMON = (
    "--max_steps 120 --per_device_train_batch_size 32 --logging_steps 5 --eval_strategy steps --eval_steps 20 --seed 0"
)
RUNS = {
    "healthy": "--objective tdpo2 --learning_rate 2e-4 --lr_scheduler_type linear --warmup_steps 6 --max_grad_norm 10",
    "sick": "--objective dpo --learning_rate 5e-3 --lr_scheduler_type constant --max_grad_norm 1000",
    "asleep": "--objective tdpo2 --learning_rate 2e-4 --warmup_steps 1200",
}
CHARTS = {
    "loss": "sick",
    "accuracy": "sick",
    "kl": "sick",
    "logratio": "sick",
    "grad_norm": "sick",
    "learning_rate": "asleep",
}
"""The run that shows trouble in each chart."""


def main() -> None:
    """Trains the runs that are missing and draws all pictures."""
    demo = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-output")
    for name, options in RUNS.items():
        folder = demo / "signs" / name
        if not (folder / RECORD).is_file():
            paths = ["--model_name_or_path", f"{demo}/sft", "--dataset_name", f"{demo}/pairs"]
            paths += ["--eval_dataset_name", f"{demo}/pairs", "--output_dir", f"{folder}", "--save_strategy", "no"]
            train.run([*paths, *COMMON.split(), *options.split()])
    for chart in charts():
        for sign in ("healthy", CHARTS[chart.name]) if chart.name in CHARTS else ():
            run = read_run(demo / "signs" / sign)
            figure = draw(chart, [run])
            assert figure is not None, chart.name
            figure.savefig(ASSETS / f"report-{chart.name}-{'healthy' if sign == 'healthy' else 'sick'}.png", dpi=80)


if __name__ == "__main__":
    main()
