"""Layouts: where every response token lands, which state predicts it, and who may attend to whom."""

from __future__ import annotations

import pytest
import torch
from numeric_worlds import random_pairs

from tdpo.data.pack import pack_padded, pack_sequences
from tdpo.types import PackedBatch, TokenisedPair

PAIRS = [TokenisedPair([11, 12], [13], [14, 15], row=4), TokenisedPair([21], [22, 23, 24], [25], row=9)]


def tree_batch() -> PackedBatch:
    """Two trees in a row and some padding: prompt (a a), chosen (b b), rejected (c) | prompt (d), e, f f | padding."""
    tree = [0, 0, 0, 0, 0, 1, 1, 1, 1, -1, -1]
    branch = [0, 0, 1, 1, 2, 0, 1, 2, 2, -1, -1]
    position = [0, 1, 2, 3, 2, 0, 1, 1, 2, 0, 0]
    return PackedBatch(
        input_ids=torch.tensor([[31, 32, 33, 34, 35, 41, 42, 43, 44, 0, 0]]),
        position_ids=torch.tensor([position]),
        tree_ids=torch.tensor([tree]),
        branch_ids=torch.tensor([branch]),
        source_index=torch.tensor([1, 2, 1, 5, 5, 7]),
        labels=torch.tensor([33, 34, 35, 42, 43, 44]),
        sequence_ids=torch.tensor([0, 0, 1, 2, 3, 3]),
        pair_rows=torch.tensor([1, 2]),
        layout="tree",
    )


