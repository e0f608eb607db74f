"""The token view: preference pairs token by token, as a self-contained HTML page, JSON lines or terminal output."""

from __future__ import annotations

import base64
import gzip
import hashlib
import html
import json
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import nn

from tdpo.evaluate.inspect import Floats, InspectedPair, InspectedResponse, inspect_pairs
from tdpo.files import atomic_write
from tdpo.models.reference import Reference
from tdpo.objectives import Objective
from tdpo.train.progress import without_control
from tdpo.types import TokenisedPair

CHUNK = 32
"""Pairs that the page unpacks together."""
LARGEST_PAGE = 20_000_000
"""Bytes. Alternatives of the tokens that differ least between the models are left out of a larger page."""
BYTES_PER_TOKEN, BYTES_OF_ALTERNATIVES = 115, 90
"""Upper estimates for a token in the page, and for its alternatives alone."""
FLOAT32_BITS, STATISTIC_BITS, PROBABILITY_BITS = 23, 14, 10
"""Bits of the fraction of numbers in the page: all, those of statistics in a large page, those of alternatives."""
TYPICAL = 0.98
"""Share of tokens that are coloured below full strength."""
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Inspection:
    """Pairs token by token. Displays itself as a page in a notebook.

    Attributes:
        pairs: The pairs.
        objective: The objective that defines losses and rewards.
        words: Text of each token of responses and alternatives on its own, by id.
        policy: Name of the policy.
        reference: Name of the reference.
        dataset: Name of the data.
    """

    pairs: Sequence[InspectedPair]
    objective: Objective
    words: dict[int, str]
    policy: str = "policy"
    reference: str = "reference"
    dataset: str = ""

    def html(self) -> str:
        """Returns the page.

        Statistics are in float32; in pages that would exceed :data:`LARGEST_PAGE` they have a relative error of 3e-5,
        and alternatives are left out where the two models differ least.
        """
        tokens = sum(len(response.ids) for response in _responses(self.pairs))
        if tokens * BYTES_PER_TOKEN <= LARGEST_PAGE:
            return _page(self, tokens, FLOAT32_BITS)
        spare = int(0.95 * LARGEST_PAGE) - len(_page(self, 0).encode())  # the rest is for texts of alternatives
        return _page(self, min(max(spare, 0) // BYTES_OF_ALTERNATIVES, tokens))

    def save(self, path: str | Path) -> Path:
        """Writes the page to a file, atomically."""
        atomic_write(Path(path), self.html())
        return Path(path)

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yields a JSON object for each pair: sums, and lists with one item per token."""
        for pair in self.pairs:
            sides = {side: self._response(getattr(pair, side)) for side in SIDES}
            sums = {name: _json_number(getattr(pair, name)) for name in ("loss", "margin")}
            yield {"row": pair.row, "prompt": pair.prompt, **sums, **sides}

    def _response(self, response: InspectedResponse) -> dict[str, Any]:
        top = response.alternatives
        alternatives = [
            [
                {
                    "id": int(i),
                    "text": self.words[int(i)],
                    "policy": _json_number(float(p)),
                    "reference": _json_number(float(r)),
                }
                for i, p, r in zip(*row, strict=True)
            ]
            for row in zip(top.ids, top.policy, top.reference, strict=True)
        ]
        names = ("logp", "ref_logp", "kl", "weights", "kl_weights")
        columns = {name: [_json_number(value) for value in getattr(response, name).tolist()] for name in names}
        sums = {"logratio": float(response.logratio.sum()), "sequential_kl": float(response.kl.sum())}
        sums |= {"reward": response.reward}
        texts = {"ids": response.ids, "pieces": [list(piece) for piece in response.pieces]}
        return {
            **{name: _json_number(value) for name, value in sums.items()},
            **texts,
            **columns,
            "alternatives": alternatives,
        }

    def _repr_html_(self) -> str:
        page = html.escape(self.html(), quote=True)
        style = "width:100%;height:800px;border:1px solid #888"
        return f'<iframe title="token view" sandbox="allow-scripts" style="{style}" srcdoc="{page}"></iframe>'

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        scale = _scales(self)["logratio"] or 1.0
        for pair in self.pairs:
            yield Text(f"row {pair.row}: loss {pair.loss:.4g}, margin {pair.margin:.4g}", style="bold")
            for side in SIDES:
                response: InspectedResponse = getattr(pair, side)
                sums = f"log-ratio {response.logratio.sum():.4g}, sequential KL {response.kl.sum():.4g} nats"
                yield Text(f"{side}: {sums}", style="bright_black")
                yield _coloured(response, scale)
            yield Text()
        yield Text.assemble(
            "log-ratio: ", ("below 0", f"on rgb({','.join(map(str, MINUS))})"), " ",
            ("above 0", f"on rgb({','.join(map(str, PLUS))})"), f"; full colour from {scale:.2g} nats",
        )  # fmt: skip


PLUS, MINUS = (31, 95, 153), (138, 74, 18)
"""Colours of tokens that the policy makes more and less likely, in a terminal."""


def inspect(
    policy: nn.Module,
    reference: nn.Module | Reference,
    pairs: Sequence[TokenisedPair],
    objective: Objective,
    tokenizer: Any,
    batch_size: int = 8,
    token_weights: str | None = None,
    progress: bool = False,
    **names: str,
) -> Inspection:
    """Computes log-ratio, KL(reference || policy) and alternatives of every token of preference pairs.

    Args:
        policy: As in :func:`tdpo.score_pairs`, and so are the next three.
        reference: Must compute a reference, also for an objective without one.
        pairs: Tokenised pairs.
        objective: Defines loss and rewards.
        tokenizer: The models' tokenizer.
        batch_size: As in :func:`tdpo.evaluate.inspect.inspect_pairs`, and so are the next two.
        token_weights: Weights by position.
        progress: Whether to show a bar.
        **names: ``policy_name``, ``reference_name`` and ``dataset_name`` to show.

    Returns:
        An object that displays itself in a notebook; ``save(path)`` writes the page and ``lines()`` returns the values.

    Raises:
        UserError: as :func:`tdpo.score_pairs`.
    """
    found = inspect_pairs(policy, reference, pairs, objective, tokenizer, batch_size, token_weights, progress)
    ids = {int(i) for response in _responses(found) for i in [*response.ids, *np.unique(response.alternatives.ids)]}
    words = {i: tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False) for i in ids}
    shown = {name.removesuffix("_name"): text for name, text in names.items()}
    return Inspection(found, objective, words, **shown)


def _responses(pairs: Sequence[InspectedPair]) -> Iterator[InspectedResponse]:
    for pair in pairs:
        yield pair.chosen
        yield pair.rejected


def _coloured(response: InspectedResponse, scale: float) -> Text:
    """Renders a response with each token on the colour of its log-ratio."""
    text, start = Text(), 0
    for piece in response.pieces:
        value = float(response.logratio[start : start + piece.tokens].sum())
        strength = min(abs(value) / scale, 1.0) if math.isfinite(value) else 1.0
        colour = ",".join(str(round(strength * part)) for part in (PLUS if value > 0 else MINUS))
        text.append(without_control(piece.text), f"white on rgb({colour})")
        start += piece.tokens
    return text


def _scales(inspection: Inspection) -> dict[str, float]:
    """Returns the value of each view that gets the full colour."""
    beta, found = inspection.objective.reward_scale, list(_responses(inspection.pairs))
    ratio, kl, weights = (
        np.concatenate([getattr(response, name) for response in found] or [np.zeros(1)])
        for name in ("logratio", "kl", "weights")
    )
    values = {"logratio": abs(ratio), "kl": kl, "advantage": abs(beta * (ratio + kl))}
    finite = {name: value[np.isfinite(value)] for name, value in values.items()}
    return {name: float(np.quantile(value, TYPICAL)) if len(value) else 1.0 for name, value in finite.items()} | {
        "weight": float(weights.max())
    }


def _page(inspection: Inspection, with_alternatives: int, bits: int = STATISTIC_BITS) -> str:
    """Returns the page with the alternatives of that many tokens, those that differ most between the models."""
    pairs, objective = inspection.pairs, inspection.objective
    differences = [
        np.nan_to_num(np.maximum(abs(response.logratio), response.kl), nan=np.inf) for response in _responses(pairs)
    ]
    everything = np.concatenate(differences or [np.zeros(0)])
    lowest = -np.partition(-everything, with_alternatives - 1)[with_alternatives - 1] if with_alternatives else np.inf
    kept = [difference >= lowest for difference in differences]
    weighted = any((response.weights != 1).any() or (response.kl_weights != 1).any() for response in _responses(pairs))
    names = ["logp", "ref_logp", "kl", *(["weights", "kl_weights"] if weighted else [])]
    used: set[int] = set()
    chunks = [
        _chunk(pairs[start : start + CHUNK], kept[2 * start : 2 * (start + CHUNK)], names, bits, inspection.words, used)
        for start in range(0, len(pairs), CHUNK)
    ]
    words = json.dumps({i: inspection.words[i] for i in sorted(used)}, ensure_ascii=False)
    blobs = {"words": _packed(words.encode())} | {f"chunk-{i}": chunk for i, chunk in enumerate(chunks)}
    meta = {
        "objective": str(objective), "equation": objective.equation, "scale": objective.reward_scale,
        "parameters": {name: value for name, value in objective.parameters.items() if isinstance(value, float | int)},
        "policy": inspection.policy, "reference": inspection.reference, "dataset": inspection.dataset,
        "weighted": weighted, "scales": _scales(inspection), "chunk": CHUNK, "index": _index(pairs, weighted),
    }  # fmt: skip
    part = {name: (files("tdpo.report") / f"inspect.{name}").read_text("utf-8") for name in ("html", "css", "js")}
    script, style = (base64.b64encode(hashlib.sha256(part[n].encode()).digest()).decode() for n in ("js", "css"))
    policy = f"default-src 'none'; script-src 'sha256-{script}'; style-src 'sha256-{style}'"
    blocks = [f'<script type="text/plain" id="{name}">{blob}</script>' for name, blob in blobs.items()]
    values = {
        "policy": policy, "style": part["css"], "script": part["js"], "meta": _script_json(meta),
        "blobs": "\n".join(blocks),
    }  # fmt: skip
    page, *rest = part["html"].split("@")
    for name, text in zip(rest[::2], rest[1::2], strict=True):
        page += values[name] + text
    return page


def _script_json(content: Any) -> str:
    """Returns JSON that cannot end the script element that it is in."""
    return json.dumps(content, ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")


def _index(pairs: Sequence[InspectedPair], weighted: bool) -> dict[str, list[float | str]]:
    """Returns the columns that the page sorts by and fills into the loss, one value per pair."""
    columns: dict[str, list[float]] = {
        "row": [pair.row for pair in pairs],
        "loss": [pair.loss for pair in pairs],
        "largest_kl": [pair.largest_kl for pair in pairs],
    }
    for side, letter in zip(SIDES, "wl", strict=True):
        responses: list[InspectedResponse] = [getattr(pair, side) for pair in pairs]
        columns[f"{side}_reward"] = [response.reward for response in responses]
        columns[f"n_{letter}"] = [len(response.ids) for response in responses]
        for symbol, name, weights in (
            ("r", "logratio", "weights"),
            ("k", "kl", "kl_weights"),
            ("p", "logp", "weights"),
        ):
            columns[f"{symbol}_{letter}"] = [float(getattr(r, name).sum()) for r in responses]
            if weighted:
                sums = [float(getattr(r, name) @ getattr(r, weights)) for r in responses]
                columns[f"{symbol}_{letter}_weighted"] = sums
    return {name: [_json_number(value) for value in column] for name, column in columns.items()}


def _json_number(value: float) -> float | str:
    """Returns a number as JSON has it; the names that JavaScript's ``Number`` reads for those that it has not."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _chunk(
    pairs: Sequence[InspectedPair], kept: Sequence[NDArray[np.bool_]], names: Sequence[str], bits: int,
    words: dict[int, str], used: set[int],
) -> str:  # fmt: skip
    """Packs pairs for the page: texts as JSON, then numbers byte plane by byte plane, which compress better.

    Args:
        pairs: The pairs.
        kept: The tokens of each response whose alternatives are kept.
        names: The columns of statistics.
        bits: Bits of their fraction.
        words: Texts of tokens by id, which are stored elsewhere.
        used: The ids whose text the page needs are added to it.
    """
    responses = list(_responses(pairs))
    alternatives = [
        [_unique(r, i) if flag else [] for i, flag in enumerate(flags)]
        for r, flags in zip(responses, kept, strict=True)
    ]
    listed = [entry for rows in alternatives for row in rows for entry in row]
    ids, policy, reference = zip(*listed, strict=True) if listed else ((), (), ())
    tokens = [token for response in responses for token in response.ids]
    used |= {*ids, *tokens}
    header = {
        "columns": [name.removesuffix("s") for name in names],
        "tokens": len(tokens),
        "pairs": [
            {"prompt": pair.prompt, "responses": [_texts(response, words) for response in (pair.chosen, pair.rejected)]}
            for pair in pairs
        ],
    }
    text = json.dumps(header, ensure_ascii=False).encode()
    parts = [struct.pack("<I", len(text)), text, _planes(np.array(tokens, "<u4"))]
    for name in names:
        parts.append(_planes(_rounded(np.concatenate([getattr(r, name) for r in responses]), bits)))
    parts.append(bytes(len(row) for rows in alternatives for row in rows))
    parts.append(_planes(np.array(ids, "<u4")))
    parts += [_planes(_rounded(np.array(column), PROBABILITY_BITS)) for column in (policy, reference)]
    return _packed(b"".join(parts))


def _packed(content: bytes) -> str:
    return base64.b64encode(gzip.compress(content, 6, mtime=0)).decode()


def _texts(response: InspectedResponse, words: dict[int, str]) -> dict[str, Any]:
    """Returns the pieces of a response: those that are not the text of their token alone, and numbers of tokens."""
    differ, joined, start = {}, {}, 0
    for number, piece in enumerate(response.pieces):
        if piece.tokens > 1:
            joined[number] = piece.tokens
        if piece.tokens > 1 or piece.text != words[response.ids[start]]:
            differ[number] = piece.text
        start += piece.tokens
    return {"pieces": len(response.pieces), "texts": differ, "joined": joined}


def _unique(response: InspectedResponse, position: int) -> list[tuple[int, float, float]]:
    """Returns the alternatives at a position without repetitions: id and both probabilities."""
    columns = (column[position].tolist() for column in response.alternatives)
    return list({entry[0]: entry for entry in zip(*columns, strict=True)}.values())


def _rounded(values: Floats, bits: int) -> NDArray[np.uint32]:
    """Rounds to float32 with that many bits of the fraction; returns the numbers' bits."""
    raw, drop = values.astype("<f4").view("<u4"), FLOAT32_BITS - bits
    return np.where(np.isfinite(values), (raw + (1 << drop >> 1)) >> drop << drop, raw).astype("<u4")


def _planes(column: NDArray[np.uint32]) -> bytes:
    """Returns the lowest bytes of all numbers, then the next ones, and so on."""
    return column.view(np.uint8).reshape(-1, 4).T.tobytes()
