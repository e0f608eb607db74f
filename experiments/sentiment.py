"""Sentiment scorers and preference pairs for the experiments on reviews and stories.

Two scorers are trained on different halves of the labelled reviews, one on words and one on characters. The first ranks
completions and is the reward; the second checks whether texts with a higher reward are also more positive to a scorer
with other features.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import skops.io
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.naive_bayes import MultinomialNB
from sklearn.pipeline import Pipeline, make_pipeline
from transformers import AutoModelForCausalLM, AutoTokenizer

from tdpo.data.sources import open_source
from tdpo.evaluate.generate import Sampling, decode_response, end_tokens, sample_ids
from tdpo.files import atomic_write

SAMPLES_PER_PREFIX = 4
Review = tuple[str, int]
"""A text and its label: 1 for a positive review."""


def read_reviews(name: str, split: str) -> list[Review]:
    """Reads labelled reviews in random order, with line breaks instead of HTML; files are often sorted by label.

    Args:
        name: A hub dataset, or a folder with a file for each split, with the columns ``text`` and ``label``.
        split: ``train`` or ``test``.
    """
    rows = [row.fields for row in open_source(name, split, None)]
    reviews = [(row["text"].replace("<br />", "\n"), int(row["label"])) for row in rows]
    random.Random(0).shuffle(reviews)
    return reviews


def windows(reviews: Iterable[Review], words: int) -> Iterator[Review]:
    """Cuts reviews into texts of this many words, the length of what is scored later."""
    for text, label in reviews:
        found = text.split()
        for start in range(0, max(1, len(found) - words // 2), words):
            yield " ".join(found[start : start + words]), label


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Reads the command line of a preparation: ``--reviews`` and ``--base``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", required=True, help="labelled reviews: a hub dataset or a folder")
    parser.add_argument("--base", required=True, help="the pretrained model: a hub name or a folder")
    return parser.parse_args()


def train_scorers(reviews: Sequence[Review], test: Sequence[Review], words: int, folder: Path) -> None:
    """Trains the reward and the independent scorer, unless the folder has them.

    Writes ``reward.skops``, ``independent.skops`` and, last, ``scorers.json`` with the accuracy of each on the first
    ``words`` words of the test reviews.

    Args:
        reviews: Labelled reviews; those with even index train the reward, the others the independent scorer.
        test: Other reviews, for the held-out accuracy.
        words: Length in words of the texts to train on and to test with.
        folder: Where the files are written.
    """
    if (folder / "scorers.json").exists():
        return
    scorers: dict[str, Pipeline] = {
        "reward": make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), min_df=5, sublinear_tf=True),
            LogisticRegression(C=3, solver="liblinear"),
        ),
        "independent": make_pipeline(
            TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), min_df=20, sublinear_tf=True),
            MultinomialNB(alpha=0.1),
        ),
    }
    beginnings = [(" ".join(text.split()[:words]), label) for text, label in test]
    accuracies = {}
    for half, (name, scorer) in enumerate(scorers.items()):
        texts, labels = zip(*windows(reviews[half::2], words), strict=True)
        scorer.fit(texts, labels)
        accuracies[name] = float(scorer.score(*zip(*beginnings, strict=True)))
        skops.io.dump(scorer, folder / f"{name}.skops")
    print("accuracy on test reviews:", accuracies)
    atomic_write(folder / "scorers.json", json.dumps(accuracies, indent=1) + "\n")


def prefixes(
    texts: Iterable[str], count: int, words: tuple[int, int], seed: int, others: Collection[str] = ()
) -> list[str]:
    """Returns the first words of texts, each prefix once.

    Args:
        texts: Texts, of which as many are used as it takes.
        count: Number of prefixes.
        words: Smallest and largest length of a prefix; each is equally likely.
        seed: Seed of the lengths.
        others: Prefixes of other sets, which are left out.
    """
    rng = random.Random(seed)
    found: dict[str, None] = {}
    for text in texts:
        prefix = " ".join(text.split()[: rng.randint(*words)])
        if prefix not in others:
            found[prefix] = None
        if len(found) == count:
            break
    return list(found)


def sample_pairs(model_folder: str, prompts: Sequence[str], scorer: Any, sampling: Sampling) -> list[dict[str, Any]]:
    """Samples completions of every prompt and pairs all that differ in reward.

    Completions that reach the length limit have no end token, so that none is trained on; hence token ids, not texts.

    Args:
        model_folder: The SFT model and its tokenizer.
        prompts: Prompts of the pairs.
        scorer: A classifier; the reward is the probability of its second class.
        sampling: Sampling options; ``num_samples`` completions of a prompt give up to n (n - 1) / 2 pairs.

    Returns:
        Rows with the prompt as text and ids, the ids of both completions, and both rewards.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(model_folder)
    prompt_ids = tokenizer(list(prompts))["input_ids"]
    drawn = sample_ids(model, prompt_ids, sampling, end_tokens(model, tokenizer))
    rows = []
    for prompt, ids, samples in zip(prompts, prompt_ids, drawn, strict=True):
        rewards = scorer.predict_proba([prompt + decode_response(tokenizer, ids, sample) for sample in samples])[:, 1]
        ranked = sorted(zip(rewards.tolist(), samples, strict=True), reverse=True)
        for (high, chosen), (low, rejected) in itertools.combinations(ranked, 2):
            if high > low:
                row = {"prompt": prompt, "prompt_ids": ids, "chosen_ids": chosen, "rejected_ids": rejected}
                rows.append({**row, "chosen_reward": high, "rejected_reward": low})
    return rows


def write_pairs(path: Path, folder: Path, prompts: Sequence[str], max_new_tokens: int, seed: int) -> None:
    """Writes the pairs of prompts, unless the file exists; of a file other than ``train.jsonl`` one of each prompt.

    Args:
        path: The JSON lines file.
        folder: Has the SFT model in ``sft`` and the reward in ``reward.skops``.
        prompts: The prompts.
        max_new_tokens: Length of the completions.
        seed: Seed of the samples, and of the choice of a pair.
    """
    if path.exists():
        return
    scorer = skops.io.load(folder / "reward.skops", trusted=[])
    sampling = Sampling(max_new_tokens=max_new_tokens, num_samples=SAMPLES_PER_PREFIX, batch_size=256, seed=seed)
    rows = sample_pairs(str(folder / "sft"), prompts, scorer, sampling)
    if path.name != "train.jsonl":
        rows = one_per_prompt(rows, seed)
    write_rows(path, rows)
    print(f"{path}: {len(rows)} pairs of {len(prompts)} prompts")


def one_per_prompt(rows: Iterable[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Returns one pair of every prompt, chosen at random, so that held-out pairs are independent."""
    rng = random.Random(seed)
    return [rng.choice(list(pairs)) for _, pairs in itertools.groupby(rows, key=lambda row: row["prompt"])]


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes JSON lines, atomically: a file that exists is complete."""
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Reads JSON lines; a text may hold characters such as U+0085, at which ``splitlines`` would cut."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
