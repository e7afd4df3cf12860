"""How many parameters a model has, and how many of them one token uses: from the declarations, so no array and no device is needed.

Conventions, chosen so that they give the published figures (V4-Flash 284B total, 13B active; V4-Pro 1.6T, 49B):

* Both are of the *backbone*: without the multi-token prediction block, which is listed separately.
* Total counts everything that is trained, the input embedding and the output head included. Buffers (selection biases, hash tables)
  are not parameters.
* Active is what one text token multiplies: of the routed experts ``top_k / E``, everything else whole, and nothing of the input
  embedding: looking up a row multiplies nothing, and the stems of images and audio see media slots only. The head does count. Hence
  the forward pass costs two FLOPs per active parameter, up to norms and other vectors, plus attention (`model.flops`).
"""

import dataclasses

from v4train.core import param

_KINDS = (
    ("embedding/image", "stem"),
    ("embedding/audio", "stem"),
    ("embedding", "embedding"),
    ("head", "head"),
    ("attention/indexer", "indexer"),
    ("attention/compressor", "compressor"),
    ("attention", "attention"),
    ("moe/experts", "routed_expert"),
    ("moe/shared", "shared_expert"),
    ("moe/router", "router"),
    ("attention_mix", "hyper_connection"),
    ("moe_mix", "hyper_connection"),
    ("collapse", "hyper_connection"),
    ("attention_norm", "norm"),
    ("moe_norm", "norm"),
    ("norm", "norm"),
)
"""Part of a parameter's path -> kind; the first match wins."""


@dataclasses.dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: of the backbone.
        active: of the backbone, used by one text token.
        mtp: of the multi-token prediction block; the head and embedding that it shares are not in it.
        mtp_active: of that block, used by one token.
        by_kind: of the backbone; sums to ``total``.
    """

    total: int
    active: int
    mtp: int
    mtp_active: int
    by_kind: dict[str, int]


def parameters(declarations: dict, *, top_k: int) -> ParameterCount:
    """Counts the declarations of a `Transformer`.

    Args:
        declarations: nested dict, `core.param.declarations`.
        top_k: routed experts per token.
    """
    totals = {"backbone": 0, "mtp": 0}
    active = dict(totals)
    by_kind: dict[str, int] = {}
    for path, declaration in param.flatten(declarations).items():
        if not declaration.trained:
            continue
        part = "mtp" if "mtp" in declaration.tags else "backbone"
        totals[part] += declaration.size
        active[part] += _active(declaration, top_k=top_k)
        if part == "backbone":
            kind = kind_of(path)
            by_kind[kind] = by_kind.get(kind, 0) + declaration.size
    return ParameterCount(totals["backbone"], active["backbone"], totals["mtp"], active["mtp"], by_kind)


def kind_of(path: str) -> str:
    """What a parameter of the backbone is part of: ``stack/run_0/layer_1/moe/experts/w1`` is a ``routed_expert``."""
    found = next((kind for part, kind in _KINDS if f"/{part}/" in f"/{path}/"), None)
    assert found is not None, f"{path} is of no kind: add a row to _KINDS"
    return found


def _active(declaration: param.Declaration, *, top_k: int) -> int:
    if "embedding" in declaration.tags:
        return 0
    if "routed_expert" not in declaration.tags:
        return declaration.size
    return declaration.size // declaration.shape[declaration.axes.index("experts")] * top_k
