"""Supervised fine-tuning: the loss is transformers' own on the same labels, on every kind of row."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer, preference_rows

from tdpo import SFTConfig, SFTTrainer, UserError
from tdpo.data.sft import prepare_sft
from tdpo.data.tokenise import Lengths, Tokeniser

CHAT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXTS = [{"text": f"The river likes the {i}."} for i in range(12)]


def prepared(rows: list[dict], tokenizer: Any = None, **lengths: Any) -> Any:
    return prepare_sft(
        rows,
        Tokeniser(tokenizer or make_tokenizer(), Lengths(**{"max_length": 96, "max_prompt_length": 48, **lengths})),
    )


def config(folder: Path, **options: Any) -> SFTConfig:
    defaults = {"max_length": 96, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return SFTConfig(output_dir=str(folder), **{**defaults, **options})


def test_every_kind_of_row_becomes_prompt_and_response(tokenizer: Any) -> None:
    def decoded(rows: list[dict], used: Any = tokenizer) -> tuple[str, str]:
        example = prepared(rows, used).examples[0]
        return used.decode(example.prompt_ids), used.decode(example.response_ids)

    chat_tokenizer = make_tokenizer()
    chat_tokenizer.chat_template = CHAT
    end = tokenizer.eos_token
    row = preference_rows(1)[0]
    assert decoded([row]) == (row["prompt"], row["chosen"] + end)
    assert decoded([{"prompt": "The", "completion": " river"}]) == ("The", " river" + end)
    first, rest = decoded([{"text": "The river"}])
    assert first and first + rest == "The river" + end
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert decoded([{"messages": messages}], chat_tokenizer) == ("user: Hi\nassistant:", " Yes\n" + end)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "rows, row 2: field 'text' is empty"),
        ({"text": 3}, "rows, row 2: field 'text' must be a text or a list"),
        ({"other": "x"}, "rows, row 2: field 'text' is missing"),
    ],
)
def test_bad_rows_are_named(tokenizer: Any, row: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare_sft([TEXTS[0], row], Tokeniser(tokenizer), name="rows")
    with pytest.raises(UserError, match=r"Known formats:\n  completion: prompt, completion\n  messages: "):
        prepare_sft([{"other": "x"}], Tokeniser(tokenizer))
    with pytest.raises(UserError, match="no assistant turn to learn that another turn precedes; roles: user, user"):
        prepare_sft([{"messages": [{"role": "user", "content": "Hi"}] * 2}], Tokeniser(tokenizer))


def test_the_loss_is_transformers_own_on_response_tokens(tmp_path: Path, tokenizer: Any) -> None:
    rows = [*preference_rows(5), *preference_rows(3)]
    model = make_model(len(tokenizer))
    total = count = 0.0
    for example in prepared(rows).examples:
        ids = torch.tensor([example.prompt_ids + example.response_ids])
        labels = torch.tensor([[-100] * len(example.prompt_ids) + example.response_ids])
        total += model(input_ids=ids, labels=labels).loss.item() * len(example.response_ids)
        count += len(example.response_ids)
    for batch_size, layout in ((1, "padded"), (3, "tree"), (8, "padded"), (8, "tree")):
        args = config(tmp_path, per_device_eval_batch_size=batch_size, layout=layout)
        trainer = SFTTrainer(model, args, eval_dataset=rows, processing_class=tokenizer)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)


def test_accumulation_equals_the_large_batch_token_by_token(tmp_path: Path, tokenizer: Any) -> None:
    """Micro-batches hold different numbers of tokens; a mean of means would differ."""
    rows = [{"prompt": "The", "completion": " river" * (1 + 3 * i)} for i in range(8)]
    ends = []
    for micro, steps, layout in ((8, 1, "padded"), (2, 4, "padded"), (3, 3, "padded"), (8, 1, "tree")):
        model = make_model(len(tokenizer))
        options = {"optim": "sgd", "learning_rate": 0.5, "max_steps": 2, "train_sampling_strategy": "sequential"}
        options["layout"] = layout
        args = config(tmp_path, per_device_train_batch_size=micro, gradient_accumulation_steps=steps, **options)
        trainer = SFTTrainer(model, args, rows, processing_class=tokenizer)
        trainer.train()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-4, atol=1e-6)


def test_training_on_plain_texts_lowers_the_loss(tmp_path: Path, tokenizer: Any) -> None:
    args = config(tmp_path, max_steps=30)
    trainer = SFTTrainer(make_model(len(tokenizer)), args, TEXTS, TEXTS, tokenizer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert before > 0.9 * math.log(len(tokenizer))
    assert trainer.evaluate()["eval_loss"] < 1.0


def test_an_overlong_example_keeps_half_its_room_for_the_response(tokenizer: Any) -> None:
    row = {"prompt": "a b " * 60, "completion": " c d" * 60}
    dataset = prepared([row], tokenizer, max_length=40, max_prompt_length=20)
    example = dataset.examples[0]
    assert (len(example.prompt_ids), len(example.response_ids)) == (20, 20)
    assert dict(dataset.report.truncated) == {"prompt": [1], "response": [1]}
    assert SFTConfig(output_dir="unused", max_length=40).lengths().max_prompt_length == 20
