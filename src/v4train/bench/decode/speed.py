"""Time of decoding by length of context: the attention of one CSA layer, the scan of its index alone, and a whole decode step.

Modes take turns within each length, so that what else runs on the machine disturbs all of them alike; figures are medians.

* ``attention`` is what a CSA layer does between its projections: index scores, selection, gather, reading the format, softmax over
  window and entries. The dense modes attend to every entry of the same compressed cache.
* ``scan`` is the part of the sparse modes that grows with the context by nature: index scores of all keys and the selection.
* ``step`` is one token through all layers of a cut model (`bench.decode.filled`), with experts and head.
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from v4train.bench.decode import filled
from v4train.decode import attention
from v4train.decode import cache as cache_lib
from v4train.decode import config as decode_config
from v4train.decode import decoder as decoder_lib
from v4train.model import config as model_config

_PAIR = ("dense-bf16", "sparse-fp8")


def csa_layer(model: model_config.ModelConfig) -> tuple[str, str, model_config.CompressedSparseConfig]:
    """Run, place and kind of the first CSA layer.

    Raises:
        ValueError: the model has none.
    """
    layout = cache_lib.Layout(model, decode_config.DecodeConfig(max_length=256), jnp.dtype(jnp.float32))
    for run, places in layout.structure().layers.items():
        for place, layer in places.items():
            if layer.index is not None:
                return run, place, next(k for k in model.kinds if isinstance(k, model_config.CompressedSparseConfig))
    raise ValueError("the model has no CSA layer whose phase is sparse: there is nothing to select")


class Times(NamedTuple):
    """Median milliseconds of each call: those that pass, and those that the process has a core. Where others compute too, the latter tell
    more."""

    wall: dict[str, float]
    cpu: dict[str, float]


def times(calls: dict[str, Callable[[], Any]], *, rounds: int) -> Times:
    """Of each call, after one that warms up; the calls take turns."""
    for call in calls.values():
        jax.block_until_ready(call())
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter(), time.process_time()
            jax.block_until_ready(call())
            found[name].append((time.perf_counter() - started[0], time.process_time() - started[1]))
    return Times(*({name: round(statistics.median(one[i] for one in each) * 1e3, 3) for name, each in found.items()} for i in (0, 1)))


def medians(calls: dict[str, Callable[[], Any]], *, rounds: int) -> dict[str, float]:
    """The milliseconds of `times` that pass."""
    return times(calls, rounds=rounds).wall


def attention_path(model: model_config.ModelConfig, *, length: int, modes: Iterable[str], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of one layer's attention for one token, by mode: ``attention``, and where there is a selection ``scan``; ``_cpu``: of a
    core."""
    a, rng = model.attention, np.random.default_rng(2)
    run, place, kind = csa_layer(model)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    query, keys, sink = draw(1, 1, a.heads, a.head_dim), draw(1, a.window, a.head_dim), draw(a.heads)
    index_query, index_weight = draw(1, 1, kind.index_heads, kind.index_head_dim), draw(1, 1, kind.index_heads)
    positions, real = jnp.full((1, 1), length - 1, jnp.int32), jnp.ones((1, 1), bool)
    whole, scan = {}, {}
    for mode in modes:
        layout = cache_lib.Layout(model, filled.config(mode, length=length), jnp.dtype(jnp.float32))
        cache = filled.fill(layout, length=length)
        layer = cache.layers[run][place]
        pages, entries, keys_of_index = cache.page_table, layer.entries, layer.index
        del cache

        def attend(query, keys, entries, keys_of_index, pages, *, layout=layout) -> jax.Array:
            zero = jnp.zeros((), jnp.int32)
            pool = attention.Pool(entries, zero, layout.entries_format(), kind.ratio)
            index = None
            if keys_of_index is not None:
                index_pool = attention.Pool(keys_of_index, zero, layout.index_format(kind), kind.ratio)
                index = attention.Index(index_query, index_weight, index_pool, kind.top_k)
            fixed = {"positions": positions, "real": real, "pages": pages, "chunk": a.chunk}
            return attention.attend(query, keys, sink, **fixed, entries=pool, index=index)

        def select(index_query, index_weight, keys_of_index, pages, *, layout=layout) -> Any:
            pool = attention.Pool(keys_of_index, jnp.zeros((), jnp.int32), layout.index_format(kind), kind.ratio)
            item = attention.Item(query[0], positions[0], real[0], keys[0], pages[0], index_query[0], index_weight[0])
            index = attention.Index(index_query, index_weight, pool, kind.top_k)
            return attention.select_entries(item, index, (positions[0] + 1) // kind.ratio)

        whole[mode] = functools.partial(jax.jit(attend), query, keys, entries, keys_of_index, pages)
        if keys_of_index is not None:
            scan[mode] = functools.partial(jax.jit(select), index_query, index_weight, keys_of_index, pages)
    found: dict[str, dict[str, float]] = {mode: {} for mode in whole}
    for name, each in (("attention", times(whole, rounds=rounds)), ("scan", times(scan, rounds=rounds))):
        for end, clock in (("", each.wall), ("_cpu", each.cpu)):
            for mode, value in clock.items():
                found[mode][name + end] = value
    return found


class Stepper:
    """Decodes on from a filled cache, one token of every slot a call."""

    def __init__(self, decoder: decoder_lib.Decoder, *, length: int):
        """Holds the cache; ``length`` tokens are in it."""
        self.decoder, slots = decoder, decoder.config.slots
        placed = jax.tree.leaves(decoder.params)[0].sharding
        self.cache = jax.device_put(filled.fill(decoder.layout, length=length), placed)
        self.tokens, self.active = np.arange(1, slots + 1, dtype=np.int32), np.ones(slots, bool)

    def __call__(self) -> jax.Array:
        """Logits of the next token."""
        done = self.decoder.step(self.cache, tokens=self.tokens, active=self.active)
        self.cache = done.cache
        return done.logits


def step(
    model: model_config.ModelConfig, params: dict, *, lengths: Iterable[int], modes: Iterable[str], slots: int, rounds: int
) -> dict[int, dict[str, dict[str, float]]]:
    """Milliseconds of a whole decode step of ``slots`` sequences by length, clock (``modes``: those that pass, ``cpu``: of a core) and
    mode. A context ends a few tokens before its length, so that the steps fit into it."""
    steppers = {}
    for length in lengths:
        for mode in modes:
            decoder = filled.decoder(model, params, filled.config(mode, length=length, slots=slots))
            steppers[f"{length}/{mode}"] = Stepper(decoder, length=length - rounds - 1)
    found: dict[int, dict[str, dict[str, float]]] = {}
    measured = times(steppers, rounds=rounds)
    for clock, values in (("modes", measured.wall), ("cpu", measured.cpu)):
        for name, value in values.items():
            length, _, mode = name.partition("/")
            found.setdefault(int(length), {}).setdefault(clock, {})[mode] = value
    return found


def measure(
    model: model_config.ModelConfig,
    *,
    lengths: Sequence[int],
    step_lengths: Sequence[int],
    growth_lengths: Sequence[int],
    batches: Sequence[int],
    rounds: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """All measurements.

    Args:
        model: with true layers, few of them.
        lengths: at which attention alone is measured, in all modes.
        step_lengths: at which a whole step of each number of sequences in ``batches`` is, sparse fp8 and dense bf16.
        growth_lengths: at which a step of one sequence is, sparse fp8.
        batches: numbers of sequences.
        rounds: turns whose median counts.
        say: is told what goes on.
    """
    paths = []
    for length in lengths:
        say(f"attention at {length:,} tokens")
        modes = attention_path(model, length=length, modes=filled.MODES, rounds=rounds)
        faster = {f"speedup{end}": modes["dense-bf16"][f"attention{end}"] / modes["sparse-fp8"][f"attention{end}"] for end in ("", "_cpu")}
        paths.append({"length": length, "modes": modes} | faster)
    say("drawing weights")
    params = filled.parameters(model) if step_lengths or growth_lengths else {}
    steps = []
    for batch in batches if step_lengths else ():
        rows = []
        for length in step_lengths:
            say(f"step of {batch} sequences at {length:,} tokens")
            found = step(model, params, lengths=(length,), modes=_PAIR, slots=batch, rounds=rounds)[length]
            faster = {f"speedup{end}": found[clock][_PAIR[0]] / found[clock][_PAIR[1]] for clock, end in (("modes", ""), ("cpu", "_cpu"))}
            rows.append({"length": length} | found | faster)
        steps.append({"sequences": batch, "rows": rows, "growth": None})
    if growth_lengths:
        say("step of 1 sequence at " + ", ".join(f"{length:,}" for length in growth_lengths) + " tokens")
        found = step(model, params, lengths=growth_lengths, modes=("sparse-fp8",), slots=1, rounds=rounds)
        rows = [{"length": length} | clocks for length, clocks in found.items()]
        steps.append({"sequences": 1, "rows": rows, "growth": _growth(model, found, rounds=rounds)})
    return {"model": _sizes(model), "attention": paths, "steps": steps}


def _sizes(model: model_config.ModelConfig) -> dict[str, int]:
    a, (_, _, kind) = model.attention, csa_layer(model)
    return {
        "hidden": model.hidden,
        "heads": a.heads,
        "head_dim": a.head_dim,
        "query_rank": a.query_rank,
        "output_rank": a.output_rank,
        "window": a.window,
        "index_heads": kind.index_heads,
        "index_head_dim": kind.index_head_dim,
        "top_k": kind.top_k,
        "experts": model.moe.experts,
        "ffn": model.moe.ffn,
    }


def _growth(model: model_config.ModelConfig, found: dict[int, dict[str, dict[str, float]]], *, rounds: int) -> dict[str, Any]:
    """How a step grows from the shortest to the longest context, with the scan of the index and without, by both clocks."""
    first, last = min(found), max(found)
    scans = {n: attention_path(model, length=n, modes=("sparse-fp8",), rounds=rounds)["sparse-fp8"] for n in (first, last)}
    grown: dict[str, Any] = {"from": first, "to": last}
    for clock, scan, end in (("modes", "scan", ""), ("cpu", "scan_cpu", "_cpu")):
        whole = {n: found[n][clock]["sparse-fp8"] for n in (first, last)}
        rest = {n: whole[n] - scans[n][scan] for n in whole}
        grown[scan] = {n: scans[n][scan] for n in scans}
        grown |= {f"whole{end}": whole[last] / whole[first], f"without_scan{end}": rest[last] / rest[first]}
    return grown
