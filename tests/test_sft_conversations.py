"""Supervised conversations: which tokens are learnt, behind which they are, and the shapes the rows come in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import END, make_model, make_tokenizer, write_jsonl
from test_probe_neighbours import SWITCH, phi3

from tdpo import SFTConfig, SFTTrainer, UserError
from tdpo.cli import main
from tdpo.config.row_spec import RowSpec, parse_columns
from tdpo.data.sft import MASKED, SFTDataset, prepare_sft
from tdpo.data.templates import CHATML
from tdpo.data.tokenise import Lengths, Tokeniser

PLAIN_TURNS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
LAST_ONLY_THINKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}THINK {% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TWO_TURNS = [
    {"role": "user", "content": "The river?"},
    {"role": "assistant", "content": "The garden."},
    {"role": "user", "content": "The window?"},
    {"role": "assistant", "content": "The teacher sees."},
]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def chat_tokenizer(template: str = CHATML) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def prepared(rows: list[Any], tokenizer: Any, max_length: int = 120, **options: Any) -> SFTDataset:
    return prepare_sft(rows, Tokeniser(tokenizer, Lengths(max_length, max_length // 2)), name="rows", **options)


def learnt(dataset: SFTDataset, tokenizer: Any) -> list[tuple[str, str]]:
    """Each example as its whole text and, between bars, what is learnt of it."""
    shown = []
    for example in dataset:
        labels = example.labels or example.response_ids
        parts = [tokenizer.decode([label]) if label != MASKED else "|" for label in labels]
        marked = "|".join(part for part in "".join(parts).split("|") if part)
        shown.append((tokenizer.decode(example.prompt_ids + example.response_ids), marked))
    return shown


def show(rows: list[Any], template: str = CHATML, **options: Any) -> list[tuple[str, str]]:
    tokenizer = chat_tokenizer(template)
    return learnt(prepared(rows, tokenizer, **options), tokenizer)


def rendered(*messages: dict[str, Any]) -> str:
    return "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)[:-1]


def test_every_assistant_turn_is_learnt_with_its_end_or_the_last_alone() -> None:
    tokenizer = chat_tokenizer()
    tokenizer_end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = [{"messages": TWO_TURNS}]
    every = prepared(rows, tokenizer)
    (example,) = every
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)
    assert example.prompt_ids + example.response_ids == whole[:-1]  # the line break behind the last end
    first, last = tokenizer.encode("The garden."), tokenizer.encode("The teacher sees.")
    labels = [label for label in example.labels or [] if label != MASKED]
    assert labels == [*first, tokenizer_end, *last, tokenizer_end]
    assert "assistant turns: 1; all 2 turns are learnt" in every.report.lines()[-1]
    alone = prepared(rows, tokenizer, train_on="last_turn")
    assert alone.examples[0].prompt_ids + alone.examples[0].response_ids == whole[:-1]
    assert (alone.examples[0].response_ids, alone.examples[0].labels) == ([*last, tokenizer_end], None)
    assert "assistant turns: 1; of 2 turns only the last of each is learnt" in alone.report.lines()[-1]


def test_a_turn_that_is_rendered_differently_later_gets_a_sequence_of_its_own() -> None:
    """Qwen3 and DeepSeek-R1 strip the thoughts of earlier turns: one sequence cannot hold both renderings."""
    tokenizer = chat_tokenizer(LAST_ONLY_THINKS)
    rows = [{"messages": [*TWO_TURNS, user("The engine?"), assistant("The forest.")]}, {"messages": TWO_TURNS[:2]}]
    dataset = prepared(rows, tokenizer)
    shown = learnt(dataset, tokenizer)
    texts = ["THINK The garden.", "THINK The teacher sees.", "THINK The forest.", "THINK The garden."]
    assert [marked for _, marked in shown] == [f"{text}<|im_end|>" for text in texts]
    assert shown[1][0] == rendered(*TWO_TURNS[:3], assistant("THINK The teacher sees."))
    assert [example.row for example in dataset] == [1, 1, 1, 2]
    assert dataset.report.lines()[0] == "rows (messages): 2 rows, 4 sequences of them"
    assert dataset.report.lines()[1].startswith("warning, several sequences, because")
    assert list(dataset.report.noticed.values()) == [[1]]


def test_an_end_token_the_template_does_not_write_is_learnt_and_not_read() -> None:
    """The end is the label at a turn's last token; the next turn stands behind the ids it is asked with."""
    tokenizer = chat_tokenizer(PLAIN_TURNS)
    (example,) = prepared([{"messages": TWO_TURNS}], tokenizer)
    whole = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert tokenizer.decode(example.prompt_ids + example.response_ids) == whole + END
    labels = example.labels or []
    ends = [place for place, label in enumerate(labels) if label == tokenizer.eos_token_id]
    assert len(ends) == 2 and ends[1] == len(labels) - 1
    assert tokenizer.decode(example.response_ids[: ends[0]]) == " The garden.\n"
    assert tokenizer.decode(example.response_ids[ends[0] :]).startswith("user: The window?")


