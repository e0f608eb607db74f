"""Word by word gives what the tokenizer gives, for any text; where that cannot be known, the tokenizer does it."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import END, make_tokenizer
from test_tokenise import sentencepiece_like
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tdpo.data import encode
from tdpo.data.encode import TextEncoder, word_pattern

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
    assert encoder(given[::-1], literal) == want[::-1]  # from memory


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "tokenizers/gpt_neox"])
def test_real_tokenizers_are_encoded_word_by_word_and_agree(shared: Path, name: str) -> None:
    tokenizer, given = AutoTokenizer.from_pretrained(shared / "data" / name), texts(3000)
    encoder = TextEncoder(tokenizer)
    for literal in (True, False):
        want = tokenizer(given, add_special_tokens=False, split_special_tokens=literal, verbose=False)["input_ids"]
        assert encoder(given, literal) == want
    assert sum(encoder._words.encode(text, True) is not None for text in given) > 1500


def test_a_tokenizer_that_joins_words_is_noticed_and_encoded_whole(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(encode, "word_pattern", lambda spec: r"\S|\s")  # not how this tokenizer cuts
    monkeypatch.setattr(encode._Words, "_same_class", lambda self, character: True)
    tokenizer = make_tokenizer()
    given = ["The river sees, the garden.", "a"]
    assert TextEncoder(tokenizer)(given) == tokenizer(given, add_special_tokens=False)["input_ids"]
    assert "texts are encoded whole" in caplog.text


def test_unknown_ways_of_cutting_are_left_to_the_tokenizer() -> None:
    spec = json.loads(make_tokenizer().backend_tokenizer.to_str())
    assert word_pattern(spec) == encode.GPT2_WORDS
    prefixed = {**spec["pre_tokenizer"], "add_prefix_space": True}
    assert word_pattern({**spec, "pre_tokenizer": prefixed}) is None
    assert word_pattern({**spec, "normalizer": {"type": "Lowercase"}}) is None
    assert word_pattern({**spec, "model": {**spec["model"], "dropout": 0.1}}) is None
    assert word_pattern({**spec, "pre_tokenizer": None}) is None


def test_the_users_tokenizer_keeps_its_settings_and_cuts_nothing_here() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    assert [len(ids) for ids in TextEncoder(tokenizer)(["a b c d e f", ""])] == [11, 0]
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 3


def test_the_memory_of_words_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encode, "WORDS_KEPT", 50)
    tokenizer = make_tokenizer()
    encoder = TextEncoder(tokenizer)
    given = [f"word {number} " + "x" * 100 for number in range(200)]
    assert encoder(given) == tokenizer(given, add_special_tokens=False)["input_ids"]
    assert len(encoder._words._ids) <= 50
    assert max(map(len, encoder._words._ids)) <= encode.LONG_WORD
