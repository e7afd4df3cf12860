"""Turns step reports into records: losses by source, gradient norm, learning rate, throughput, expert load."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from v4train.model import config as model_config
from v4train.train import state as state_lib
from v4train.train import step as step_lib
from v4train.train.hooks import record


class Metrics:
    """A record of kind ``train`` per step, and of kind ``experts`` every so many."""

    def __init__(
        self,
        sink: record.Sink,
        *,
        sources: Sequence[str],
        layers: Sequence[str],
        tokens: Callable[[int], int],
        learning_rate: Callable[[int], float],
        flops_per_token: Callable[[int], float],
        peak_flops: float | None,
        experts_every: int,
        seconds_before: float,
        skipped_before: int,
        on_skip: Callable[[int, float], None],
    ):
        """Args:
        sink: where records go.
        sources: names of the data sources, in the batch's order.
        layers: a name per layer, for the load records.
        tokens: places of the global batches before a step.
        learning_rate: of a number of steps done.
        flops_per_token: of the training step with this number, from 0; sparse count.
        peak_flops: of all devices together, per second; None if unknown, then there is no MFU.
        experts_every: steps between load records.
        seconds_before: training time of earlier processes of this run.
        skipped_before: steps that they skipped.
        on_skip: told of each step whose gradients were not finite.
        """
        self._sink, self._sources, self._layers = sink, list(sources), list(layers)
        self._tokens, self._learning_rate = tokens, learning_rate
        self._flops_per_token, self._peak = flops_per_token, peak_flops
        self._experts_every, self._on_skip = experts_every, on_skip
        self._started = time.perf_counter() - seconds_before
        self._last = time.perf_counter()
        self._load: np.ndarray | None = None
        self._skipped = skipped_before

    def before(self, step: int, state: state_lib.State) -> None:
        """Nothing: reports say it all."""

    def after(self, step: int, report: step_lib.Report) -> None:
        """Writes the step's records."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        if not report.finite:
            self._skipped += 1
            self._on_skip(step, float(report.grad_norm))
        rate = (self._tokens(step) - self._tokens(step - 1)) / seconds
        by_source = {
            f"loss/{name}": float(nats)
            for name, nats, weight in zip(self._sources, report.text, report.text_weight, strict=True)
            if weight > 0
        }
        load = np.asarray(report.load)
        routed = max(float(load.sum(dtype=np.float64)), 1.0)
        self._sink(
            {
                "kind": "train",
                "step": step,
                "tokens": self._tokens(step),
                "seconds": now - self._started,
                "loss": float(report.loss),
                **by_source,
                "loss/mtp": float(report.mtp),
                "loss/indexer": float(report.indexer),
                "index_recall": None if report.index_recall is None else _finite(report.index_recall[0]),
                "index_recall_possible": None if report.index_recall is None else _finite(report.index_recall[1]),
                "loss/balance": float(report.balance),
                "learning_rate": self._learning_rate(step - 1),
                "grad_norm": float(report.grad_norm),
                "experts/late": float(report.late) / routed,
                "experts/dropped": float(report.dropped) / routed,
                "tokens_per_second": rate,
                "step_seconds": seconds,
                "mfu": None if self._peak is None else rate * self._flops_per_token(step - 1) / self._peak,
                "skipped": self._skipped,
                **rounding(report.rounding),
            }
        )
        self._load = load if self._load is None else self._load + load
        if step % self._experts_every == 0:
            self._sink({"kind": "experts", "step": step, "layers": self._layers, "load": relative_load(self._load)})
            self._load = None

    def begin(self) -> None:
        """The first step begins now."""
        self._last = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """So much since the last report was no step's: an evaluation, a compilation."""
        self._last += seconds


def _finite(value: jax.Array) -> float | None:
    return float(value) if np.isfinite(value) else None


def rounding(shares: Mapping[str, Any]) -> dict[str, float]:
    """``saturated/activations/linear`` and so on: shares of elements, of each role whose numbers are rounded to few bits."""
    return {
        f"{what}/{name}": float(share) for name, pair in shares.items() for what, share in zip(("saturated", "vanished"), pair, strict=True)
    }


def relative_load(load: np.ndarray) -> dict[str, list[list[float]]]:
    """Tokens ``[L, M, E]`` -> share of each expert relative to uniform, by modality and over all; absent modalities are left out."""

    def relative(counts: np.ndarray) -> list[list[float]]:
        counts = counts.astype(np.float64)
        mean = counts.mean(axis=-1, keepdims=True)
        return np.round(counts / np.maximum(mean, 1e-9), 4).tolist()

    parts = {"all": load.sum(axis=1)} | {name: load[:, i] for i, name in enumerate(model_config.MODALITIES)}
    return {name: relative(counts) for name, counts in parts.items() if counts.sum() > 0}


def layer_names(config: model_config.ModelConfig) -> list[str]:
    """``"0 window hash"``, ``"1 csa"``, ..., ``"mtp"``: as the load records name them."""
    names = [f"{i} {kind}{' hash' if i < config.moe.hash_layers else ''}" for i, kind in enumerate(config.layer_kinds)]
    return names if config.mtp is None else [*names, "mtp"]


def peak_memory_bytes() -> int:
    """The most memory in use at a time: of the devices where they tell, else of this process."""
    import resource

    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    on_devices = sum(s.get("peak_bytes_in_use", 0) for s in stats)
    return on_devices or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
