"""Prepares the experiment on stories: scorers, prefixes from the model's own stories, preference pairs.

    python experiments/stories/prepare.py --reviews stanfordnlp/imdb --base STORIES_260K

The pretrained model is the SFT model. What exists already is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import skops.io
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
import sentiment

from tdpo.evaluate.generate import Sampling, sample_ids

WORK = Path(__file__).parent / "work"
WORDS = 24
"""Words of the texts that the scorers are trained and tested on: those of a prefix with a completion."""
PREFIX_WORDS = (8, 16)
"""Longer than for reviews, because most stories begin alike."""
MAX_NEW_TOKENS = 64
PROMPTS = {"train": 600, "test": 256}


def main() -> None:
    """Runs every step whose files are missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", required=True, help="labelled reviews: a hub dataset or a folder")
    parser.add_argument("--base", required=True, help="the pretrained model: a hub name or a folder")
    args = parser.parse_args()
    WORK.mkdir(exist_ok=True)
    if not (WORK / "scorers.json").exists():
        reviews, test = (sentiment.read_reviews(args.reviews, split) for split in ("train", "test"))
        accuracies = sentiment.train_scorers(reviews, test, WORDS, WORK)
        (WORK / "scorers.json").write_text(json.dumps(accuracies, indent=1) + "\n")
        print("accuracy on test reviews:", accuracies)
    model = AutoModelForCausalLM.from_pretrained(args.base)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model.save_pretrained(WORK / "sft")
    tokenizer.save_pretrained(WORK / "sft")
    scorer = skops.io.load(WORK / "reward.skops", trusted=[])
    wanted = sum(PROMPTS.values())
    sampling = Sampling(max_new_tokens=64, num_samples=2 * wanted, batch_size=256)
    (stories,) = sample_ids(model, [[tokenizer.bos_token_id]], sampling, None)
    texts = tokenizer.batch_decode(stories, skip_special_tokens=True)
    prompts = sentiment.prefixes(texts, wanted, PREFIX_WORDS, seed=0)
    sets = {"train": prompts[: PROMPTS["train"]], "test": prompts[PROMPTS["train"] :]}
    for seed, (name, asked) in enumerate(sets.items()):
        path = WORK / f"{name}.jsonl"
        if not path.exists():
            sampling = Sampling(
                max_new_tokens=MAX_NEW_TOKENS, num_samples=sentiment.SAMPLES_PER_PREFIX, batch_size=256, seed=seed
            )
            rows = sentiment.sample_pairs(str(WORK / "sft"), asked, scorer, sampling)
            if name == "test":
                rows = sentiment.one_per_prompt(rows, seed)
            sentiment.write_rows(path, rows)
            print(f"{path}: {len(rows)} pairs of {len(asked)} prompts")


if __name__ == "__main__":
    main()
