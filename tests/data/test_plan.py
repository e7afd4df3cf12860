"""Rows against a packer that walks the stream token by token."""

import fractions
import itertools

import numpy as np
import pytest

from tests.data import synthetic
from v4train.data import packing, plan, store


def open_plan(path, *, documents=None, delimited=(), start=None, **packing):
    s = store.TokenStore.open(path)
    defaults = {"sequence_length": 32, "max_patches": 9, "max_audio_frames": 12, "seed": 5}
    which = np.arange(len(s)) if documents is None else documents
    return s, plan.Plan(s, documents=which, packing=plan.Packing(**(defaults | packing)), delimited=delimited, start=start)


def atoms_of(s, d, *, length, delimited):
    """First token -> kind, all tokens and payload of each thing that is never cut, found by reading the document."""
    tokens, found = s.read(d).tokens, {}
    for kind, at, n in s.spans_of(d).tolist():
        low, high = at, at + n
        if kind in delimited and n + 2 <= length:
            low -= at > 0 and tokens[at - 1] == (261, 263)[kind - 1]
            high += high < len(tokens) and tokens[high] == (262, 264)[kind - 1]
        found[low] = kind, high - low, n
    return found


def split_by_walking(s, items, *, packing, separate=False, delimited=()):
    """Rows of the pieces ``items``, one token or span at a time; ``separate`` closes the row after each piece."""
    rows, row, used = [], [], [0, 0, 0]
    limits = (packing.sequence_length, packing.max_patches, packing.max_audio_frames)

    def close():
        nonlocal row, used
        if row:
            rows.append(row)
        row, used = [], [0, 0, 0]

    for d, begin, end in items:
        atoms = atoms_of(s, d, length=packing.sequence_length, delimited=delimited)
        start = at = begin
        while at < end:
            kind, n, payload = atoms.get(at, (0, 1, 0))
            grown = [used[0] + n, used[1] + payload * (kind == 1), used[2] + payload * (kind == 2)]
            if any(g > limit for g, limit in zip(grown, limits, strict=True)):
                if at > start:
                    row.append((d, start, at))
                close()
                start = at
                grown = [n, payload * (kind == 1), payload * (kind == 2)]
            used = grown
            at += n
        row.append((d, start, end))
        if separate:
            close()
    close()
    return rows


def best_fit_by_scanning(s, items, *, packing):
    """Rows, as sets of parts: every open row is looked at for every part."""
    parts = [part for row in split_by_walking(s, items, packing=packing, separate=True) for part in row]
    rows, limits = [], (packing.sequence_length, packing.max_patches, packing.max_audio_frames)

    def size(part):
        d, begin, end = part
        return [end - begin, *(sum(int(n) for k, at, n in s.spans_of(d) if k == kind and begin <= at < end) for kind in (1, 2))]

    for part in sorted(parts, key=lambda part: -sum(fractions.Fraction(n, limit) for n, limit in zip(size(part), limits, strict=True))):
        need = np.array(size(part))
        fitting = [row for row in rows if (need <= row["room"]).all()]
        if fitting:
            row = min(fitting, key=lambda row: row["room"][0])
        else:
            row = {"room": np.array(limits), "parts": []}
            rows.append(row)
        row["room"] = row["room"] - need
        row["parts"].append(part)
    return rows


