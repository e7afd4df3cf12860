"""What the model declares of its parameters: which stay fp32, which decay, which optimizer has them."""

import re

import pytest

from tests.model import small
from v4train.core import param

FP32 = re.compile(r"(^|/)(ape|sink|gate|bias|table|norm|[a-z]+_norm|enorm|hnorm|columns|rows)$|(_mix|collapse)/(fn|scale|base)$")
ADAMW = re.compile(
    r"(^|/)(ape|sink|norm|[a-z]+_norm|enorm|hnorm|columns|rows|head)$|(_mix|collapse)/(scale|base)$|embedding/(table|audio/table)$"
)
NO_DECAY = re.compile(r"(^|/)(ape|sink)$|(_mix|collapse)/(scale|base)$")


@pytest.fixture(scope="module")
def declared():
    config = small.config("window", "csa", "hca", "csa", "hca", moe={"hash_layers": 2})
    return param.flatten(small.declarations(config))


def is_compute_table(path: str) -> bool:
    return path in ("embedding/table", "embedding/audio/table")


def test_what_must_not_lose_precision_is_declared_fp32(declared):
    for path, d in declared.items():
        expected = bool(FP32.search(path)) and not is_compute_table(path)
        assert (d.precision == "fp32") == expected, path
    for name in ("ape", "sink", "router/gate", "router/bias", "mix/fn", "mix/scale", "mix/base", "collapse/fn", "q_norm", "kv_norm"):
        assert any(path.endswith(name) for path in declared), f"{name} is gone: the test above may be blind"


def test_sinks_and_hyper_connection_scalars_do_not_decay(declared):
    for path, d in declared.items():
        if d.trained:
            assert d.decay != bool(NO_DECAY.search(path)), path
        else:
            assert not d.decay, path


def test_muon_has_the_matrices_but_not_embedding_head_or_vectors(declared):
    for path, d in declared.items():
        if not d.trained:
            assert path.endswith(("router/bias", "router/table")), path
            continue
        assert (d.group == "adamw") == bool(ADAMW.search(path)), path
        matrix = [axis for axis in d.axes if axis not in ("layers", "experts", "groups")]
        assert d.group != "muon" or len(matrix) == 2, f"{path}: {d.axes} is not a matrix"


def test_independent_matrices_are_stacked_in_front(declared):
    """Muon takes the last two axes as one matrix: experts and output groups must not be folded into them."""
    layer = "stack/run_2/layer_0" if "stack/run_2/layer_0/attention_norm" in declared else "stack/run_1/layer_0"
    assert declared[f"{layer}/moe/experts/w1"].axes[:2] == ("layers", "experts")
    assert declared[f"{layer}/moe/experts/w1"].shape[-2:] == (32, 16)
    assert declared[f"{layer}/moe/experts/w2"].shape[-2:] == (16, 32)
    assert declared[f"{layer}/attention/projections/wo_a"].axes[:2] == ("layers", "groups")
    assert declared[f"{layer}/attention/projections/wo_a"].shape[-2:] == (2 * 16, 8)


def test_tags_say_who_is_who(declared):
    for path, d in declared.items():
        assert ("indexer" in d.tags) == ("/indexer/" in path), path
        assert ("routed_expert" in d.tags) == ("/moe/experts/" in path), path
        assert ("router_bias" in d.tags) == path.endswith("router/bias"), path
        assert ("hash_table" in d.tags) == path.endswith("router/table"), path
        assert ("mtp" in d.tags) == path.startswith("mtp/"), path
        assert ("embedding" in d.tags) == path.startswith("embedding/"), path


def test_tables_are_integers_that_no_optimizer_sees(declared):
    tables = {path: d for path, d in declared.items() if "hash_table" in d.tags}
    assert len(tables) == 2
    for path, d in tables.items():
        assert d.dtype.kind == "i", path
        assert d.group == "buffer", path
        assert d.shape == (1, small.VOCAB, 2), path
    assert not any("hash_table" in d.tags for path, d in declared.items() if path.startswith("mtp/")), "the MTP block routes by its gate"
