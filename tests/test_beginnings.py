"""Starts of texts: tokens that a tokenizer puts there are kept, and a text that continues another gets none."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from conftest import make_tokenizer, sentences
from test_tokenise import sentencepiece_like
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tdpo import PreferenceRecord, TokenisedPair
from tdpo.data.encode import TextEncoder
from tdpo.data.formats import DataReport
from tdpo.data.tokenise import Lengths, Tokeniser


def unigram(scheme: str, *steps: Any) -> PreTrainedTokenizerFast:
    """A SentencePiece-like unigram tokenizer whose normalizer makes spaces of line breaks and drops those at ends."""
    tokenizer = Tokenizer(models.Unigram())
    rules = [normalizers.NFKC(), normalizers.Replace(Regex(r"[\n\r\t]"), " "), normalizers.Strip(left=False)]
    tokenizer.normalizer = normalizers.Sequence([*rules, *steps])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme=scheme)
    tokenizer.decoder = decoders.Metaspace(replacement="\u2581", prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator([*sentences(), "2 + 2 = 4 (42), \u6c34 0 1 3 5"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def pair_of(tokenizer: Any, prompt: str, chosen: str, rejected: str = " x", **lengths: Any) -> TokenisedPair:
    record = PreferenceRecord(prompt, chosen, rejected, "texts.jsonl", 1)
    return Tokeniser(tokenizer, Lengths(**lengths)).pairs([record], DataReport("texts.jsonl"))[0]


@pytest.mark.parametrize("scheme", ["always", "first"])
@pytest.mark.parametrize(
    ("prompt", "response"), [("2 + 2 =", "4"), ("The answer is (", "42) too"), ("The", " river"), ("The ri", "ver")]
)
def test_a_continuation_gets_no_space_and_loses_none(scheme: str, prompt: str, response: str) -> None:
    tokenizer = unigram(scheme)
    pair = pair_of(tokenizer, prompt, response)
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(pair.prompt_ids + pair.chosen_ids[:-1]) == prompt + response
    space = tokenizer.convert_tokens_to_ids("\u2581")
    starts = tokenizer.convert_ids_to_tokens(pair.chosen_ids)[0].startswith("\u2581")
    assert starts == response.startswith(" ") and (pair.chosen_ids[0] == space) <= response.startswith(" ")


def test_compatibility_characters_and_chinese_continue_too() -> None:
    tokenizer = unigram("always")
    pair = pair_of(tokenizer, "\ufb01rst \u2460", "\ufb01ne", "\u6c34")
    assert tokenizer.decode(pair.prompt_ids + pair.rejected_ids[:-1]) == "first 1\u6c34"
    assert tokenizer.convert_ids_to_tokens(pair.chosen_ids)[0][0] == "f"


def test_the_anchor_is_the_first_that_decoding_proves() -> None:
    def anchors(tokenizer: Any) -> list[str]:
        return [text for text, _ in TextEncoder(tokenizer).anchors]

    assert anchors(make_tokenizer()) == []  # bytes need none
    assert anchors(sentencepiece_like())[0] == "\n"
    assert "\n" not in anchors(unigram("always")) and anchors(unigram("always"))


def test_a_text_that_merges_with_an_anchor_is_encoded_behind_the_next_anchor() -> None:
    tokenizer = unigram("always")
    encode = TextEncoder(tokenizer)
    assert tokenizer.decode(encode(["The river"])[0]) == "The river"
    # "The" is one token, so that the ids of the anchor "T" are not at the beginning of "The river".
    encode.anchors = [("T", encode(["T"])[0]), *encode.anchors]
    (ids,) = encode.continuations(["he river"])
    assert tokenizer.convert_ids_to_tokens(ids)[0][0] == "h"


def test_a_tokenizer_without_any_anchor_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    vocabulary = {"[UNK]": 0, "a": 1, "4": 2, "the": 3, "end": 4, ".": 5, "b": 6, "(": 7}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[UNK]", unk_token="[UNK]")
    with caplog.at_level(logging.WARNING, "tdpo"):
        assert TextEncoder(wordpiece).anchors == []
    assert "none of" in caplog.text and "begin with a space" in caplog.text


def beginning_with(*tokens: str, ending: str = "") -> PreTrainedTokenizerFast:
    """A byte-level tokenizer that puts tokens before every text, and perhaps one behind it, and names no start."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*tokens]})
    tokenizer.bos_token = None
    single = " ".join([*(f"{token}:0" for token in tokens), "$A:0", *([f"{ending}:0"] if ending else [])])
    special = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (*tokens, *([ending] if ending else []))]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return tokenizer


@pytest.mark.parametrize("ending", ["", "<|endoftext|>"])
def test_tokens_that_a_tokenizer_puts_before_a_text_are_kept_and_those_behind_it_are_not(ending: str) -> None:
    tokenizer = beginning_with("[A]", "[B]", ending=ending)
    start = tokenizer.convert_tokens_to_ids(["[A]", "[B]"])
    pair = pair_of(tokenizer, "The river", " sees", max_length=400, max_prompt_length=200)
    plain = pair_of(make_tokenizer(), "The river", " sees", max_length=400, max_prompt_length=200)
    assert pair.prompt_ids == start + plain.prompt_ids
    assert (pair.chosen_ids, pair.rejected_ids) == (plain.chosen_ids, plain.rejected_ids)
    assert pair_of(tokenizer, "", "The river").prompt_ids == start
    cut = pair_of(tokenizer, "The river likes the garden. " * 9, " sees" * 9, max_length=20, max_prompt_length=8)
    whole = pair_of(tokenizer, "The river likes the garden. " * 9, " sees", max_length=900, max_prompt_length=800)
    assert cut.prompt_ids == start + whole.prompt_ids[-6:] and len(cut.prompt_ids) == 8


def test_prompts_alone_begin_as_in_training() -> None:
    tokenizer = beginning_with("[A]", "[B]")
    tokeniser = Tokeniser(tokenizer)
    assert tokeniser.prompts(["The river", ""]) == [
        pair_of(tokenizer, "The river", " sees").prompt_ids,
        tokenizer.convert_tokens_to_ids(["[A]", "[B]"]),
    ]


def test_text_that_the_tokenizer_does_not_know_is_named_by_row() -> None:
    report = DataReport("texts.jsonl")
    rows = [
        PreferenceRecord("The river", " sees", f" {text}", "texts.jsonl", n) for n, text in enumerate("ab\u0e01", 1)
    ]
    Tokeniser(unigram("always")).pairs(rows, report)
    assert report.noticed == {"text that the tokenizer does not know becomes '<unk>'": [3]}
