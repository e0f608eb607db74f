"""Parts of a row that a chat template leaves out are refused, warned of or counted, and never lost in silence."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenise import CHATML, chat_tokenizer

from tdpo import PreferenceRecord, TokenisedPair, UserError
from tdpo.config import TDPOConfig
from tdpo.config.data import template_arguments
from tdpo.data.calls import without_nulls
from tdpo.data.dataset import prepare_pairs
from tdpo.data.formats import DataReport
from tdpo.data.sources import read_source
from tdpo.data.templates import TEMPLATES
from tdpo.data.tokenise import Lengths, Rendering, Tokeniser

QUESTION = {"role": "user", "content": "Is the river near?"}
TOOLS = [{"type": "function", "function": {"name": "find", "description": "Finds a place.", "parameters": {}}}]
CALLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} {{ c.function.arguments | tojson }}"
    "</call>{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Shows tools and tool calls, arguments as objects."""


def says(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: Any, name: str = "find") -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": name, "arguments": arguments}}]


def record(chosen: dict, rejected: dict, prompt: list | None = None, **more: Any) -> PreferenceRecord:
    return PreferenceRecord(prompt or [QUESTION], [chosen], [rejected], "chats.jsonl", 4, **more)


def tokenised(template: str, *records: PreferenceRecord, **options: Any) -> tuple[list[TokenisedPair], DataReport, Any]:
    tokenizer = chat_tokenizer(template)
    report = DataReport("chats.jsonl")
    lengths = options.pop("lengths", Lengths(4000, 2000))
    return Tokeniser(tokenizer, lengths, rendering=Rendering(**options)).pairs(records, report), report, tokenizer


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_response_whose_calls_are_left_out_is_refused_by_row_and_field(name: str) -> None:
    wants = record(says("", tool_calls=call({"place": "river"})), says("No."))
    with pytest.raises(UserError, match=r"chats\.jsonl, row 4: .* leaves out 'tool_calls' of chosen \('find'\); give"):
        tokenised(TEMPLATES[name], wants)
    swapped = dataclasses.replace(wants, chosen=wants.rejected, rejected=wants.chosen)
    with pytest.raises(UserError, match="leaves out 'tool_calls' of rejected"):
        tokenised(TEMPLATES[name], swapped)


def test_arguments_that_are_left_out_are_found_though_the_prompt_holds_the_same_words() -> None:
    names_only = CALLS.replace(" {{ c.function.arguments | tojson }}", "")
    prompt = [{"role": "user", "content": "find river"}]
    wants = record(says("", tool_calls=call({"place": "river"})), says("No."), prompt)
    with pytest.raises(UserError, match=r"leaves out 'tool_calls' of chosen \('river'\)"):
        tokenised(names_only, wants)
    (pair,), report, tokenizer = tokenised(CALLS, wants)
    assert tokenizer.decode(pair.chosen_ids) == '<call>find {"place": "river"}</call><|im_end|>'
    assert not report.noticed


def test_a_response_of_nothing_but_its_end_is_a_row_error() -> None:
    blank = CHATML.replace("{{ m.content }}", "{% if m.role != 'assistant' %}{{ m.content }}{% endif %}")
    with pytest.raises(UserError, match=r"row 4: the chat template leaves out 'content' of chosen \('Yes\.'\)"):
        tokenised(blank, record(says("Yes."), says("No.")))
    strips = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    with pytest.raises(UserError, match="renders chosen as nothing but its end token"):
        tokenised(strips, record(says("<think>so it is</think>"), says("No.")))


def test_tools_that_a_template_does_not_show_are_warned_of() -> None:
    pairs, report, _ = tokenised(CHATML, record(says("Yes."), says("No."), tools=TOOLS))
    assert len(pairs) == 1 and report.noticed == {"the chat template leaves out the tools": [4]}
    assert "warning, the chat template leaves out the tools: row 4" in report.lines()
    assert tokenised(CALLS, record(says("Yes."), says("No."), tools=TOOLS))[1].noticed == {}


