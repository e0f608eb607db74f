"""Makes the untrained base model and its texts; ``tdpo sft --config experiments/imdb/pretrain.yaml`` then trains it.

python experiments/imdb/base.py --reviews stanfordnlp/imdb
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from transformers import LlamaConfig, LlamaForCausalLM, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))
import sentiment

from tdpo.data.sources import open_source
from tdpo.demo.world import build_tokenizer

WORK = Path(__file__).parent / "work"
VOCABULARY = 4096
CHUNK_WORDS = 190
"""Words of a training text, about 256 tokens."""


def main() -> None:
    """Writes ``work/base-untrained`` and ``work/pretrain.jsonl``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reviews", required=True, help="a hub dataset, or a folder with files of each split")
    parser.add_argument("--splits", nargs="+", default=["train", "unsupervised"], help="splits to train on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [row.fields["text"] for split in args.splits for row in open_source(args.reviews, split, None)]
    texts = [text.replace("<br />", "\n") for text in rows]
    tokenizer = build_tokenizer(texts, VOCABULARY)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=256, intermediate_size=672, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    set_seed(args.seed)
    WORK.mkdir(exist_ok=True)
    for part in (LlamaForCausalLM(config), tokenizer):
        part.save_pretrained(WORK / "base-untrained")
    chunks = [chunk for text in texts for chunk in cut(text)]
    random.Random(args.seed).shuffle(chunks)
    sentiment.write_rows(WORK / "pretrain.jsonl", ({"text": chunk} for chunk in chunks))
    print(f"{len(chunks)} texts, vocabulary {len(tokenizer)}")


def cut(text: str) -> list[str]:
    """Cuts a text into pieces of :data:`CHUNK_WORDS` words, with their line breaks."""
    words = text.split(" ")
    return [" ".join(words[start : start + CHUNK_WORDS]) for start in range(0, len(words), CHUNK_WORDS)]


if __name__ == "__main__":
    main()