def by_hand(model: Any, tokenizer: Any, conversation: list[dict[str, Any]]) -> tuple[float, int]:
    """Summed NLL and token count of the assistant turns, from all logits of the rendered conversation."""
    end, start = (tokenizer.convert_tokens_to_ids(f"<|im_{word}|>") for word in ("end", "start"))
    ids = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
    logp = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    header = [start, *tokenizer.encode("assistant\n")]
    total, count, inside = 0.0, 0, False
    for place in range(1, len(ids)):
        inside = inside or ids[place - len(header) : place] == header
        if inside:
            total, count = total - logp[place - 1, ids[place]].item(), count + 1
            inside = ids[place] != end
    return total, count


@pytest.mark.parametrize("layout", ["padded", "tree"])
def test_the_loss_is_the_mean_over_the_tokens_of_all_turns(tmp_path: Path, layout: str) -> None:
    tokenizer = chat_tokenizer()
    model = make_model(len(tokenizer))
    conversations = [TWO_TURNS, TWO_TURNS[:2], [*TWO_TURNS[2:], user("The violin?"), assistant("The market.")]]
    sums = [by_hand(model, tokenizer, conversation) for conversation in conversations]
    expected = sum(total for total, _ in sums) / sum(count for _, count in sums)
    rows = [{"messages": conversation} for conversation in conversations]
    for batch_size in (1, 3):
        args = SFTConfig(
            output_dir=str(tmp_path), layout=layout, use_cpu=True, per_device_eval_batch_size=batch_size,
            disable_tqdm=True,
        )  # fmt: skip
        trainer = SFTTrainer(model, args, eval_dataset=rows, processing_class=tokenizer)
        batch = trainer.data_collator(trainer.eval_dataset.examples)
        assert batch[trainer.items_key].numel() == sum(count for _, count in sums) == sum(batch["lengths"])
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_turns_that_are_not_learnt_are_read_beyond_a_switch_of_rotary_frequencies(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    model = phi3(vocab_size=len(tokenizer))
    conversation = [*TWO_TURNS, *TWO_TURNS]
    expected, count = by_hand(model, tokenizer, conversation)
    assert len(tokenizer.apply_chat_template(conversation, return_dict=False)) > SWITCH
    args = SFTConfig(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True)
    trainer = SFTTrainer(model, args, eval_dataset=[{"messages": conversation}], processing_class=tokenizer)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected / count, rel=1e-5)


def test_accumulation_over_conversations_equals_the_large_batch(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    rows = [{"messages": TWO_TURNS[:2]}, {"messages": TWO_TURNS}, {"messages": TWO_TURNS[2:]}]
    ends = []
    for micro, steps, layout in ((3, 1, "padded"), (1, 3, "padded"), (2, 2, "tree")):
        model = make_model(len(tokenizer))
        args = SFTConfig(
            output_dir=str(tmp_path), layout=layout, use_cpu=True, per_device_train_batch_size=micro, max_steps=2,
            gradient_accumulation_steps=steps, optim="sgd", learning_rate=0.5, disable_tqdm=True, save_strategy="no",
            train_sampling_strategy="sequential",
        )  # fmt: skip
        SFTTrainer(model, args, rows, processing_class=tokenizer).train()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-4, atol=1e-6)


