"""Prepares the experiment on reviews: scorers, SFT model, preference pairs. What exists already is kept.

python experiments/imdb/prepare.py --reviews stanfordnlp/imdb --base BASE_MODEL
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import sentiment

from tdpo.commands import sft, train, weights

HERE = Path(__file__).parent
WORK = HERE / "work"
FINISHED = "trainer_state.json"
"""What training writes last."""
WORDS = 32
"""Words of the texts that the scorers are trained and tested on: those of a prefix with a completion."""
PREFIX_WORDS = (2, 8)
MAX_NEW_TOKENS = 40
PROMPTS = {"test": 256, "validation": 256, "train": 1000}
"""Prefixes of each set; those to test with are from test reviews, the others from train reviews."""
VALIDATION_REVIEWS = 400
"""Train reviews that are not fine-tuned on; the prefixes to validate with are theirs."""


def main() -> None:
    """Runs every step whose files are missing."""
    args = sentiment.parse_arguments(__doc__)
    WORK.mkdir(exist_ok=True)
    reviews, test = (sentiment.read_reviews(args.reviews, split) for split in ("train", "test"))
    sentiment.train_scorers(reviews, test, WORDS, WORK)
    texts = {"validation": reviews[:VALIDATION_REVIEWS], "train": reviews[VALIDATION_REVIEWS:], "test": test}
    if not (WORK / "sft.jsonl").exists():
        sentiment.write_rows(WORK / "sft.jsonl", ({"text": text} for text, _ in texts["train"]))
    if not (WORK / "sft" / FINISHED).exists():
        sft.run(["--config", str(HERE / "sft.yaml"), "--model_name_or_path", args.base, "--overwrite_output_dir"])
    used: set[str] = set()
    for seed, (name, count) in enumerate(PROMPTS.items()):
        prompts = sentiment.prefixes((text for text, _ in texts[name]), count, PREFIX_WORDS, seed, used)
        used.update(prompts)
        sentiment.write_pairs(WORK / f"{name}.jsonl", WORK, prompts, MAX_NEW_TOKENS, seed)
    weigh_tokens()


def weigh_tokens() -> None:
    """Writes the training pairs with the token weights of TIS-DPO, from DPO models trained both ways."""
    rows = sentiment.read_rows(WORK / "train.jsonl")
    swapped = [{**row, "chosen_ids": row["rejected_ids"], "rejected_ids": row["chosen_ids"]} for row in rows]
    sentiment.write_rows(WORK / "swapped.jsonl", swapped)
    for name, pairs in (("positive", "train"), ("negative", "swapped")):
        if not (WORK / name / FINISHED).exists():
            paths = ["--dataset_name", str(WORK / f"{pairs}.jsonl"), "--output_dir", str(WORK / name)]
            train.run(["--config", str(HERE / "contrast.yaml"), *paths, "--overwrite_output_dir"])
    weights.run(["--config", str(HERE / "weights.yaml")])


if __name__ == "__main__":
    main()
