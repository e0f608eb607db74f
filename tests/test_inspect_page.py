"""The token view in a real browser: values, colours, focus, keys, sorting, search, pages, themes, accessibility."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import Page
from conftest import make_model, sentences
from numeric_worlds import moved
from transformers import PreTrainedTokenizerFast

import tdpo
from tdpo import objectives
from tdpo.evaluate.inspect import Alternatives, InspectedPair, InspectedResponse
from tdpo.report.inspect import LARGEST_PAGE, Inspection
from tdpo.types import TokenisedPair

HOSTILE = "</script><script>hacked=1</script><img src=x onerror=hacked=1> {{7*7}} ${hacked=1} \" ' onload=hacked=1"
ARABIC, CHINESE = "مرحبا بالعالم", "你好，世界 👩‍🚀"


@pytest.fixture(scope="module")
def inspection(tokenizer: PreTrainedTokenizerFast) -> Inspection:
    """45 pairs, three pages: the first with texts that are hard to show, and with token weights."""
    reference = make_model(len(tokenizer))
    prompt, hostile, arabic, chinese = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("The river", HOSTILE, ARABIC, CHINESE)
    )
    weights = [0.5] + [1.0] * (len(arabic) - 1)
    first = [TokenisedPair(prompt, arabic, hostile, 1, weights), TokenisedPair(hostile, chinese, arabic, 2)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in sentences()[:129]]
    others = [TokenisedPair(*ids[3 * i : 3 * i + 3], row=i + 3) for i in range(43)]
    policy, objective = moved(reference, step=0.03), objectives.tdpo2(beta=0.3, alpha=0.7)
    return tdpo.inspect(policy, reference, first + others, objective, tokenizer, dataset_name=HOSTILE)


@pytest.fixture(scope="module")
def file(inspection: Inspection, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return inspection.save(tmp_path_factory.mktemp("page") / "page.html")


class Opened(Page):
    """The token view, and what went wrong on it."""

    ready = "article"

    def rows(self) -> list[int]:
        return self.page.eval_on_selector_all("article", "found => found.map((a) => Number(a.dataset.row))")

    def token(self, pair: int, side: int, index: int) -> Any:
        return self.page.locator("article").nth(pair).locator(".response").nth(side).locator(".t").nth(index)

    def panel(self) -> str:
        return self.page.locator("#token").inner_text()


@pytest.fixture
def opened(chromium: Any, file: Path) -> Iterator[Opened]:
    opened = Opened(chromium, file, viewport={"width": 1300, "height": 900})
    yield opened
    assert opened.problems == []
    opened.page.close()


def test_values_of_the_page_are_those_of_the_pairs(opened: Opened, inspection: Inspection) -> None:
    read = "found => found.map((a) => a.tokens.map((side) => side.map((t) => [t.logp, t.ref, t.kl, t.text, t.length])))"
    shown = opened.page.eval_on_selector_all("article", read)
    assert len(shown) == 20
    for sides, pair in zip(shown, inspection.pairs[:20], strict=True):
        for tokens, response in zip(sides, (pair.chosen, pair.rejected), strict=True):
            assert [(text, length) for *_, text, length in tokens] == response.pieces
            starts = np.cumsum([0, *(piece.tokens for piece in response.pieces)])[:-1]
            for column, name in enumerate(("logp", "ref_logp", "kl")):
                truth = np.add.reduceat(getattr(response, name), starts)
                assert [row[column] for row in tokens] == pytest.approx(truth, rel=1e-6)
    numbers = opened.page.locator("article").nth(1).locator(".numbers").first.inner_text()
    pair = inspection.pairs[1]
    assert f"loss {pair.loss:.4g}" in numbers and f"margin {pair.margin:.4g}" in numbers


def test_text_of_the_data_stays_text(opened: Opened) -> None:
    page = opened.page
    assert HOSTILE in page.locator("article").nth(0).locator(".response").nth(1).inner_text()
    assert HOSTILE in page.locator("article").nth(1).locator("details").inner_text()
    assert HOSTILE in page.locator("#about").inner_text()
    assert page.evaluate("typeof hacked") == "undefined" and page.locator("img").count() == 0


def test_scripts_read_from_right_to_left_and_without_spaces(opened: Opened) -> None:
    arabic, chinese = (opened.page.locator("article").nth(i).locator(".response").nth(0) for i in (0, 1))
    assert arabic.inner_text() == ARABIC and chinese.inner_text() == CHINESE
    assert arabic.evaluate("e => getComputedStyle(e).direction") == "rtl"
    assert chinese.evaluate("e => getComputedStyle(e).direction") == "ltr"
    first, second = (opened.token(0, 0, i).bounding_box() for i in (0, 1))
    assert second["x"] < first["x"]


def test_views_colour_tokens_by_their_values(opened: Opened, inspection: Inspection) -> None:
    response, scales = inspection.pairs[5].chosen, opened.page.evaluate("meta.scales")
    values = {
        "logratio": response.logratio, "kl": response.kl, "advantage": 0.3 * (response.logratio + response.kl),
        "weight": response.weights,
    }  # fmt: skip
    for number, (view, expected) in enumerate(values.items(), 1):
        if number % 2:
            opened.page.keyboard.press(str(number))
        else:
            opened.page.locator(f"input[value={view}]").check()
        for index, value in enumerate(expected):
            style = opened.token(5, 0, index).get_attribute("style")
            assert f"--v: {min(abs(value) / scales[view], 1):.3f}" in style
            assert ("minus" in style) == (value < 0)
        sums = opened.page.locator("article").nth(5).locator(".sums").inner_text()
        assert f"chosen (solid) {expected.sum():.4g}" in sums
    assert scales["logratio"] == pytest.approx(
        np.quantile(np.concatenate([abs(r.logratio) for p in inspection.pairs for r in (p.chosen, p.rejected)]), 0.98)
    )


def test_hover_and_focus_show_values_and_the_loss_with_this_token(opened: Opened, inspection: Inspection) -> None:
    pair = inspection.pairs[6]
    opened.token(6, 1, 0).hover()
    panel, response = opened.panel(), pair.rejected
    assert "token 1 of rejected" in panel
    assert f"{response.logratio[0]:.4g}" in panel and f"{response.kl[0]:.4g}" in panel
    top = response.alternatives
    best = int(np.argmax(top.policy[0]))
    assert f"{inspection.words[int(top.ids[0, best])]}\t{100 * top.policy[0, best]:.3g}%" in panel
    marks = opened.page.locator("#token .filled mark").all_inner_texts()
    assert [float(mark.strip("()")) for mark in marks] == pytest.approx(
        [response.logratio[0], response.kl[0]], rel=1e-4
    )
    opened.token(6, 0, 0).focus()
    assert "token 1 of chosen" in opened.panel()
    filled = opened.page.locator("#token .filled").inner_text()
    expression, _, result = filled.removesuffix(" nats").partition(" = ")
    functions = {"log": math.log, "sigmoid": lambda u: 1 / (1 + math.exp(-u))}
    value = eval(expression.replace("·", "*").replace("σ", "sigmoid"), functions)
    assert value == pytest.approx(pair.loss, rel=1e-3) and float(result) == pytest.approx(pair.loss, rel=1e-4)


def test_a_weighted_token_counts_with_its_weight(opened: Opened, inspection: Inspection) -> None:
    opened.token(0, 0, 0).hover()
    response = inspection.pairs[0].chosen
    size = response.pieces[0].tokens
    share = float(response.logratio[:size] @ response.weights[:size])
    mark = opened.page.locator("#token .filled mark").first.inner_text()
    assert float(mark.strip("()")) == pytest.approx(share, rel=1e-3)
    assert "0.5, 1" in opened.panel() and f"{size} tokens of one character" in opened.panel()


def test_arrow_keys_move_between_tokens(opened: Opened) -> None:
    opened.token(2, 0, 0).focus()
    for key, place in (("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("Home", 1)):
        opened.page.keyboard.press(key)
        assert f"token {place} of chosen" in opened.panel()
    opened.page.keyboard.press("End")
    last = opened.page.locator("article").nth(2).locator(".response").nth(0).locator(".t").last
    assert last.evaluate("e => e === document.activeElement && e.getAttribute('aria-selected') === 'true'")
    assert opened.page.locator(".t.on").count() == 1


def test_pairs_are_sorted_by_what_is_chosen(opened: Opened, inspection: Inspection) -> None:
    keys = {
        "loss": lambda pair: -pair.loss, "margin": lambda pair: pair.margin, "kl": lambda pair: -pair.kl,
        "largest": lambda pair: -pair.largest_kl, "data": lambda pair: pair.row,
    }  # fmt: skip
    for name, key in keys.items():
        opened.page.locator("#sort").select_option(name)
        order = sorted(range(45), key=lambda row: key(inspection.pairs[row]))
        assert opened.rows() == order[:20]


def test_search_finds_text_and_rows(opened: Opened) -> None:
    search, status = opened.page.locator("#search"), opened.page.locator("#status")
    for text, rows in ((CHINESE, [1]), ("ONERROR=HACKED", [0, 1]), ("#45", [44]), ("no such text", [])):
        opened.page.keyboard.press("/") if text == CHINESE else None
        search.fill(text)
        opened.page.wait_for_function(f"state.order.length === {len(rows)}")
        opened.page.wait_for_function(f"document.querySelectorAll('article').length === {len(rows)}")
        assert opened.rows() == rows
    assert status.inner_text() == "no pair matches"
    search.fill("")
    opened.page.wait_for_function("document.querySelectorAll('article').length === 20")


def test_pages_turn_by_buttons_and_keys(opened: Opened) -> None:
    first = opened.page.locator(".pages").first
    first.get_by_text("next").click()
    opened.page.wait_for_function("document.querySelector('article').dataset.row === '20'")
    opened.page.keyboard.press("n")
    opened.page.wait_for_function("document.querySelector('article').dataset.row === '40'")
    assert opened.rows() == [40, 41, 42, 43, 44] and first.get_by_text("next").is_disabled()
    opened.page.keyboard.press("p")
    opened.page.wait_for_function("document.querySelector('article').dataset.row === '20'")
    assert opened.page.locator("#status").inner_text() == "pairs 21 to 40 of 45"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything_in_its_width(chromium: Any, file: Path, scheme: str) -> None:
    opened = Opened(chromium, file, viewport={"width": 400, "height": 800}, color_scheme=scheme, has_touch=True)
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 400
    assert not opened.page.locator("#token").is_visible()
    opened.token(2, 0, 0).tap()
    assert "token 1 of chosen" in opened.panel()
    opened.page.get_by_label("close").click()
    assert not opened.page.locator("#token").is_visible()
    assert opened.page.evaluate("document.documentElement.dataset.theme") == scheme
    opened.page.locator("#theme").select_option("dark")
    assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 26)"
    assert opened.problems == []
    opened.page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1300, 400])
def test_axe_finds_nothing_serious(chromium: Any, file: Path, scheme: str, width: int) -> None:
    opened = Opened(chromium, file, viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened.token(2, 0, 0).click()
    assert opened.serious_findings() == []
    opened.page.close()


def test_a_page_without_weights_offers_no_view_of_them(chromium: Any, inspection: Inspection, tmp_path: Path) -> None:
    plain = Inspection(inspection.pairs[2:4], objectives.tbpo(), inspection.words)
    opened = Opened(chromium, plain.save(tmp_path / "page.html"))
    assert opened.page.locator("#views input").count() == 3
    assert "1 to 3 change the colour" in opened.page.locator(".hint").first.inner_text()
    opened.token(0, 0, 0).hover()
    assert "loss of this pair, tbpo(beta=0.1)" in opened.panel()
    assert opened.problems == []
    opened.page.close()


@pytest.mark.slow
def test_five_thousand_pairs_open_from_less_than_20_megabytes(chromium: Any, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    words = {i: f" word{i}" for i in range(50_000)}

    def response() -> InspectedResponse:
        ids = generator.integers(0, 50_000, 120)
        ref_logp = -generator.exponential(2.5, 120)
        logp = np.minimum(ref_logp + generator.normal(0, 0.5, 120), -1e-6)
        chances = generator.dirichlet(np.ones(10), 120)
        top = Alternatives(generator.integers(0, 50_000, (120, 10)), chances, chances[:, ::-1])
        texts = [tdpo.data.token_texts.Piece(words[int(i)], 1) for i in ids]
        kl, ones = generator.exponential(0.1, 120), np.ones(120)
        return InspectedResponse(ids.tolist(), texts, logp, ref_logp, kl, ones, ones, top, float(logp.sum()))

    pairs = [InspectedPair(row, "a prompt", response(), response(), 0.5) for row in range(1, 5001)]
    file = Inspection(pairs, objectives.tdpo2(), words).save(tmp_path / "page.html")
    assert 0.8 * LARGEST_PAGE < file.stat().st_size < LARGEST_PAGE
    opened = Opened(chromium, file)
    shown = opened.page.evaluate("performance.now()")
    assert opened.page.locator("#status").inner_text() == "pairs 1 to 20 of 5,000"
    assert shown < 2000 and opened.problems == []
    read = "document.querySelector('article').tokens[0].map((t) => t.logratio)"
    assert opened.page.evaluate(read) == pytest.approx(pairs[0].chosen.logratio, abs=2e-3)
    opened.page.close()