def test_truncation_is_counted_and_leaves_something_to_learn() -> None:
    tokenizer = chat_tokenizer()
    ids = tokenizer.apply_chat_template(TWO_TURNS, tokenize=True, return_dict=False)
    seen = set()
    for limit in range(12, len(ids)):
        (example,) = dataset = prepared([{"messages": TWO_TURNS}], tokenizer, max_length=limit)
        labels = example.labels or example.response_ids
        assert len(example.prompt_ids) + len(example.response_ids) <= limit and len(labels) == len(example.response_ids)
        assert labels[0] != MASKED and labels[-1] != MASKED
        seen.add(dataset.report.truncated["response"] == [1])
    assert seen == {True, False}


SYSTEM = {"role": "system", "content": "Be brief."}
ONE_TURN = (rendered(user("The river?"), assistant("The garden.")), "The garden.<|im_end|>")
BOTH = (rendered(*TWO_TURNS), "The garden.<|im_end|>|The teacher sees.<|im_end|>")
SECOND = (BOTH[0], "The teacher sees.<|im_end|>")
JOINED = (rendered(user("The\nriver?"), TWO_TURNS[1]), "The garden.<|im_end|>")
FIRST_ROUND = ["The river?", "The garden."]
TOOL, REPLY = {"role": "tool", "content": "42"}, assistant("The engine.")
AGAIN = "The garden.<|im_end|>|The engine.<|im_end|>"
WITH_SYSTEM = (rendered(SYSTEM, *TWO_TURNS[:2]), "The garden.<|im_end|>")
FROM_VALUE = [
    {"from": "human", "value": "The river?"},
    {"from": "gpt", "value": "The garden."},
    {"from": "human", "value": "The window?"},
    {"from": "gpt", "value": "The teacher sees."},
]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": FROM_VALUE}, BOTH),
        ({"conversation": TWO_TURNS}, BOTH),
        ({"messages": FROM_VALUE}, BOTH),
        ({"conversations": json.dumps(TWO_TURNS)}, BOTH),
        ({"conversation": [{"input": "The river?", "output": "The garden."}]}, ONE_TURN),
        ({"conversations": [{"from": "system", "value": "Be brief."}, *FROM_VALUE[:2]]}, WITH_SYSTEM),
        ({"conversations": FROM_VALUE[:2], "system": "Be brief."}, WITH_SYSTEM),
        ({"messages": [SYSTEM, *TWO_TURNS[:2]], "system": "Be brief."}, WITH_SYSTEM),
        ({"instruction": "The river?", "input": "", "output": "The garden."}, ONE_TURN),
        ({"instruction": "", "input": "The river?", "output": "The garden.", "text": "all of it"}, ONE_TURN),
        ({"instruction": "The", "input": "river?", "output": "The garden."}, JOINED),
        ({"instruction": "The", "context": "river?", "response": "The garden."}, JOINED),
        ({"instruction": "The window?", "output": "The teacher sees.", "history": [FIRST_ROUND]}, BOTH),
        ({"instruction": "The river?", "output": "The garden.", "system": "Be brief."}, WITH_SYSTEM),
        ({"question": "The river?", "answer": "The garden."}, ONE_TURN),
        ({"query": "The river?", "response": "The garden."}, ONE_TURN),
        ({"problem": "The river?", "solution": "The garden."}, ONE_TURN),
        ({"system_prompt": "Be brief.", "question": "The river?", "response": "The garden."}, WITH_SYSTEM),
        ({"prompt": "The river?", "completion": "The garden.", "system": "Be brief."}, WITH_SYSTEM),
        ({"prompt": "The river", "response": " sees"}, ("The river sees" + END, " sees" + END)),
        ({"prompt": "The river?", "completion": "The garden.", "system": ""}, ONE_TURN),
        ({"prompt": "The river", "answer": " sees"}, ("The river sees" + END, " sees" + END)),
        ({"prompt": TWO_TURNS[:3], "completion": TWO_TURNS[3:]}, SECOND),
        ({"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:]}, BOTH),
        ({"prompt": TWO_TURNS[:1], "completion": "The garden."}, ONE_TURN),
        ({"messages": [*TWO_TURNS[:2], user("The window?")]}, ONE_TURN),
        ({"messages": [TWO_TURNS[0], assistant("The garden.", weight=0), *TWO_TURNS[2:]]}, SECOND),
        ({"messages": [*TWO_TURNS[:3], assistant("The teacher sees.", weight=0)]}, ONE_TURN),
        ({"messages": [TWO_TURNS[0], {**TWO_TURNS[1], "loss": False}, *TWO_TURNS[2:]]}, SECOND),
        ({"conversations": [FROM_VALUE[0], {**FROM_VALUE[1], "weight": 0.0}, *FROM_VALUE[2:]]}, SECOND),
        ({"messages": [*TWO_TURNS[:2], REPLY]}, (rendered(*TWO_TURNS[:2], REPLY), AGAIN)),
        ({"messages": [*TWO_TURNS[:2], TOOL, REPLY]}, (rendered(*TWO_TURNS[:2], TOOL, REPLY), AGAIN)),
    ],
)  # fmt: skip
def test_supervised_rows_of_every_shape(row: dict[str, Any], expected: tuple[str, str]) -> None:
    assert show([row]) == [expected]


