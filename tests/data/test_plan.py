"""Rows against a packer that walks the stream token by token."""

import numpy as np
import pytest

from tests.data import synthetic
from v4train.data import plan, store


def open_plan(path, *, documents=None, **packing):
    s = store.TokenStore.open(path)
    defaults = {"sequence_length": 32, "max_patches": 9, "max_audio_frames": 12, "seed": 5}
    which = np.arange(len(s)) if documents is None else documents
    return s, plan.Plan(s, documents=which, packing=plan.Packing(**(defaults | packing)))


def rows_by_walking(s, *, order, packing):
    """The three rules applied one token (or span, or document) at a time."""
    rows, row, used, patches, frames = [], [], 0, 0, 0

    def close():
        nonlocal row, used, patches, frames
        if row:
            rows.append(row)
        row, used, patches, frames = [], 0, 0, 0

    for d in order:
        spans = {int(at): (int(kind), int(n)) for kind, at, n in s.spans_of(d)}
        length = int(s.documents["tokens"][d])
        totals = [sum(n for k, n in spans.values() if k == kind) for kind in (1, 2)]
        if packing.policy == "whole_documents":
            fits = used + length <= packing.sequence_length
            fits &= patches + totals[0] <= packing.max_patches and frames + totals[1] <= packing.max_audio_frames
            if not fits:
                close()
        start = at = 0
        while at < length:
            kind, n = spans.get(at, (0, 1))
            full = used + n > packing.sequence_length
            full |= kind == 1 and patches + n > packing.max_patches
            full |= kind == 2 and frames + n > packing.max_audio_frames
            if full:
                if at > start:
                    row.append((d, start, at))
                close()
                start = at
            used, patches, frames = used + n, patches + n * (kind == 1), frames + n * (kind == 2)
            at += n
        row.append((d, start, length))
    close()
    return rows


@pytest.mark.parametrize("kind", ["text", "media"])
@pytest.mark.parametrize("policy", ["cut_text", "whole_documents"])
@pytest.mark.parametrize("length", [16, 32, 200])
def test_rows_are_those_of_the_walk(tmp_path, kind, policy, length):
    path = synthetic.make_test_store(tmp_path / "s", kind=kind, documents=60)
    s, p = open_plan(path, sequence_length=length, policy=policy)
    packing = plan.Packing(length, 9, 12, 5, policy)
    first = 0
    for block in range(2):
        epochs = range(block * p.block_epochs, (block + 1) * p.block_epochs)
        order = np.concatenate([plan.permutation(60, seed=5, epoch=epoch) for epoch in epochs]).tolist()
        expected = rows_by_walking(s, order=order, packing=packing)
        assert [p.row(first + i) for i in range(len(expected))] == expected
        first += len(expected)


@pytest.mark.parametrize("policy", ["cut_text", "whole_documents"])
def test_promises_hold_for_every_row(tmp_path, policy):
    path = synthetic.make_test_store(tmp_path / "s", kind="media", documents=150, seed=2)
    s, p = open_plan(path, sequence_length=40, max_patches=11, max_audio_frames=13, policy=policy)
    for i in range(900):
        pieces = p.row(i)
        assert 0 < sum(piece.stop - piece.start for piece in pieces) <= 40
        budget = {1: 11, 2: 13}
        for piece in pieces:
            for kind, at, n in s.spans_of(piece.document).tolist():
                inside = max(0, min(at + n, piece.stop) - max(at, piece.start))
                assert inside in (0, n), "a span was cut"
                budget[kind] -= inside
        assert min(budget.values()) >= 0
    if policy == "whole_documents":
        d = s.documents
        fits = (d["tokens"] <= 40) & (d["patches"] <= 11) & (d["frames"] <= 13)
        pieces = [piece for i in range(900) for piece in p.row(i) if fits[piece.document]]
        assert pieces
        assert all(piece.stop - piece.start == d["tokens"][piece.document] for piece in pieces)