def stream(p, s, block):
    """The documents of a block, whole, in the order of the stream, from the definition."""
    n, places = len(s), range(*p._places(block))
    return [(int(plan.permutation(n, seed=5, epoch=i // n)[i % n]),) for i in places]


def items_of(p, s, block):
    return [(d, 0, int(s.documents["tokens"][d])) for (d,) in stream(p, s, block)]


@pytest.mark.parametrize("kind", ["text", "media"])
@pytest.mark.parametrize("policy", ["split_text_keep_spans", "one_document"])
@pytest.mark.parametrize("length", [16, 32, 200])
def test_rows_are_those_of_the_walk(tmp_path, kind, policy, length):
    path = synthetic.make_test_store(tmp_path / "s", kind=kind, documents=60)
    s, p = open_plan(path, sequence_length=length, policy=policy)
    packing = plan.Packing(length, 9, 12, 5, policy)
    first = tokens = 0
    for block in range(3):
        expected = split_by_walking(s, items_of(p, s, block), packing=packing, separate=policy == "one_document")
        for i, row in enumerate(expected):
            assert p.row(first + i) == row
            assert p.tokens_before(first + i) == tokens
            tokens += sum(stop - start for _, start, stop in row)
        first += len(expected)


@pytest.mark.parametrize("policy", ["split_text_keep_spans", "no_split", "one_document"])
@pytest.mark.parametrize("length", [12, 13, 14, 33, 120])
@pytest.mark.parametrize("delimited", [(1, 2), (1,)])
def test_delimiters_go_with_their_media(tmp_path, policy, length, delimited):
    """Against the walk, which reads the delimiters from the documents. Spans have up to 11 tokens: rows of 12 leave no place for both."""
    s, p = open_plan(
        synthetic.make_test_store(tmp_path / "s", kind="media", documents=90),
        sequence_length=length,
        max_audio_frames=20,
        policy=policy,
        delimited=delimited,
    )
    packing, first, cut_before = plan.Packing(length, 9, 20, 5, policy), 0, 0
    for block in range(2):
        items = items_of(p, s, block)
        separate = policy != "split_text_keep_spans"
        expected = split_by_walking(s, items, packing=packing, separate=separate, delimited=delimited)
        if policy == "no_split":  # which parts share a row is best fit's business; what the parts are is not
            limits = np.array((length, 9, 20))
            whole = {d for d in range(len(s)) if (np.array([s.documents[f][d] for f in ("tokens", "patches", "frames")]) <= limits).all()}
            assert sorted(x for i in range(p._block(block).rows) for x in p.row(first + i)) == sorted(x for row in expected for x in row)
            assert all(x[2] - x[1] == s.documents["tokens"][x[0]] for row in expected for x in row if x[0] in whole)
            first += p._block(block).rows
            continue
        assert [p.row(first + i) for i in range(len(expected))] == expected
        first += len(expected)
        ends = [s.read(row[-1][0]).tokens[row[-1][2] - 1] for row in expected]
        cut_before += sum(token in (261, 263) for token in ends)
    assert length == 12 or delimited == (1,) or cut_before == 0, "a row ends with a lone delimiter"


def test_spans_without_delimiters_are_left_alone(tmp_path):
    """Two spans side by side, with one token between, at the ends of the document: nothing is claimed twice or from outside."""
    at, n = np.array([0, 4, 9, 20]), np.array([4, 4, 3, 5])
    spans = packing.Spans.of(np.array([1, 1, 2, 1]), at=at, n=n)
    low, high = np.array([0, 0, 0, 12]), np.array([12, 12, 12, 25])
    assert spans.delimited(np.zeros(4, bool), low=low, high=high, longest=32).at.tolist() == at.tolist()
    kept = spans.delimited(np.ones(4, bool), low=low, high=high, longest=32)
    assert kept.at.tolist() == [0, 4, 9, 19]
    assert kept.end.tolist() == [4, 9, 12, 25]
    assert spans.delimited(np.ones(4, bool), low=low, high=high, longest=6).at.tolist() == [0, 4, 9, 20]


@pytest.mark.parametrize("kind", ["text", "media"])
@pytest.mark.parametrize("documents, length", [(60, 32), (60, 200), (3000, 70)])
def test_best_fit_is_best_fit(tmp_path, kind, documents, length):
    path = synthetic.make_test_store(tmp_path / "s", kind=kind, documents=documents)
    s, p = open_plan(path, sequence_length=length, policy="no_split", max_audio_frames=30)
    packing = plan.Packing(length, 9, 30, 5, "no_split")
    assert (p.epoch_blocks > 1) == (documents == 3000)
    first = tokens = 0
    for block in range(2):
        expected = best_fit_by_scanning(s, items_of(p, s, block), packing=packing)
        got = [p.row(first + i) for i in range(len(expected))]
        places = {d: i for i, (d,) in enumerate(stream(p, s, block))}
        if len(places) == len(stream(p, s, block)):  # no document twice: rows can be told apart
            assert sorted(sorted(row) for row in got) == sorted(sorted(row["parts"]) for row in expected)
            assert all([places[piece.document] for piece in row] == sorted(places[piece.document] for piece in row) for row in got)
        assert sorted(x for row in got for x in row) == sorted(x for row in expected for x in row["parts"])
        lengths = [sum(piece.stop - piece.start for piece in row) for row in got]
        assert sorted(lengths) == sorted(length - int(row["room"][0]) for row in expected)
        assert [p.tokens_before(first + i) for i in range(len(got))] == (tokens + np.cumsum([0, *lengths[:-1]])).tolist()
        assert np.corrcoef(lengths, range(len(lengths)))[0, 1] ** 2 < 0.05, "full rows first: not shuffled"
        first, tokens = first + len(got), tokens + sum(lengths)


def test_windows_are_bounded(tmp_path, monkeypatch):
    """However long the rows, best fit looks at so many documents at most; without the bound all tests above have one window size."""
    monkeypatch.setattr(plan, "_WINDOW_OF_TEXT", 100)
    s, p = open_plan(synthetic.make_test_store(tmp_path / "s", documents=330), sequence_length=5000, policy="no_split")
    assert (p.block_epochs, p.epoch_blocks) == (1, 4)
    assert sorted(d for block in range(4) for (d,) in stream(p, s, block)) == list(range(330))
    few = plan.Plan(s, documents=np.arange(30), packing=plan.Packing(5000, 0, 0, 5, "no_split"))
    assert (few.block_epochs, few.epoch_blocks) == (3, 1)


def test_best_fit_pads_less_than_one_per_cent(tmp_path):
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(3.5, 1.0, 4000), 5, 400).astype(int)
    s, p = open_plan(synthetic.make_test_store(tmp_path / "s", lengths=tuple(lengths.tolist())), sequence_length=256, policy="no_split")
    assert p.fill() > 0.99
    whole = s.documents["tokens"] <= 256
    pieces = [piece for i in range(500) for piece in p.row(i) if whole[piece.document]]
    assert all((piece.start, piece.stop) == (0, s.documents["tokens"][piece.document]) for piece in pieces)


@pytest.mark.parametrize("policy", ["split_text_keep_spans", "no_split", "one_document"])
def test_promises_hold_for_every_row(tmp_path, policy):
    path = synthetic.make_test_store(tmp_path / "s", kind="media", documents=150, seed=2)
    s, p = open_plan(path, sequence_length=40, max_patches=11, max_audio_frames=13, policy=policy)
    for i in range(900):
        pieces = p.row(i)
        assert 0 < sum(piece.stop - piece.start for piece in pieces) <= 40
        assert policy != "one_document" or len(pieces) == 1
        budget = {1: 11, 2: 13}
        for piece in pieces:
            for kind, at, n in s.spans_of(piece.document).tolist():
                inside = max(0, min(at + n, piece.stop) - max(at, piece.start))
                assert inside in (0, n), "a span was cut"
                budget[kind] -= inside
        assert min(budget.values()) >= 0
    if policy != "split_text_keep_spans":
        d = s.documents
        fits = (d["tokens"] <= 40) & (d["patches"] <= 11) & (d["frames"] <= 13)
        pieces = [piece for i in range(900) for piece in p.row(i) if fits[piece.document]]
        assert pieces
        assert all(piece.stop - piece.start == d["tokens"][piece.document] for piece in pieces)


@pytest.mark.parametrize("policy", ["split_text_keep_spans", "no_split", "one_document"])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_slices_are_the_row(tmp_path, policy, parts):
    """Pieces, segment numbers and which pieces are continued, of slices that need not even divide the row."""
    path = synthetic.make_test_store(tmp_path / "s", kind="media", documents=150, seed=2)
    _, p = open_plan(path, sequence_length=40, max_patches=11, max_audio_frames=13, policy=policy)
    ends = [40 * i // parts for i in range(parts + 1)]
    for i in range(300):
        found, begun = {}, []
        for start, stop in itertools.pairwise(ends):
            part = p.slice(i, start=start, stop=stop)
            pieces = [plan.Piece(*piece) for piece in zip(*(array.tolist() for array in part.pieces), strict=True)]
            assert sum(piece.stop - piece.start for piece in pieces) <= stop - start
            for j, piece in enumerate(pieces):
                found.setdefault(part.segment + j, []).append(piece)
                if j or not part.continued:
                    begun.append(part.segment + j)
        row = p.row(i)
        assert sorted(found) == begun == list(range(1, len(row) + 1))
        for segment, piece in enumerate(row, start=1):
            inside = found[segment]
            assert {part.document for part in inside} == {piece.document}
            bounds = [piece.start, *[part.stop for part in inside]]
            assert [part.start for part in inside] == bounds[:-1]
            assert bounds[-1] == piece.stop


@pytest.mark.parametrize("kind", ["text", "media"])
@pytest.mark.parametrize("policy", ["split_text_keep_spans", "no_split", "one_document"])
@pytest.mark.parametrize("documents", [9, 300])
def test_a_change_of_length_skips_and_repeats_nothing(tmp_path, kind, policy, documents):
    """Plans of several lengths after one another: together they are the stream, every token of each epoch once."""
    path = synthetic.make_test_store(tmp_path / "s", kind=kind, documents=documents, seed=4)
    s = store.TokenStore.open(path)
    epoch = [(d, t) for d in range(documents) for t in range(s.documents["tokens"][d])]
    rng, start, seen, lengths, total, window = np.random.default_rng(1), None, [], (24, 200, 33, 64, 48), 0, 1
    for turn, length in enumerate(lengths):
        packing = plan.Packing(length, 9, 12, 5, policy)
        p = plan.Plan(s, documents=np.arange(documents), packing=packing, start=start)
        last = turn == len(lengths) - 1
        rows = int(rng.integers(1, 2 * len(epoch) // length)) if not last else 10**9
        window = max(window, p.block_epochs if policy == "no_split" else 1)
        for i in range(rows):
            if last and len(seen) >= 9 * len(epoch):
                break
            seen += [(piece.document, t) for piece in p.row(i) for t in range(piece.start, piece.stop)]
        if not last:
            assert total + p.tokens_before(rows) == len(seen)
            total, start = len(seen), p.after(rows)
            assert plan.Plan(s, documents=np.arange(documents), packing=packing, start=start).tokens_before(0) == 0
    counts = {token: 0 for token in epoch}
    for n, token in enumerate(seen, start=1):
        counts[token] += 1
        if policy != "no_split" and n % len(epoch) == 0:
            assert set(counts.values()) == {n // len(epoch)}
    assert max(counts.values()) - min(counts.values()) <= window + 1
    if policy != "no_split":
        # Not the tokens alone, but their order is that of the stream.
        order = [d for e in range(len(seen) // len(epoch) + 1) for d in plan.permutation(documents, seed=5, epoch=e).tolist()]
        assert seen == [(d, t) for d in order for t in range(s.documents["tokens"][d])][: len(seen)]


def test_best_fit_after_a_change_of_length_ends_each_window_exactly(tmp_path):
    """Where the last plan's window ends, each document of the stream so far was seen once per epoch."""
    s = store.TokenStore.open(synthetic.make_test_store(tmp_path / "s", documents=300, seed=4))
    start, seen = None, []
    for length, rows in ((24, 70), (200, 5), (33, 400), (64, None)):
        p = plan.Plan(s, documents=np.arange(300), packing=plan.Packing(length, 0, 0, 5, "no_split"), start=start)
        rows = p._block(0).rows if rows is None else rows
        seen += [(piece.document, t) for i in range(rows) for piece in p.row(i) for t in range(piece.start, piece.stop)]
        start = p.after(rows)
    assert start.head == ()
    order = [int(plan.permutation(300, seed=5, epoch=i // 300)[i % 300]) for i in range(start.place)]
    assert sorted(seen) == sorted((d, t) for d in order for t in range(s.documents["tokens"][d]))


@pytest.mark.parametrize("policy", ["split_text_keep_spans", "no_split"])
@pytest.mark.parametrize("start", [None, plan.Start((plan.Piece(3, 1, 5),), 77)])
def test_a_milestone_spares_planning_and_changes_nothing(tmp_path, monkeypatch, policy, start):
    monkeypatch.setattr(plan, "_BLOCK_ROWS", 16)
    path = synthetic.make_test_store(tmp_path / "s", kind="media", documents=300)
    _, walked = open_plan(path, policy=policy, start=start)
    assert walked.epoch_blocks > 3
    far = 5000
    expected = [walked.row(i) for i in range(far + 40)]
    milestone = walked.milestone(far)
    assert milestone.block > 100
    _, told = open_plan(path, policy=policy, start=start)
    assert told.fingerprint == walked.fingerprint
    assert told.planning(far).rows == far
    told.remember(milestone)
    assert told.planning(far).rows < 64
    told._block.cache_clear()
    assert [told.row(i) for i in range(far, far + 40)] == expected[far:]
    assert told._block.cache_info().misses <= 6
    assert told.tokens_before(far + 40) == walked.tokens_before(far + 40)
    assert told.after(far + 7) == walked.after(far + 7)
    for i in (0, 40, 333, far - 100, far - 1):  # what lies before is found too, by planning
        assert told.row(i) == expected[i]
    assert told.tokens_before(333) == walked.tokens_before(333)


def test_a_plan_that_counts_otherwise_has_another_fingerprint(tmp_path, monkeypatch):
    """Everything that a plan is made from, changed one at a time; nothing else (the path, what was read)."""
    path = synthetic.make_test_store(tmp_path / "s", kind="media", documents=80)
    other = synthetic.make_test_store(tmp_path / "other", kind="media", documents=80, seed=1)
    same = synthetic.make_test_store(tmp_path / "same", kind="media", documents=80)
    base = open_plan(path)[1].fingerprint
    again = open_plan(same)[1]
    again.row(3000)
    assert again.fingerprint == base
    changes = ({"seed": 6}, {"sequence_length": 33}, {"max_patches": 10}, {"max_audio_frames": 13}, {"policy": "no_split"})
    changes += ({"documents": np.arange(79)}, {"documents": np.arange(80)[::-1]}, {"delimited": (1,)}, {"delimited": (2,)})
    changes += ({"start": plan.Start((), 1)}, {"start": plan.Start((plan.Piece(0, 1, 2),), 0)})
    found = [open_plan(path, **change)[1].fingerprint for change in changes] + [open_plan(other)[1].fingerprint]
    for name in ("VERSION", "_BLOCK_ROWS", "_WINDOW_OF_TEXT", "_WINDOW_OF_MEDIA"):
        with monkeypatch.context() as patch:
            patch.setattr(plan, name, 17)
            found.append(open_plan(path)[1].fingerprint)
    s, moved = open_plan(path)
    moved._store.spans = s.spans.copy()
    moved._store.spans["at"][5] += 1
    assert len({base, moved.fingerprint, *found}) == len(found) + 2


def test_blocks_of_few_rows_where_media_and_not_tokens_fill_rows(tmp_path):
    """Rows are estimated by the scarcest of the three limits; a document of many blocks' length does not make empty ones."""
    path = synthetic.make_test_store(tmp_path / "s", kind="media", documents=3000)
    for policy in ("split_text_keep_spans", "no_split"):
        _, p = open_plan(path, sequence_length=60_000, policy=policy)
        assert p.epoch_blocks > 3
        assert 200 < p._block(0).rows < 600
    _, p = open_plan(synthetic.make_test_store(tmp_path / "long", lengths=(20_000, 30)), sequence_length=8, policy="no_split")
    assert p.epoch_blocks == 2
    assert [p.row(i) for i in range(p._block(0).rows)]


def test_far_rows_of_text_need_no_planning(tmp_path):
    _, p = open_plan(synthetic.make_test_store(tmp_path / "s", documents=60))
    far = 10**12
    assert sum(piece.stop - piece.start for piece in p.row(far)) <= 32
    rows = -(-p.epoch_tokens * p.block_epochs // 32)
    assert p.tokens_before(far) == far // rows * p.epoch_tokens * p.block_epochs + far % rows * 32
    assert p._block.cache_info().misses <= 2


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


@pytest.mark.parametrize("n", [1, 2, 37, 1000, 1024, 4097])
def test_permutations_are_permutations_and_frozen(n):
    for epoch in range(3):
        assert sorted(plan.permutation(n, seed=1, epoch=epoch).tolist()) == list(range(n))
    assert plan.permutation(8, seed=1, epoch=0).tolist() == plan.permutation(8, seed=1, epoch=0).tolist()


def test_permutation_is_uniform_enough():
    """Each of 20 elements comes first about equally often, and seed and epoch both matter."""
    first = np.bincount([plan.permutation(20, seed=seed, epoch=epoch)[0] for seed in range(50) for epoch in range(40)], minlength=20)
    assert float(((first - 100.0) ** 2 / 100.0).sum()) < 50  # chi-square of 19 degrees, p = 1e-4