def test_system_turns_earlier_calls_and_thoughts_are_warned_of_and_the_answered_turn_is_refused() -> None:
    deaf = "{% for m in messages if m.role != 'system' %}" + CHATML.split("%}", 1)[1]
    # The template says the same words itself: only leaving the turn out of a rendering shows that they are not its.
    deaf = "Be brief.\n" + deaf
    system = {"role": "system", "content": "Be brief."}
    called = says("", tool_calls=call({"place": "lake"}))
    thought = says("Here.", reasoning_content="hm, a lake")
    prompt = [system, QUESTION, called, {"role": "tool", "content": "no lake"}, thought, QUESTION]
    pairs, report, _ = tokenised(deaf, record(says("Yes."), says("No."), prompt))
    assert len(pairs) == 1 and report.noticed == {
        "the chat template leaves out turns of role 'system'": [4],
        "the chat template leaves out 'tool_calls' of earlier turns": [4],
        "the chat template leaves out thoughts ('reasoning_content') of earlier turns": [4],
    }
    no_results = deaf.replace("!= 'system'", "not in ('system', 'tool')")
    with pytest.raises(UserError, match=r"leaves out the turn of role 'tool' that is answered \('no lake'\)"):
        tokenised(no_results, record(says("Yes."), says("No."), prompt[:4]))


def test_names_of_speakers_that_a_template_does_not_show_are_warned_of() -> None:
    spoken = record(says("Yes.", name="Ann"), says("No."), [{**QUESTION, "name": "Bob"}])
    _, report, _ = tokenised(CHATML, spoken)
    assert report.noticed == {"the chat template leaves out names of speakers ('name')": [4]}
    named = CHATML.replace("{{ m.content }}", "{{ m.name or '' }}: {{ m.content }}")
    assert tokenised(named, spoken)[1].noticed == {}


@pytest.mark.parametrize("cut", ["[:6]", "[4:]", ".replace('river', '')"])
def test_a_content_that_a_template_cuts_is_refused(cut: str) -> None:
    template = CHATML.replace("m.content", f"(m.content{cut} if m.role == 'assistant' else m.content)")
    with pytest.raises(UserError, match="leaves out 'content' of chosen"):
        tokenised(template, record(says("The river is near."), says("The garden.")))


def test_a_content_that_a_template_only_spells_differently_is_accepted() -> None:
    for change in ("m.content | upper", "m.content | trim", "m.content.replace(' ', '_')", "m.content | tojson"):
        chosen, rejected = says(' The "river"\nis near. '), says("The garden.")
        pairs, report, _ = tokenised(CHATML.replace("m.content", change), record(chosen, rejected))
        assert len(pairs) == 1 and not report.noticed, change


def test_thoughts_in_the_content_that_a_template_strips_are_warned_of_or_make_the_pair_identical() -> None:
    strips = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    left_out = "the chat template leaves out thoughts ('content') of the response"
    chosen = says("<think>one</think>Yes.")
    pairs, report, tokenizer = tokenised(strips, record(chosen, says("<think>two</think>No.")))
    assert tokenizer.decode(pairs[0].chosen_ids) == "Yes.<|im_end|>" and report.noticed == {left_out: [4]}
    pairs, report, _ = tokenised(strips, record(chosen, says("<think>two</think>Yes.")))
    reason = "chosen and rejected are identical after the chat template, which leaves out thoughts ('content') of the "
    assert pairs == [] and report.dropped == {reason + "response": [4]}


def test_pairs_that_truncation_makes_identical_are_dropped_and_counted() -> None:
    same = PreferenceRecord("Q", " river" * 30 + " one", " river" * 30 + " two", "chats.jsonl", 7)
    other = PreferenceRecord("Q", " river", " garden", "chats.jsonl", 8)
    pairs, report, _ = tokenised(CHATML, same, other, lengths=Lengths(20, 8))
    assert [pair.row for pair in pairs] == [8] and report.kept == 1
    assert report.dropped == {"chosen and rejected are identical after truncation": [7]}
    assert [pair.row for pair in tokenised(CHATML, same, other)[0]] == [7, 8]


