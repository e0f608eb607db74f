"""Prepares the experiment on stories: scorers, prefixes from the model's own stories, preference pairs.

    python experiments/stories/prepare.py --reviews stanfordnlp/imdb --base STORIES_260K

The pretrained model is the SFT model. What exists already is kept.
"""

from __future__ import annotations

import sys
from pathlib import Path

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
    args = sentiment.parse_arguments(__doc__)
    WORK.mkdir(exist_ok=True)
    reviews, test = (sentiment.read_reviews(args.reviews, split) for split in ("train", "test"))
    sentiment.train_scorers(reviews, test, WORDS, WORK)
    model = AutoModelForCausalLM.from_pretrained(args.base)
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    model.save_pretrained(WORK / "sft")
    tokenizer.save_pretrained(WORK / "sft")
    wanted = sum(PROMPTS.values())
    sampling = Sampling(max_new_tokens=64, num_samples=2 * wanted, batch_size=256)
    (stories,) = sample_ids(model, [[tokenizer.bos_token_id]], sampling, None)
    texts = tokenizer.batch_decode(stories, skip_special_tokens=True)
    prompts = sentiment.prefixes(texts, wanted, PREFIX_WORDS, seed=0)
    sets = {"train": prompts[: PROMPTS["train"]], "test": prompts[PROMPTS["train"] :]}
    for seed, (name, asked) in enumerate(sets.items()):
        sentiment.write_pairs(WORK / f"{name}.jsonl", WORK, asked, MAX_NEW_TOKENS, seed)


if __name__ == "__main__":
    main()
