"""Config of decoding: how many sequences, how long, and what their memory is made of. Units: tokens and bytes."""

from typing import Annotated, Literal

import pydantic

from v4train.config import base

_Positive = Annotated[int, pydantic.Field(gt=0)]


class DecodeConfig(base.Config):
    """Sizes and formats of the decoder. None of them changes an answer, but `cache` and `attention`."""

    slots: _Positive = 1
    """Sequences that run together."""
    max_length: _Positive = 4096
    """Most tokens of a sequence, prompt and answer. Memory is taken by pages, time by the tokens there are: this only bounds a table."""
    prefill_chunk: _Positive = 512
    """Tokens of a prompt that are processed at a time."""
    cache: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Format of compressed entries and index keys. fp8: E4M3 with a power of two as scale (one per 64 channels, one per index key),
    channels that carry the rotation in bf16."""
    attention: Literal["selected", "dense"] = "selected"
    """dense: CSA layers attend every visible entry instead of those that the indexer selects: for comparisons of speed."""
    page_tokens: _Positive = 256
    """Tokens whose entries share a page, a multiple of every compression ratio."""
    pages: _Positive | None = None
    """Pages of the pool that all sequences share. null: as device_bytes says, or enough for every slot to be full."""
    device_bytes: _Positive | None = None
    """Size of the cache, windows and tails included; the pool takes what they leave."""
    speculate: bool = False
    """Draft with the model's MTP block."""

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.pages is not None and self.device_bytes is not None:
            raise ValueError(f"pages {self.pages} and device_bytes {self.device_bytes} both set the size of the pool: give one of them")
        return self

    @property
    def pages_per_slot(self) -> int:
        """Pages of a sequence of max_length tokens."""
        return -(-self.max_length // self.page_tokens)