def test_every_field_of_two_padded_pairs():
    batch = pack_padded(PAIRS)
    assert batch.input_ids.tolist() == [[11, 12, 13, 0], [11, 12, 14, 15], [21, 22, 23, 24], [21, 25, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 4
    assert batch.tree_ids.tolist() == [[0, 0, 0, -1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, -1, -1]]
    assert batch.branch_ids.tolist() == [[0, 0, 1, -1], [0, 0, 2, 2], [0, 1, 1, 1], [0, 2, -1, -1]]
    assert batch.source_index.tolist() == [1, 5, 6, 8, 9, 10, 12]
    assert batch.labels.tolist() == [13, 14, 15, 22, 23, 24, 25]
    assert batch.sequence_ids.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert batch.pair_rows.tolist() == [4, 9]
    assert (batch.layout, batch.num_pairs) == ("padded", 2)


def test_token_fields_are_int64():
    batch = pack_padded(PAIRS)
    for name, value in batch.as_dict().items():
        assert name in ("layout", "lengths", "pair_keys") or value.dtype == torch.int64, name


@pytest.mark.parametrize("seed", range(20))
def test_rows_hold_the_pairs_and_the_predicted_token_follows_its_source(seed: int):
    pairs = random_pairs(seed, count=1 + seed % 5, vocab=1000)
    batch = pack_padded(pairs)
    flat = batch.input_ids.flatten()
    assert torch.equal(flat[batch.source_index + 1], batch.labels)
    length = batch.input_ids.shape[1]
    assert length == max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs)
    assert (batch.source_index % length + 1 < length).all()  # never the first column of the next row
    for p, pair in enumerate(pairs):
        for side, response in enumerate((pair.chosen_ids, pair.rejected_ids)):
            row = 2 * p + side
            assert batch.input_ids[row, batch.tree_ids[row] == 0].tolist() == [*pair.prompt_ids, *response]
            assert batch.input_ids[row, batch.branch_ids[row] == 1 + side].tolist() == response
            assert batch.labels[batch.sequence_ids == row].tolist() == response
            assert (batch.source_index[batch.sequence_ids == row] // length == row).all()
    assert (batch.sequence_ids.diff() >= 0).all()  # tokens of a pair are contiguous


def test_single_sequences_are_pairs_with_a_chosen_side_only():
    batch = pack_sequences([[11, 12], [21]], [[13], [22, 23, 24]], rows=[4, 9])
    assert batch.input_ids.tolist() == [[11, 12, 13, 0], [21, 22, 23, 24]]
    assert batch.branch_ids.tolist() == [[0, 0, 1, -1], [0, 1, 1, 1]]
    assert batch.source_index.tolist() == [1, 4, 5, 6]
    assert batch.labels.tolist() == [13, 22, 23, 24]
    assert batch.sequence_ids.tolist() == [0, 2, 2, 2]
    assert (batch.pair_rows.tolist(), batch.num_pairs) == ([4, 9], 2)


@pytest.mark.parametrize("seed", range(5))
def test_single_sequences_are_packed_as_the_chosen_sides_of_pairs(seed: int):
    pairs = random_pairs(seed, count=4, vocab=1000)
    paired = pack_padded([TokenisedPair(pair.prompt_ids, pair.chosen_ids, pair.chosen_ids) for pair in pairs])
    single = pack_sequences([pair.prompt_ids for pair in pairs], [pair.chosen_ids for pair in pairs])
    for name in ("input_ids", "position_ids", "tree_ids", "branch_ids"):
        assert torch.equal(getattr(single, name), getattr(paired, name)[::2]), name
    chosen = paired.sequence_ids % 2 == 0
    assert torch.equal(single.labels, paired.labels[chosen])
    assert torch.equal(single.sequence_ids, paired.sequence_ids[chosen])
    assert torch.equal(single.input_ids.flatten()[single.source_index + 1], single.labels)
    assert single.pair_rows.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("prompts", "responses", "words"),
    [([[1], []], [[2], [3]], "sequence 2 of the batch: the prompt is empty"), ([[1]], [[]], "response is empty")],
)
def test_an_empty_sequence_is_refused_by_number(prompts, responses, words):
    with pytest.raises(ValueError, match=words):
        pack_sequences(prompts, responses)


def test_a_padded_row_is_causal_and_blind_to_padding():
    attends = pack_padded(PAIRS).attends()
    assert attends.shape == (4, 4, 4)
    lower = torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(attends[1], lower) and torch.equal(attends[2], lower)
    assert torch.equal(attends[0][:3, :3], lower[:3, :3]) and torch.equal(attends[3][:2, :2], lower[:2, :2])
    assert not attends[0][:, 3].any() and not attends[0][3].any()
    assert not attends[3][:, 2:].any() and not attends[3][2:].any()


def test_a_branch_attends_to_its_prompt_and_itself_alone():
    expected = """
        x..........
        xx.........
        xxx........
        xxxx.......
        xx..x......
        .....x.....
        .....xx....
        .....x.x...
        .....x.xx..
        ...........
        ...........
    """
    shown = ["".join("x" if seen else "." for seen in row) for row in tree_batch().attends()[0].tolist()]
    assert shown == expected.split()


@pytest.mark.parametrize("seed", range(10))
def test_a_tree_position_attends_to_its_own_sequence_so_far(seed: int):
    """The tree and the padded layout of the same pairs show every response token the same past."""
    pairs = random_pairs(seed, count=3, vocab=1000)
    ids, positions, trees, branches = [], [], [], []
    for number, pair in enumerate(pairs):
        for branch, part in enumerate((pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)):
            start = len(pair.prompt_ids) if branch else 0
            ids += part
            positions += range(start, start + len(part))
            trees += [number] * len(part)
            branches += [branch] * len(part)
    fields = pack_padded(pairs).as_dict() | {
        "input_ids": torch.tensor([ids]),
        "position_ids": torch.tensor([positions]),
        "tree_ids": torch.tensor([trees]),
        "branch_ids": torch.tensor([branches]),
        "layout": "tree",
    }
    batch = PackedBatch.from_dict(fields)
    attends = batch.attends()[0]
    for index, (tree, branch, position) in enumerate(zip(trees, branches, positions, strict=True)):
        pair = pairs[tree]
        whole = [*pair.prompt_ids, *([], pair.chosen_ids, pair.rejected_ids)[branch]]
        assert batch.input_ids[0, attends[index]].tolist() == whole[: position + 1]
        assert batch.position_ids[0, attends[index]].tolist() == list(range(position + 1))


@pytest.mark.parametrize("batch", [pack_padded(PAIRS), tree_batch()], ids=["padded", "tree"])
def test_dictionary_round_trip(batch: PackedBatch):
    fields = batch.as_dict()
    again = PackedBatch.from_dict(fields).to("cpu").as_dict()
    assert again.keys() == fields.keys()
    for name, value in fields.items():
        assert (
            again[name] == value if name in ("layout", "lengths", "pair_keys") else torch.equal(again[name], value)
        ), name


@pytest.mark.parametrize("empty", ["prompt_ids", "chosen_ids", "rejected_ids"])
def test_an_empty_part_is_refused_by_name_and_row(empty: str):
    parts = {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]} | {empty: []}
    with pytest.raises(ValueError, match=rf"row 12\): {empty} is empty"):
        TokenisedPair(**parts, row=12)


def test_swapping_twice_is_the_pair():
    pair = TokenisedPair([1], [2, 3], [4], row=7)
    assert pair.swapped == TokenisedPair([1], [4], [2, 3], row=7)
    assert pair.swapped.swapped == pair