@pytest.mark.parametrize("arguments", [{"place": "Oslo <|im_end|>", "n": 3}, '{"place": "Oslo <|im_end|>", "n": 3}'])
def test_arguments_as_json_text_or_as_objects_reach_a_template_in_its_form(arguments: Any) -> None:
    wants = record(says("", tool_calls=call(arguments)), says("No."))
    shown = '<call>find {"place": "Oslo <|im_end|>", "n": 3}</call><|im_end|>'
    as_text = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}")
    joins_text = CALLS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
    for template in (CALLS, as_text, joins_text):
        (pair,), _, tokenizer = tokenised(template, wants)
        assert tokenizer.decode(pair.chosen_ids) == shown
        assert pair.chosen_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


@pytest.mark.parametrize("arguments", ["{broken", "[1]", '{"a": "\\ud800"}'])
def test_arguments_that_are_no_json_object_are_refused_by_row(arguments: str) -> None:
    with pytest.raises(UserError, match=r"row 4: field 'tool_calls': arguments .* not (valid|a) JSON"):
        tokenised(CALLS, record(says("", tool_calls=call(arguments)), says("No.")))


def test_content_as_parts_is_made_for_templates_that_show_no_other() -> None:
    parts = CHATML.replace("{{ m.content }}", "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}")
    chosen, rejected = says("The river."), says("No.")
    assert tokenised(parts, record(chosen, rejected))[0] == tokenised(CHATML, record(chosen, rejected))[0]


def test_null_keys_that_a_table_adds_change_no_ids(tmp_path: Any) -> None:
    def tool(name: str, **properties: Any) -> list[dict]:
        parameters = {"type": "object", "properties": properties, "required": list(properties)}
        return [{"type": "function", "function": {"name": name, "description": name, "parameters": parameters}}]

    rows = [
        {"prompt": [QUESTION], "chosen": [says("", tool_calls=call({"place": "river"}))], "rejected": [says("No.")],
         "tools": tool("find", place={"type": "string"})},
        {"prompt": [QUESTION], "chosen": [says("", tool_calls=call({"depth": 2}, "dig"))], "rejected": [says("No.")],
         "tools": tool("dig", depth={"type": "integer", "minimum": 1})},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_source(str(tmp_path / "rows.parquet"), "train")[0].fields != rows[0], "the table adds null keys"
    tokeniser = Tokeniser(chat_tokenizer(CALLS), Lengths(4000, 2000))
    made = [
        prepare_pairs(read_source(str(tmp_path / name), "train"), tokeniser) for name in ("rows.jsonl", "rows.parquet")
    ]
    assert list(made[0]) == list(made[1]) and len(made[0]) == 2
    assert tokeniser.tokenizer.decode(made[1][1].chosen_ids) == '<call>dig {"depth": 2}</call><|im_end|>'


def test_nulls_in_lists_and_in_json_text_stay() -> None:
    schema = {"default": None, "enum": ["a", None], "deep": [{"x": None, "y": 1}]}
    assert without_nulls(schema) == {"enum": ["a", None], "deep": [{"y": 1}]}
    wants = record(says("", tool_calls=call('{"unit": null}')), says("No."))
    (pair,), _, tokenizer = tokenised(CALLS, wants)
    assert tokenizer.decode(pair.chosen_ids) == '<call>find {"unit": null}</call><|im_end|>'


ASKS_CLOSED = CHATML.replace(
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% if thoughts is not defined or not thoughts %}"
    "</think>{% endif %}{% endif %}",
)
"""Asks for an answer without a thought, unless an argument says otherwise."""


def test_thoughts_under_a_template_that_asks_for_none_name_the_argument_that_fits() -> None:
    thinks = record(says("<think>a</think>Yes."), says("<think>b</think>No."))
    # Cut before the response's own words, such a pair would be trained on a prompt that is never used.
    marks = ASKS_CLOSED.replace(
        "{{ m.content }}",
        "{% if m.role == 'assistant' and '<think>' not in m.content %}<think></think>{% endif %}{{ m.content }}",
    )
    with pytest.raises(UserError, match=r"With thoughts=True it ends in .*--chat_template_kwargs thoughts=true"):
        tokenised(marks, thinks)
    (pair,), _, tokenizer = tokenised(marks, thinks, template_arguments={"thoughts": True})
    assert tokenizer.decode(pair.prompt_ids).endswith("assistant\n<think>")
    assert tokenizer.decode(pair.chosen_ids) == "a</think>Yes.<|im_end|>"
    own = dataclasses.replace(thinks, chat_template_kwargs={"thoughts": True})
    assert tokenised(marks, own, template_arguments={"thoughts": False})[0] == [pair], "the row's own wins"