@pytest.mark.parametrize("documents", [7, 60])
def test_an_epoch_has_every_token_once(tmp_path, documents):
    path = synthetic.make_test_store(tmp_path / "s", kind="media", documents=documents)
    s, p = open_plan(path)
    expected = [(d, t) for d in range(documents) for t in range(s.documents["tokens"][d])]
    seen, orders, i = [], [], 0
    while len(seen) < 3 * p.epoch_tokens:
        seen += [(piece.document, t) for piece in p.row(i) for t in range(piece.start, piece.stop)]
        i += 1
    for epoch in range(3):
        part = seen[epoch * p.epoch_tokens : (epoch + 1) * p.epoch_tokens]
        orders.append(tuple(dict.fromkeys(d for d, _ in part)))
        assert sorted(part) == expected
    assert len(set(orders)) == 3, "every epoch has its own order"


def test_lengths_around_the_row(tmp_path):
    """Documents of S-1, S, S+1 and 10 S tokens fill rows without a gap, and continue where they stopped."""
    size = 32
    path = synthetic.make_test_store(tmp_path / "s", lengths=(size - 1, size, size + 1, 10 * size))
    _, p = open_plan(path, sequence_length=size)
    at = {}
    for i in range(13 * p.block_epochs):
        pieces = p.row(i)
        assert sum(piece.stop - piece.start for piece in pieces) == size
        for piece in pieces:
            assert piece.start == at.get(piece.document, 0)
            at[piece.document] = piece.stop % (size - 1, size, size + 1, 10 * size)[piece.document]
    assert p.fill() == 1.0


def test_rows_do_not_depend_on_the_order_of_reading(tmp_path):
    path = synthetic.make_test_store(tmp_path / "s", kind="media")
    _, forwards = open_plan(path)
    expected = [forwards.row(i) for i in range(1500)]
    _, backwards = open_plan(path)
    assert [backwards.row(i) for i in reversed(range(1500))] == expected[::-1]
    assert open_plan(path, seed=6)[1].row(0) != expected[0]


def test_only_the_given_documents_are_used(tmp_path):
    path = synthetic.make_test_store(tmp_path / "s", kind="media")
    _, p = open_plan(path, documents=np.array([3, 17, 30]))
    assert {piece.document for i in range(50) for piece in p.row(i)} == {3, 17, 30}


def test_media_that_no_row_can_hold_is_refused(tmp_path):
    path = synthetic.make_test_store(tmp_path / "s", kind="media")
    s = store.TokenStore.open(path)
    longest = {kind: int(s.spans["n"][s.spans["kind"] == kind].max()) for kind in (1, 2)}
    for field, name, need in (("max_patches", "image", longest[1]), ("max_audio_frames", "audio", longest[2])):
        with pytest.raises(ValueError, match=f"an? {name} span has {need} tokens, but `{field}` is {need - 1}; raise `{field}` to {need}"):
            open_plan(path, **{field: need - 1})
        with pytest.raises(ValueError, match=f"`{field}` is 0"):
            open_plan(path, **{field: 0})
    with pytest.raises(ValueError, match="`sequence_length` is 8"):
        open_plan(path, sequence_length=8)
    with pytest.raises(ValueError, match="no documents in this split"):
        open_plan(path, documents=np.array([], np.int64))


@pytest.mark.parametrize("n", [1, 2, 37, 1000])
def test_permutations_are_permutations_and_frozen(n):
    for epoch in range(3):
        assert sorted(plan.permutation(n, seed=1, epoch=epoch).tolist()) == list(range(n))
    assert plan.permutation(8, seed=1, epoch=0).tolist() == plan.permutation(8, seed=1, epoch=0).tolist()


def test_permutation_is_uniform_enough():
    """Each of 20 elements comes first about equally often, and seed and epoch both matter."""
    first = np.bincount([plan.permutation(20, seed=seed, epoch=epoch)[0] for seed in range(50) for epoch in range(40)], minlength=20)
    assert float(((first - 100.0) ** 2 / 100.0).sum()) < 50  # chi-square of 19 degrees, p = 1e-4
