"""Text becomes ids: one end token, nothing merged or added at the boundary, and truncation that is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import END, make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tdpo import PreferenceRecord, TokenisedPair, UserError
from tdpo.data.formats import DataReport
from tdpo.data.tokenise import Lengths, Tokeniser

TEXTS = [
    ("The river", " sees the garden."),
    ("The river ", "sees"),
    ("Q: 你好吗？\nA:", " 很好 🙂\n"),
    ("שלום", " עולם"),
    ("a", "b"),
    ("", " starts from nothing"),
    (f"say {END} twice", f" {END}{END} done"),
]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text and a start token before that, as Llama's does."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "\u2581", *"abcdehilmnorstuvwTSAQ.,:?\n"]
    vocab = {piece: index for index, piece in enumerate(pieces)}
    vocab |= {"\u2581s": len(vocab), "\u2581r": len(vocab) + 1}
    tokenizer = Tokenizer(models.BPE(vocab, [("\u2581", "s"), ("\u2581", "r")], byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=64
    )


def pair_of(tokenizer: object, prompt: object, chosen: object, **lengths: object) -> TokenisedPair:
    record = PreferenceRecord(prompt, chosen, " other", "pairs.jsonl", 1)
    if isinstance(prompt, list):
        record = PreferenceRecord(prompt, chosen, [{"role": "assistant", "content": "other"}], "pairs.jsonl", 1)
    return Tokeniser(tokenizer, Lengths(**lengths)).pairs([record], DataReport("pairs.jsonl"))[0]


@pytest.mark.parametrize(("prompt", "response"), TEXTS)
def test_decoding_prompt_and_response_gives_back_the_text(tokenizer: object, prompt: str, response: str) -> None:
    pair = pair_of(tokenizer, prompt, response)
    start = [0] if not prompt else []
    assert pair.prompt_ids[: len(start)] == start
    assert tokenizer.decode(pair.prompt_ids[len(start) :] + pair.chosen_ids[:-1]) == prompt + response


@pytest.mark.parametrize(("prompt", "response"), [t for t in TEXTS if t[0] and END not in t[0]])
def test_a_tokenizer_that_prefixes_texts_adds_nothing_between_prompt_and_response(prompt: str, response: str) -> None:
    tokenizer = sentencepiece_like()
    pair = pair_of(tokenizer, prompt, response)
    assert pair.prompt_ids[0] == 1 and pair.prompt_ids.count(1) == 1 and 1 not in pair.chosen_ids
    assert tokenizer.decode(pair.prompt_ids[1:] + pair.chosen_ids[:-1]) == prompt + response


def test_special_token_text_in_data_is_plain_text_and_ends_nothing(tokenizer: object) -> None:
    pair = pair_of(tokenizer, f"say {END}", f" {END} x")
    assert 0 not in pair.prompt_ids and pair.chosen_ids.count(0) == 1 and pair.chosen_ids[-1] == 0


def test_real_tokenizers_round_trip_hh_dialogues(shared: Path) -> None:
    from tdpo.data.formats import to_records
    from tdpo.data.sources import read_source

    rows = read_source(str(shared / "data/hh/harmless-base_test.jsonl.gz"), "train")[:200]
    records, _ = to_records(rows)
    for name in ("tokenizers/gpt2", "tokenizers/gpt_neox", "models/stories260k"):
        tokenizer = AutoTokenizer.from_pretrained(shared / "data" / name)
        tokeniser = Tokeniser(tokenizer, Lengths(100_000, 50_000))
        pairs = tokeniser.pairs(records, DataReport("hh"))
        for record, pair in zip(records, pairs, strict=True):
            ids = pair.prompt_ids[len(tokeniser.encode.start) :] + pair.rejected_ids[:-1]
            assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == record.prompt + record.rejected
            assert pair.rejected_ids[-1] == tokenizer.eos_token_id


def test_the_whole_hh_file_is_read_and_its_five_odd_rows_are_named(shared: Path) -> None:
    from tdpo.data.formats import to_records
    from tdpo.data.sources import read_source

    records, report = to_records(read_source(str(shared / "data/hh/harmless-base_test.jsonl.gz"), "train"))
    assert (report.read, len(records)) == (2312, 2303)
    assert report.dropped["the two dialogues do not share their prompt"] == [1255, 1689, 1951, 1953, 2037]


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": "The river <|im_end|> or the garden?"}]
ANSWER = [{"role": "assistant", "content": "The river <|im_end|>."}]


def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_ends_turns_gives_exactly_one_end_token() -> None:
    tokenizer = chat_tokenizer(CHATML)
    end, eos = tokenizer.convert_tokens_to_ids("<|im_end|>"), tokenizer.eos_token_id
    pair = pair_of(tokenizer, CHAT, ANSWER)
    assert pair.chosen_ids.count(end) == 1 and pair.chosen_ids[-1] == end and eos not in pair.chosen_ids
    assert pair.prompt_ids.count(end) == 1  # the template's own; the user's words stay words
    rendered = tokenizer.decode(pair.prompt_ids + pair.chosen_ids)
    assert rendered == tokenizer.apply_chat_template(CHAT + ANSWER, tokenize=False).rstrip("\n")


def test_a_template_without_turn_ends_gets_the_end_token() -> None:
    tokenizer = chat_tokenizer(PLAIN)
    pair = pair_of(tokenizer, CHAT, ANSWER)
    assert pair.chosen_ids[-1] == tokenizer.eos_token_id and pair.chosen_ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(pair.chosen_ids[:-1]) == " The river <|im_end|>.\n"


def test_the_error_of_a_template_that_refuses_a_role_names_the_roles() -> None:
    refusing = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ raise_exception('no users here') }}{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match="the chat template refuses a chat with the roles user: no users here"):
        pair_of(chat_tokenizer(refusing), CHAT, ANSWER)


def test_chats_without_a_template_are_refused_with_the_options(tokenizer: object) -> None:
    with pytest.raises(UserError, match=r"no chat template: give one with --chat_template_path.*--columns prompt=q"):
        pair_of(tokenizer, CHAT, ANSWER)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"no end-of-sequence token.*--eos_token"):
        Tokeniser(tokenizer)


def fitted(mode: str, prompt: int, chosen: int, rejected: int) -> tuple[TokenisedPair, DataReport]:
    tokenizer = sentencepiece_like()
    report = DataReport("pairs.jsonl")
    letter = "b"
    record = PreferenceRecord("a" * prompt, letter * chosen, letter * rejected, "pairs.jsonl", 7)
    tokeniser = Tokeniser(tokenizer, Lengths(20, 8, mode))
    assert len(tokeniser.prompts([letter * 5])[0]) == 5 + 2, "one token a letter, a space and a start"
    return tokeniser.pairs([record], report)[0], report


def test_a_pair_within_the_limits_is_not_cut() -> None:
    pair, report = fitted("keep_end", 12, 5, 3)
    assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == (14, 6, 4)
    assert not report.truncated and not report.dropped


def test_an_overlong_pair_loses_prompt_tokens_first_then_response_tokens() -> None:
    pair, report = fitted("keep_end", 30, 9, 3)
    assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == (8, 10, 4)
    assert pair.chosen_ids[-1] == 2 and dict(report.truncated) == {"prompt": [7]}
    pair, report = fitted("keep_end", 30, 40, 3)
    assert (len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids)) == (8, 12, 4)
    assert pair.chosen_ids[-1] != 2, "a response that is cut has no end token"
    assert pair.rejected_ids[-1] == 2
    assert dict(report.truncated) == {"prompt": [7], "response": [7]}


def test_a_cut_prompt_keeps_its_start_token_and_the_end_of_the_truncation_mode() -> None:
    tokenizer = sentencepiece_like()
    record = PreferenceRecord("".join(chr(97 + i % 5) for i in range(30)), "b" * 9, "d", "pairs.jsonl", 7)
    whole = Tokeniser(tokenizer, Lengths(90, 80)).pairs([record], DataReport(""))[0].prompt_ids
    end = Tokeniser(tokenizer, Lengths(20, 8, "keep_end")).pairs([record], DataReport(""))[0].prompt_ids
    start = Tokeniser(tokenizer, Lengths(20, 8, "keep_start")).pairs([record], DataReport(""))[0].prompt_ids
    assert end == [1, *whole[-7:]] and start == whole[:8]


def test_overlong_rows_can_be_dropped_or_refused(tokenizer: object) -> None:
    record = PreferenceRecord("The river", " " + "sees " * 40, " x", "pairs.jsonl", 7)
    report = DataReport("pairs.jsonl")
    assert Tokeniser(tokenizer, Lengths(20, 8, on_overlong="drop")).pairs([record], report) == []
    assert dict(report.dropped) == {"longer than 20 tokens": [7]}
    with pytest.raises(
        UserError, match=r"pairs\.jsonl, row 7: prompt \d+ \+ response \d+ tokens exceed --max_length 20"
    ):
        Tokeniser(tokenizer, Lengths(20, 8, on_overlong="error")).pairs([record], report)


def test_limits_that_leave_no_room_for_a_response_are_refused() -> None:
    with pytest.raises(UserError, match=r"--max_length 8 must be larger than --max_prompt_length 8"):
        Lengths(8, 8)