def test_a_conversation_that_begins_with_the_assistant_reads_that_turn() -> None:
    tokenizer = chat_tokenizer()
    dataset = prepared([{"messages": [assistant("The engine."), *TWO_TURNS[:2]]}], tokenizer)
    assert learnt(dataset, tokenizer) == [
        (rendered(assistant("The engine."), *TWO_TURNS[:2]), "The garden.<|im_end|>"),
    ]
    assert "the first turn is the assistant's, which is read but not learnt" in dataset.report.lines()[1]
    unanswered = prepared([{"messages": TWO_TURNS[:3]}], tokenizer)
    assert unanswered.report.lines()[1] == "warning, the last turn is left out, because nothing answers it: row 1"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [TWO_TURNS[0]]}, "row 1: field 'messages' holds no assistant turn to learn"),
        ({"messages": [assistant("The garden.")]}, "holds no assistant turn to learn that another turn precedes"),
        ({"messages": [user("x"), {"role": "critic", "content": "y"}]}, "roles: user, critic"),
        ({"messages": [user("x"), assistant(" "), user("y"), assistant("z")]}, "empty assistant turn, message 2 of 4"),
        ({"messages": [user("x"), assistant("y", weight=0.5)]}, "turn 2, 'weight' must be 0 or 1, found"),
        ({"messages": [SYSTEM, *TWO_TURNS[:2]], "system": "Be long."}, "field 'system' and the system turn .* differ"),
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 1 must be 'from' one of human, user, gpt"),
        ({"question": "x", "answer": "y", "solution": "z"}, "may each be the response; .* --columns response=solution"),
        ({"question": "x", "query": "y", "answer": "z"}, "the column 'query' holds what .* --ignore_columns query "),
        ({"instruction": "", "output": "y"}, "field 'instruction' is empty"),
        ({"instruction": "x", "output": ""}, "field 'output' is empty"),
        ({"prompt": "x", "completion": TWO_TURNS[1:2]}, "one of 'prompt' and 'completion' is a text"),
    ],
)  # fmt: skip
def test_rows_without_a_turn_to_learn_are_named(row: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        show([row])


def test_a_named_column_decides_between_several_answers() -> None:
    both = {"question": "42?", "query": "The river?", "answer": "The garden."}
    assert show([both], spec=RowSpec(columns=parse_columns("question=query"))) == [ONE_TURN]
    row = {"question": "The river?", "answer": "42", "solution": "The garden."}
    assert show([row], spec=RowSpec(columns=parse_columns("solution=solution"))) == [ONE_TURN]
    assert show([row], spec=RowSpec(columns=parse_columns("response=solution"))) == [ONE_TURN]


def test_a_function_of_the_users_returns_any_supervised_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_sft_rows.py").write_text(
        "def convert(row):\n    return {'messages': row['dialog']}\n"
        "def pair(row):\n    return {'prompt': 'The', 'chosen': ' river', 'rejected': ' engine'}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert show([{"dialog": TWO_TURNS}], spec="my_sft_rows:convert") == [BOTH]
    assert show([{"dialog": TWO_TURNS}], spec="my_sft_rows:pair") == [("The river" + END, " river" + END)]


def test_answers_labelled_as_unwanted_are_not_learnt() -> None:
    rows = [{"prompt": "The", "completion": f" river {label}", "label": label} for label in (True, False)]
    dataset = prepared(rows, chat_tokenizer())
    assert [example.row for example in dataset] == [1]
    assert dict(dataset.report.dropped) == {"its label is false, an answer that is not wanted": [2]}
    for name in ("label", "kto_tag", "is_safe"):  # TRL's, LLaMA-Factory's, BeaverTails'; CSV holds them as text
        for row in (
            {"messages": TWO_TURNS}, {"instruction": "Why?", "output": "A."}, {"prompt": "Q:", "response": "A."},
        ):  # fmt: skip
            dataset = prepared(
                [{**row, name: label} for label in (True, False, "True", "False", None)], chat_tokenizer()
            )
            assert {example.row for example in dataset} == {1, 3, 5}
            assert dict(dataset.report.dropped) == {f"its {name} is false, an answer that is not wanted": [2, 4]}
    assert dataset.report.lines()[-1].startswith("warning, the prompt is a plain text and used as it stands")


def test_a_conversation_the_template_refuses_is_dropped_once_and_whole() -> None:
    template = (
        "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}{% endfor %}" + CHATML
    )
    rows = [
        {"messages": TWO_TURNS},
        {"messages": [*TWO_TURNS, user("x"), assistant("bad"), user("y"), assistant("z")]},
        {"messages": TWO_TURNS[:2]},
    ]
    tokenizer = chat_tokenizer(template)
    dataset = prepared(rows, tokenizer, on_bad_row="drop")
    assert [example.row for example in dataset] == [1, 3]
    assert list(dataset.report.dropped.values()) == [[2]]
    doubled = prepared(rows, tokenizer, on_bad_row="drop", spec=RowSpec(weight=2))
    assert [example.row for example in doubled] == [1, 1, 3, 3]
    with pytest.raises(UserError, match="rows, row 2: the chat template refuses"):
        prepared(rows, tokenizer)


def test_overlong_conversations_are_all_named() -> None:
    strict = Tokeniser(chat_tokenizer(), Lengths(20, 10, on_overlong="error"))
    with pytest.raises(UserError, match=r"row 1: prompt .*\n.*row 2: prompt"):
        prepare_sft([{"messages": TWO_TURNS}] * 2, strict)


def test_the_command_reports_the_turns_it_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    make_model(len(tokenizer)).save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "chats.jsonl", [{"messages": TWO_TURNS}] * 2)
    for option, line in (("every_turn", "all 4 turns are learnt"), ("last_turn", "of 4 turns only the last")):
        words = [
            "sft", "--model_name_or_path", tmp_path / "model", "--dataset_name", data,
            "--output_dir", tmp_path / option, "--max_steps", 1,
            "--use_cpu", "--disable_tqdm", "--save_strategy", "no", "--train_on", option,
        ]  # fmt: skip
        assert main([str(word) for word in words]) == 0
        assert line in capsys.readouterr().out
    assert main(["sft", "--output_dir", str(tmp_path / "no"), "--train_on", "some"]) == 2
