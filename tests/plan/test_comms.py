"""Transfers by closed forms, and the time of a transfer on networks whose answer is known."""

import pytest

from tests.plan import small
from v4train.core import hardware
from v4train.plan import activations, comms, estimate, machine, timing, weights
from v4train.sharding import mesh as mesh_lib

KEPT = {kind: activations.Kept(10**6, 4 * 10**6) for kind in ("csa", "hca", "window")}


def transfers(recipe, *, platform="gpu") -> dict[tuple[str, str, tuple[str, ...]], float]:
    on = machine.Machine("H100", hardware.CHIPS["H100"], recipe.mesh.devices)
    shape = next(iter(estimate.shapes_of(recipe)))
    found = estimate.of_phase(
        recipe, shape=shape, steps=1, on=on, assumed=timing.Assumptions(), platform=platform, per_layer=KEPT
    ).transfers
    return {(one.what, one.kind, one.axes): one.sent for one in found}


def test_one_device_sends_nothing():
    assert transfers(small.recipe(mesh={"fsdp": 1})) == {}


def test_experts_are_gathered_twice_and_scattered_once_a_microbatch():
    """Under fsdp and expert: each device holds 2 of 8 experts, in halves."""
    found = transfers(small.recipe(mesh={"fsdp": 2, "expert": 4}))
    experts = 4 * 3 * (8 // 4) * 128 * 64 * 4  # layers, matrices, experts, hidden, ffn, fp32
    assert found["gather", "all-gather", ("fsdp",)] == 2 * 2 * experts / 2
    assert found["scatter", "reduce-scatter", ("fsdp",)] == 2 * experts / 2


def test_copies_only_sum_gradients_and_share_newton_schulz():
    recipe = small.recipe(mesh={"fsdp": 1, "replica": 8})
    found = transfers(recipe)
    assert {key[:2] for key in found} == {("scatter", "all-reduce"), ("optimizer", "all-gather")}
    matrices = [128 * 64 * 3 * 8 * 4]  # the experts are most of it
    assert found["optimizer", "all-gather", ("replica",)] > matrices[0] * 4 * 7 / 8


def test_the_cpu_sums_dense_gradients_whole():
    recipe = small.recipe(mesh={"fsdp": 8})
    on_cpu, on_gpu = (transfers(recipe, platform=platform) for platform in ("cpu", "gpu"))
    dense = on_gpu["scatter", "reduce-scatter", ("fsdp",)] - on_cpu["scatter", "reduce-scatter", ("fsdp",)]
    small_ones = on_gpu["scatter", "all-reduce", ("fsdp",)]
    assert on_cpu["scatter", "all-reduce", ("fsdp",)] == pytest.approx(2 * dense + small_ones)


def test_context_sends_entries_and_halos_but_no_raw_sequence():
    recipe = small.recipe(mesh={"fsdp": 1, "context": 8}, train={"batch_rows": 2})
    found = transfers(recipe)
    local, width, others = 256 // 8, 4, 7
    csa, hca = local // 4 * (32 + 32), local // 16 * 32
    assert found["context", "all-gather", ("context",)] == 2 * 2 * 2 * (csa + hca) * width * others  # microbatches, layers, passes
    raw = 256 * 128 * width
    assert found["context", "permute", ("context",)] < 2 * 4 * 3 * raw


def test_half_as_wide_numbers_are_half_the_bytes_but_for_what_is_summed_in_fp32():
    """bf16 against fp32. Gradients of entries are scattered in fp32, and Newton-Schulz has a dtype of its own."""
    halves = {("gather", "all-gather"), ("context", "all-gather"), ("experts", "all-to-all"), ("gather", "all-to-all")}
    same = {("context", "reduce-scatter"), ("optimizer", "all-to-all"), ("optimizer", "all-gather")}
    for mesh in ({"fsdp": 2, "expert": 4}, {"fsdp": 1, "context": 8}):
        changes = {"mesh": mesh, "train": {"batch_rows": 16 if "expert" in mesh else 2, "microbatches": 2}}
        wide, narrow = (transfers(small.recipe(numerics={"compute": dtype}, **changes)) for dtype in ("float32", "bfloat16"))
        assert wide.keys() == narrow.keys()
        seen = {key[:2] for key in wide}
        assert seen & halves
        assert seen & same
        for key, sent in wide.items():
            if key[:2] in halves:
                assert narrow[key] == pytest.approx(sent / 2, rel=0.04), key  # a few parameters stay in fp32
            if key[:2] in same:
                assert narrow[key] == sent, key


def test_tensor_sums_three_projections_a_layer_each_way():
    """In an HCA layer alone, by hand: forward, again, and backward; then what all heads and all parts of experts read."""
    recipe = small.recipe(
        mesh={"fsdp": 1, "tensor": 8}, model={"layers": [{"pattern": ["hca"]}]}, train={"batch_rows": 2, "microbatches": 1}
    )
    tokens, d, entries, head, rank = 2 * 256, 128, 2 * 256 // 16, 32, 64
    once = tokens * d * 3 * 3 + tokens * (rank + head) + entries * head + 2 * tokens * head
    ends = 3 * tokens * d + 3 * tokens  # embedding, the loss's input, and its three numbers a token
    assert transfers(recipe)["tensor", "all-reduce", ("tensor",)] == (once + ends) * 4 * 2 * 7 / 8


def test_a_matrix_stored_in_parts_goes_there_and_back():
    """Under context 8, an eighth of each matrix is at home; all others' parts come, and their results go."""
    recipe = small.recipe(mesh={"fsdp": 1, "context": 8}, train={"batch_rows": 2})
    found = transfers(recipe)["optimizer", "all-to-all", ("context",)]
    placed = weights.on_mesh(estimate.declarations_of(recipe), mesh=mesh_lib.abstract(recipe.mesh))
    split = [w for w in placed if w.declaration.group == "muon" and (w.rows or w.columns)]
    elements = sum(w.stored for w in split)  # padding apart
    assert split
    assert 2 * elements * 4 * 7 / 8 <= found <= 2 * 2 * elements * 4 * 7 / 8


@pytest.mark.parametrize(
    ("kind", "axes", "seconds"),
    [
        # 64 GPUs: context 8 is a server; expert 8 is one GPU of each of 8 servers.
        ("all-gather", ("context",), 450e9 / 450e9),
        ("all-gather", ("expert",), 450e9 / 50e9),
        ("all-gather", ("expert", "context"), 450e9 * 56 / 63 / 8 / 50e9),  # the 8 GPUs of a server share what comes in
        ("all-to-all", ("context",), 450e9 / 450e9),
        ("all-to-all", ("expert",), 450e9 / 50e9),
        ("all-to-all", ("expert", "context"), 450e9 * 56 / 63 / 50e9),  # nothing to share
    ],
)
def test_gpus_are_fast_inside_a_server_and_share_its_cards(kind, axes, seconds):
    sizes = {"replica": 1, "fsdp": 1, "expert": 8, "context": 8, "tensor": 1}
    one = comms.Transfer("gather", kind, axes, 450e9)
    found = comms.seconds(one, sizes=sizes, on=machine.parse("H100x64"))
    assert found == pytest.approx(max(seconds, 450e9 / 450e9 if kind == "all-gather" else 0) / comms.EFFICIENCY)


def test_a_torus_gathers_over_all_its_links_and_exchanges_over_its_middle():
    sizes = {"replica": 1, "fsdp": 8, "expert": 64, "context": 1, "tensor": 1}
    on = machine.parse("v5p:8x8x8")
    ring, plane = (
        comms.seconds(comms.Transfer("gather", "all-gather", axes, 1e9), sizes=sizes, on=on) for axes in (("fsdp",), ("expert",))
    )
    assert ring == pytest.approx(1e9 / (2 * 100e9) / comms.EFFICIENCY)
    assert plane == pytest.approx(ring / 2)
    exchange = comms.seconds(comms.Transfer("experts", "all-to-all", ("expert",), 1e9), sizes=sizes, on=on)
    assert exchange == pytest.approx(8 / 8 * 1e9 / 100e9 / comms.EFFICIENCY)


def test_slices_are_joined_by_the_hosts_network():
    sizes = {"replica": 2, "fsdp": 512, "expert": 1, "context": 1, "tensor": 1}
    one = comms.Transfer("scatter", "all-reduce", ("replica",), 6.25e9)
    assert comms.seconds(one, sizes=sizes, on=machine.parse("v5p:8x8x8:2")) == pytest.approx(1 / comms.EFFICIENCY)
    assert comms.seconds(one, sizes=sizes, on=machine.parse("v5p:8x8x16")) < 0.1