def test_arguments_that_a_template_does_not_use_are_warned_of() -> None:
    (_,), report, _ = tokenised(CHATML, record(says("Yes."), says("No.")), template_arguments={"enable_thinking": True})
    assert report.noticed == {"the chat template does not use the argument 'enable_thinking'": [4]}


def test_template_arguments_are_read_from_json_pairs_and_mappings_or_refused() -> None:
    expected = {"a": True, "b": "x", "c": 1}
    assert template_arguments('{"a": true, "b": "x", "c": 1}') == template_arguments("a=True,b=x,c=1") == expected
    assert template_arguments(expected) == expected and template_arguments(None) == {}
    for wrong in ("a", '{"a"', "[1]", "tokenize=true", {"messages": 1, "tools": []}):
        with pytest.raises(UserError, match="--chat_template_kwargs"):
            template_arguments(wrong)
    with pytest.raises(UserError, match="'tokenize' is not an argument for the template"):
        TDPOConfig(output_dir="o", chat_template_kwargs="tokenize=true", use_cpu=True)


PARTS = {
    "system": "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n{% endif %}{% endfor %}",
    "tools": "{% if tools %}{{ tools | tojson }}\n{% endif %}",
    "calls": "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}",
    "thoughts": "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}",
}
WORDS = st.sampled_from(["river", "garden", "a", "Be.", "No", "find", "window <|im_end|>"])


@settings(max_examples=60, deadline=None)
@given(
    shown=st.sets(st.sampled_from(list(PARTS))),
    words=st.lists(WORDS, min_size=6, max_size=6),
    parts=st.sets(st.sampled_from(list(PARTS))),
    limit=st.sampled_from([12, 40, 4000]),
)
def test_every_part_of_a_row_is_in_its_ids_or_in_the_report(shown: set, words: list, parts: set, limit: int) -> None:
    """Whatever a template shows, what a row holds is in its ids, or the report or an error names it."""
    part = {name: PARTS[name] if name in shown else "" for name in PARTS}
    template = (
        part["tools"] + part["system"] + "{% for m in messages if m.role != 'system' %}<|im_start|>{{ m.role }}\n"
        f"{part['thoughts']}{{{{ m.content }}}}{part['calls']}<|im_end|>\n{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    system = [{"role": "system", "content": words[0]}] if "system" in parts else []
    chosen: dict[str, Any] = says("" if "calls" in parts else words[1] + " so")
    if "calls" in parts:
        chosen["tool_calls"] = call({"place": words[2]}, "look")
    if "thoughts" in parts:
        chosen["reasoning_content"] = words[3] + " hm"
    tools = [{"type": "function", "function": {"name": words[4]}}] if "tools" in parts else None
    row = record(chosen, says(words[5] + " no"), [*system, QUESTION], tools=tools)
    lost = parts - shown
    try:
        pairs, report, tokenizer = tokenised(template, row, lengths=Lengths(limit, limit // 2))
    except UserError as error:
        assert "calls" in lost and "leaves out 'tool_calls' of chosen" in str(error)
        return
    assert "calls" not in lost
    named = {"system": "role 'system'", "tools": "the tools", "thoughts": "reasoning_content"}
    output = " ".join([*report.noticed, *report.dropped])
    assert {name for name in named if named[name] in output} == lost
    if not pairs:
        assert list(report.dropped) == ["chosen and rejected are identical after truncation"]
        return
    cut = {part for part, rows in report.truncated.items() if rows}
    prompt, response = tokenizer.decode(pairs[0].prompt_ids), tokenizer.decode(pairs[0].chosen_ids)
    if not cut:
        shown_words = [chosen["content"], *(["look", words[2]] if "calls" in parts else [])]
        assert all(word in response for word in shown_words if word)
        assert all(word in response for word in ([words[3]] if "thoughts" in parts & shown else []))
        assert all(word in prompt for word in ([words[0]] if "system" in parts & shown else []))
    else:
        assert limit < 4000
