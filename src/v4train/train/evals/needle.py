"""A needle in a haystack: one fact somewhere in a long text, asked for at its end, for a grid of lengths and depths.

    <bos> text ... text The secret number of Oslo is 48213. text ... text The secret number of Oslo is| 48213

The document has exactly ``length`` tokens up to and with the answer; at depth 0 the fact is the first thing in it, at depth 1 it stands
just before the question. Each sample has its own place, number and stretch of text. The answer is judged with its right tokens fed back
(teacher forcing): a sample is found if each of its tokens is the likeliest after those before it, which is just when greedy decoding
would have written it. Five drawn digits are right by chance once in 100,000.

``nats`` of the answer say more than that while a model is small: five digits cost ``5 ln 10 = 11.5`` to one that knows nothing but what
a number looks like, less if it looks back. (A model that has never seen a question like this need not answer it; the probe tells
whether it *can* look back, so compare depths, lengths and checkpoints, not models of different data.)

All attention is that of training: window, compressed entries and what the indexer selects. A needle further back than the window can
only be found through the compressed entries.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from v4train.data import tokenizer as tokenizer_lib
from v4train.train.evals import judge

_DIGITS = 5
_PLACES = ("Oslo", "Lima", "Cairo", "Quito", "Riga", "Hanoi", "Accra", "Turin", "Perth", "Kyoto", "Delhi", "Malmo")
_SUBJECTS = ("The baker", "A gardener", "The old miller", "My neighbour", "The captain", "A young painter", "The teacher", "Our guest")
_VERBS = ("carried", "repaired", "described", "forgot", "painted", "measured", "bought", "hid", "counted", "polished")
_OBJECTS = (
    "a wooden ladder",
    "the green lamp",
    "two baskets",
    "the broken clock",
    "a heavy stone",
    "some maps",
    "the garden gate",
    "a boat",
)
_TIMES = ("before the rain", "in the morning", "near the river", "after the market", "without a word", "for a whole week", "at the bridge")
_SENTENCES = 4000


@dataclasses.dataclass(frozen=True)
class Cell:
    """A place in the grid: ``length`` in tokens, ``depth`` in 0..1, and what ``samples`` documents gave there.

    ``right`` is the share found, ``nats`` the mean of the whole answer.
    """

    length: int
    depth: float
    samples: int
    right: float
    nats: float


def text() -> str:
    """A haystack for who has no text at hand: made-up sentences, the same ones every time."""
    rng = np.random.default_rng(0)
    drawn = ((str(rng.choice(words)) for words in (_SUBJECTS, _VERBS, _OBJECTS, _TIMES)) for _ in range(_SENTENCES))
    return " ".join(f"{' '.join(words)}." for words in drawn) + "\n"


def haystack(hay: str, *, tokenizer: tokenizer_lib.Tokenizer, source: str) -> Int[np.ndarray, "n"]:
    """A text's ids.

    Raises:
        ValueError: it is empty.
    """
    ids = tokenizer.encode(hay).astype(np.int32)
    if not len(ids):
        raise ValueError(f"{source}: has no text for a haystack; name another file, or none: sentences are made up then")
    return ids


def document(
    hay: Int[np.ndarray, "n"], *, tokenizer: tokenizer_lib.Tokenizer, length: int, depth: float, seed: Sequence[int]
) -> judge.Asked:
    """One sample.

    Args:
        hay: ids of a text; repeated if it is short.
        tokenizer: whose ids they are.
        length: tokens, answer included.
        depth: 0 for the beginning, 1 for the end.
        seed: of place, number and stretch of text.

    Raises:
        ValueError: ``length`` has no room for fact and question.
    """
    rng = np.random.default_rng(seed)
    place, number = str(rng.choice(_PLACES)), "".join(str(digit) for digit in rng.integers(10, size=_DIGITS))
    question = f"\nThe secret number of {place} is"
    fact = tokenizer.encode(f"{question} {number}.\n").astype(np.int32)
    shared, whole = tokenizer.encode(question).astype(np.int32), tokenizer.encode(f"{question} {number}").astype(np.int32)
    room = length - 1 - len(fact) - len(whole)
    if room < 0:
        raise ValueError(f"needle: a length of {length} tokens has no room for fact and question, which take {length - room}; raise it")
    begin = int(rng.integers(len(hay)))
    around = np.take(hay, np.arange(begin, begin + room), mode="wrap")
    at = _boundary(around, round(depth * room), tokenizer=tokenizer)
    tokens = np.concatenate([[tokenizer.bos], around[:at], fact, around[at:], whole]).astype(np.int32)
    return judge.Asked(tokens, length - len(whole) + judge.shared(shared, whole))


def ask(
    hay: Int[np.ndarray, "n"],
    *,
    tokenizer: tokenizer_lib.Tokenizer,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    seed: int,
    judged: judge.Judge,
    params: dict,
) -> list[Cell]:
    """The whole grid, lengths outermost."""
    cells = [(length, depth) for length in lengths for depth in depths]
    made = [
        document(hay, tokenizer=tokenizer, length=length, depth=depth, seed=(seed, length, round(depth * 1000), i))
        for length, depth in cells
        for i in range(samples)
    ]
    verdicts = iter(judged(params, made))
    found = []
    for length, depth in cells:
        of_cell = [next(verdicts) for _ in range(samples)]
        right, nats = np.mean([v.right for v in of_cell]), np.mean([v.nats for v in of_cell])
        found.append(Cell(length, depth, samples, float(right), float(nats)))
    return found


def fields(cells: Sequence[Cell]) -> dict[str, float]:
    """What a record says: ``right`` and ``nats`` over all, ``<length>/<depth>/right`` and ``<length>/<depth>/nats`` of each."""
    found = {name: float(np.mean([getattr(cell, name) for cell in cells])) for name in ("right", "nats")}
    for cell in cells:
        name = f"{cell.length}/{cell.depth:g}"
        found |= {f"{name}/right": cell.right, f"{name}/nats": cell.nats}
    return found


def _boundary(ids: np.ndarray, at: int, *, tokenizer: tokenizer_lib.Tokenizer) -> int:
    """The last place at or before ``at`` where a word begins or ends, so that no word and no character is torn; ``at`` if none is near."""
    if at == len(ids):
        return at
    texts = (tokenizer.decode(ids[i : i + 1]) for i in range(max(at - 64, 0), at + 1))
    spaced = [(text[:1].isspace(), text[-1:].isspace()) for text in texts]
    for back, (after, before) in enumerate(zip(spaced[::-1], spaced[-2::-1], strict=False)):
        if after[0] or before[1]:
            return at - back
    return 0 if at < 64 else at
