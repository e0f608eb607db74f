"""Table 1 of the paper at small scale: accuracy and entropy of four objectives on Anthropic HH dialogues.

    python experiments/hh/run.py --dialogues HH_FILE --base BASE_MODEL [--folds 0 1 2]

A fold tests on one third of the prompts. Finished parts are kept: the same command resumes. Processes that run the
command at the same time share its parts.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import itertools
import json
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout

sys.path.insert(0, str(Path(__file__).parents[1]))
import sentiment

from tdpo.commands import eval as evaluate
from tdpo.commands import sft, train
from tdpo.data.sources import open_source
from tdpo.files import atomic_write
from tdpo.train.step import NonFiniteLoss

HERE = Path(__file__).parent
WORK = HERE / "work"
FOLDS = 3
FINISHED = "trainer_state.json"
"""What training writes last."""
VALIDATION = 8
"""One in this many of the first turns that are not tested on is validated on."""
OBJECTIVES = ("fdpo", "dpo", "tdpo1", "tdpo2")
LEARNING_RATES = (3e-5, 1e-4, 3e-4)
LENGTHS = ("--max_length", "384", "--max_prompt_length", "256")
ENTROPY = ("--generate", "--num_prompts", "48", "--max_new_tokens", "64", "--entropy_samples", "25")


def split(dialogues: str, fold: int, folder: Path) -> None:
    """Writes the dialogues of a fold; all dialogues with the same first turn are in one of the three files."""
    files: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for row in open_source(dialogues, "train", None):
        first = row.fields["chosen"].partition("\n\nAssistant:")[0]
        number = int(hashlib.sha1(first.encode()).hexdigest(), 16)
        held_out = "validation" if number // FOLDS % VALIDATION == 0 else "train"
        name = "test" if number % FOLDS == fold else held_out
        files[name].append({side: row.fields[side] for side in ("chosen", "rejected")})
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        sentiment.write_rows(folder / f"{name}.jsonl", rows)


def run_fold(dialogues: str, base: str, fold: int) -> None:
    """Runs every part of a fold that has no result yet and that no other process is running."""
    folder = WORK / f"fold-{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    seed = ["--seed", str(fold)]
    settings = list(itertools.product(OBJECTIVES, LEARNING_RATES))
    with FileLock(folder / "sft.lock"):
        fine_tune(dialogues, base, fold, seed)
        train_once(folder, *settings[0], seed)  # fills the cache of the reference, which others only read
    for objective, rate in settings:
        train_once(folder, objective, rate, seed)
    for objective in OBJECTIVES:
        chosen = chosen_rate(objective, folder)
        if chosen is not None:
            model = folder / f"{objective}-{chosen:g}"
            options = [*ENTROPY, "--samples_dir", f"{folder}/samples"]
            once(model, "test", partial(score, model, "test", options))


def train_once(folder: Path, objective: str, rate: float, seed: list[str]) -> None:
    """Trains and validates with a setting that has no result yet."""
    model = folder / f"{objective}-{rate:g}"
    once(model, "validation", partial(train_pairs, model, objective, rate, seed))


def once(model: Path, name: str, part: Callable[[], None]) -> None:
    """Runs a part that writes ``MODEL/NAME.json``, unless this file exists or another process works on the model."""
    try:
        with FileLock(f"{model}.lock", timeout=0):
            if not (model / f"{name}.json").exists():
                part()
    except Timeout:
        return


def fine_tune(dialogues: str, base: str, fold: int, seed: list[str]) -> None:
    """Writes the dialogues of a fold and fine-tunes its reference on them."""
    folder = WORK / f"fold-{fold}"
    if not (folder / "test.jsonl").exists():
        split(dialogues, fold, folder)
    if not (folder / "sft" / FINISHED).exists():
        paths = ["--model_name_or_path", base, "--dataset_name", f"{folder}/train.jsonl"]
        options = ["--output_dir", f"{folder}/sft", "--overwrite_output_dir", *seed]
        sft.run(["--config", f"{HERE}/sft.yaml", *paths, *options])


def train_pairs(model: Path, objective: str, rate: float, seed: list[str]) -> None:
    """Trains with an objective and evaluates the model on the validation pairs."""
    folder = model.parent
    options = ["--objective", objective, "--learning_rate", f"{rate:g}", "--reference_cache", f"{folder}/cache"]
    options += ["--overwrite_output_dir", "--output_dir", f"{model}", *LENGTHS, *seed]
    paths = ["--model_name_or_path", f"{folder}/sft", "--dataset_name", f"{folder}/train.jsonl"]
    try:
        train.run(["--config", f"{HERE}/train.yaml", *paths, *options])
    except NonFiniteLoss as error:
        print(f"{objective} at learning rate {rate:g} diverged: {error}")
        atomic_write(model / "validation.json", json.dumps({"loss": math.inf}))
    else:
        score(model, "validation", [])


def score(model: Path, name: str, options: list[str]) -> None:
    """Evaluates a model on one of the fold's files, with the objective it was trained with."""
    folder = model.parent
    paths = ["--model_name_or_path", f"{model}", "--ref_model_name_or_path", f"{folder}/sft"]
    data = ["--dataset_name", f"{folder}/{name}.jsonl", "--on_bad_row", "drop", *LENGTHS]
    evaluate.run([*paths, *data, "--json", f"{model}/{name}.json", *options])


def chosen_rate(objective: str, folder: Path) -> float | None:
    """Returns the learning rate with the lowest validation loss of an objective, ``None`` before all are trained."""
    results = {rate: folder / f"{objective}-{rate:g}" / "validation.json" for rate in LEARNING_RATES}
    if not all(result.exists() for result in results.values()):
        return None
    losses = {rate: json.loads(result.read_text())["loss"] for rate, result in results.items()}
    return min(losses, key=lambda rate: losses[rate])


COLUMNS = {
    "pairs": "pairs", "loss": "loss", "rewards/accuracies": "accuracy",
    "implicit_rewards/accuracies": "logratio_accuracy", "kl/chosen": "kl_chosen", "kl/rejected": "kl_rejected",
    "samples/policy/predictive_entropy": "entropy", "samples/reference/predictive_entropy": "sft_entropy",
}  # fmt: skip
"""Columns of the result files, by the metrics of ``tdpo eval``."""


def collect() -> None:
    """Writes ``results/validation.csv`` and ``results/test.csv`` from all finished runs."""
    for name in ("validation", "test"):
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["objective", "learning_rate", "fold", *COLUMNS.values()])
        for path in sorted(WORK.glob(f"fold-*/*/{name}.json")):
            objective, _, rate = path.parent.name.partition("-")
            metrics = json.loads(path.read_text())
            fold = path.parents[1].name.removeprefix("fold-")
            writer.writerow([objective, float(rate), fold, *(metrics.get(metric, "") for metric in COLUMNS)])
        atomic_write(HERE / "results" / f"{name}.csv", text.getvalue())


def main() -> None:
    """Runs the folds that are asked for, one after another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dialogues", required=True, help="HH preference dialogues: harmless-base/test.jsonl.gz")
    parser.add_argument("--base", required=True, help="the pretrained model: a hub name or a folder")
    parser.add_argument("--folds", type=int, nargs="*", default=list(range(FOLDS)))
    args = parser.parse_args()
    for fold in args.folds:
        run_fold(args.dialogues, args.base, fold)
    (HERE / "results").mkdir(exist_ok=True)
    collect()


if __name__ == "__main__":
    main()
