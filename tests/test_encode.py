"""A text encoder gives the tokenizer's own ids for any text, whatever the tokenizer's settings."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from conftest import END, make_tokenizer
from test_tokenise import sentencepiece_like
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tdpo.data.encode import TextEncoder

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
PIECES = [
    "the river", "Don't", "I'LL", "1234567", " ", "  ", "\n", "\n\n", "\t", "\r\n", "'s", "“quoted”", "naïve",
    "e\u0301", "你好", "שלום", "🙂", "👩\u200d👧", "\u00a0", "\u2028", "\x1c", "\x85", "\x00", "ſ", "'ſ", END,
    "<|im_end|>", "   x", "\ue000",
]  # fmt: skip


def texts(count: int) -> list[str]:
    """Texts of everything that could be cut differently, and of characters at random."""
    rng = random.Random(0)

    def letter() -> str:
        low, high = rng.choice([(32, 127), (128, 0x3000), (0x3000, 0xD800), (0xE000, 0x20000)])
        return chr(rng.randrange(low, high))

    return [
        "".join(rng.choice(PIECES) if rng.random() < 0.7 else letter() for _ in range(rng.randrange(12)))
        for _ in range(count)
    ]


def llama3_like() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that cuts words as Llama 3's does, normalises, and has added tokens of every kind."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(PIECES * 20, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([AddedToken("   ", normalized=True), AddedToken("  ", normalized=True), "river", "ver"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


@pytest.mark.parametrize("make", [make_tokenizer, llama3_like, sentencepiece_like])
@pytest.mark.parametrize("literal", [True, False])
def test_ids_are_the_tokenizers_own(make: object, literal: bool) -> None:
    tokenizer, given = make(), texts(3000)
    want = tokenizer(given, add_special_tokens=False, split_special_tokens=literal, verbose=False)["input_ids"]
    encoder = TextEncoder(make())
    assert encoder(given, literal) == want
    assert encoder([]) == []


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/gpt_neox"])
def test_real_tokenizers_agree(shared: Path, name: str) -> None:
    tokenizer, given = AutoTokenizer.from_pretrained(shared / "data" / name), texts(3000)
    encoder = TextEncoder(tokenizer)
    for literal in (True, False):
        want = tokenizer(given, add_special_tokens=False, split_special_tokens=literal, verbose=False)["input_ids"]
        assert encoder(given, literal) == want


def test_the_users_tokenizer_keeps_its_settings_and_cuts_nothing_here() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert [len(ids) for ids in TextEncoder(tokenizer)(["a b c d e f", ""])] == [11, 0]
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3
