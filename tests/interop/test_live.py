"""Random models of the public PyTorch class against ours: logits, loss, every gradient, greedy tokens.

    pip install -e '.[test,interop]' -c constraints.txt        # a CPU build of torch is enough
    python -m pytest tests/interop/test_live.py -m interop

Each case is drawn from its number: odd sizes, windows from 1 to 128, compression ratios and lengths without a common divisor, up to three
hash-routed layers, more and fewer selected entries than there are, 2 to 4 streams, a SwiGLU limit that cuts, with and without YaRN,
and in every third case a prompt with padding inside. The weights go through a directory that `transformers` writes.
"""

import contextlib
import pathlib
import warnings
from typing import Any

import numpy as np
import pytest

from v4train.interop import parity, score

pytestmark = pytest.mark.usefixtures("quick_compilation")
CASES = range(20)
WINDOW, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
PAD = 0
NOISE = 3e-4
"""Of case 10, one tensor has 3e-5 of the gradient's norm: three factors, each a sum of terms that cancel to 1 part in 240. In
fp64 the class is 2e-5 from its own fp32 there; ours is 3.5e-4 from it, 1e-8 of the whole norm: rounding."""


def draw(case: int) -> tuple[dict[str, Any], int]:
    """Keyword arguments of the class's config, and the length of rows."""
    rng = np.random.default_rng(1000 + case)

    def between(low: int, high: int) -> int:
        return int(rng.integers(low, high + 1))

    kinds = [CSA, *rng.choice([WINDOW, CSA, CSA, HCA], between(1, 3)).tolist()]
    rng.shuffle(kinds)
    groups, rope = between(1, 3), 2 * between(1, 4)
    ratios = {CSA: between(2, 6), HCA: between(5, 40)}
    window = [1, 128, between(2, 20), between(20, 128)][case % 4]
    length = next(x for x in range(between(40, 140), 200) if all(x % ratio for ratio in ratios.values()))
    entries = length // ratios[CSA]
    experts = between(3, 9)
    values = {
        "vocab_size": between(50, 120),
        "hidden_size": between(20, 50),
        "moe_intermediate_size": between(9, 30),
        "num_attention_heads": groups * between(1, 3),
        "o_groups": groups,
        "o_lora_rank": between(5, 17),
        "head_dim": rope + 2 * between(1, 10),
        "qk_rope_head_dim": rope,
        "q_lora_rank": between(7, 23),
        "n_routed_experts": experts,
        "num_experts_per_tok": between(1, min(experts, 3)),
        "index_n_heads": between(1, 7),
        "index_head_dim": rope + between(0, 9),
        "index_topk": [1, between(2, entries // 2), between(entries // 3, entries - 1), entries + 3][(case // 2) % 4],
        "sliding_window": window,
        "layer_types": kinds,
        "num_hidden_layers": len(kinds),
        "compress_rates": ratios,
        "num_hash_layers": min(case % 4, len(kinds)),
        "hc_mult": between(2, 4),
        "hc_sinkhorn_iters": between(2, 20),
        "swiglu_limit": float(rng.choice([0.3, 1.0, 10.0])),
        "routed_scaling_factor": float(rng.uniform(0.5, 3)),
        "rms_norm_eps": float(rng.choice([1e-6, 1e-5, 1e-3])),
        "rope_theta": float(rng.choice([1e4, 3e3])),
        "compress_rope_theta": float(rng.choice([1.6e5, 4e4])),
        "initializer_range": 0.1,
        "max_position_embeddings": 4096,
    }
    if case % 2:
        values["rope_parameters"] = {
            "rope_type": "yarn",
            "factor": float(rng.uniform(2, 40)),
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": between(32, 2048),
        }
    return values, length


@contextlib.contextmanager
def quiet():
    """What torch and transformers warn of is not ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build(case: int, directory: pathlib.Path) -> parity.Reference:
    """Saves a random model and runs it."""
    import torch
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    values, length = draw(case)
    torch.manual_seed(case)
    generator = torch.Generator().manual_seed(case)
    config = DeepseekV4Config(**values)
    model = DeepseekV4ForCausalLM(config).float().eval()
    model.set_experts_implementation("eager")  # the grouped product refuses odd widths
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1 or "position_bias" in name or name.endswith(("base", "scale")):
                p.add_(0.3 * torch.randn(p.shape, generator=generator))
        for name, b in model.named_buffers():
            if "e_score_correction_bias" in name:
                b.copy_(0.2 * torch.randn(b.shape, generator=generator))
            if "tid2eid" in name:
                rows = [torch.randperm(config.n_routed_experts, generator=generator)[: b.shape[1]] for _ in range(config.vocab_size)]
                b.copy_(torch.stack(rows))
    tokens = torch.randint(1, config.vocab_size, (1 + case % 2, length), generator=generator)
    if case % 3 == 0:
        tokens[0, torch.randint(0, length // 2, (3,), generator=generator)] = PAD
    out = model(tokens, labels=tokens)
    out.loss.backward()
    norms = {name: float(p.grad.double().norm()) for name, p in model.named_parameters() if p.grad is not None}
    continued = None
    if config.sliding_window > 1:  # at 1 the class's cache keeps every key, and its mask no longer fits
        with torch.no_grad():
            prompt = tokens[:1, : length // 2]
            greedy = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=PAD)
        continued = greedy[0, length // 2 :].numpy().astype(np.int32)
    model.save_pretrained(directory)
    return parity.Reference(tokens.numpy().astype(np.int32), out.logits.detach().numpy(), float(out.loss), norms, continued, PAD)


@pytest.mark.interop
@pytest.mark.slow  # compiles two programs per case
@pytest.mark.parametrize("case", CASES)
def test_a_random_model_gives_what_the_public_class_gives(case, tmp_path):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    with quiet():
        reference = build(case, tmp_path)
    result = parity.measure(score.load(tmp_path), reference=reference, noise=NOISE)
    assert not result.failures(), (result.failures(), draw(case))


def test_the_cases_cover_what_they_are_for():
    drawn = [draw(case) for case in CASES]
    configs = [values for values, _ in drawn]
    assert {1, 128} <= {c["sliding_window"] for c in configs}
    assert {c["num_hash_layers"] for c in configs} >= {0, 1, 2, 3}
    assert {c["hc_mult"] for c in configs} == {2, 3, 4}
    assert {kind for c in configs for kind in c["layer_types"]} == {WINDOW, CSA, HCA}
    more = [c["index_topk"] > length // c["compress_rates"][CSA] for c, length in drawn]
    assert 0 < sum(more) < len(more) / 2
    assert sum("rope_parameters" in c for c in configs) == len(configs) / 2
    assert all(length % ratio for c, length in drawn for ratio in c["compress_rates"].values())
    for c in configs:  # the class computes this size with a division, which may round down
        assert int(c["head_dim"] * (c["qk_rope_head_dim"] / c["head_dim"])) == c["qk_rope_head_dim"]
