"""Config of decoding: how many sequences, how long, and what their memory is made of. Units: tokens and bytes."""

from typing import Annotated, Literal

import pydantic

from v4train.config import base

_Positive = Annotated[int, pydantic.Field(gt=0)]


class DiskConfig(base.Config):
    """A directory of cache blocks that outlive the process. One process at a time may use it."""

    path: str
    """The directory; it is made if it is not there."""
    bytes: _Positive
    """Most bytes of everything in it; what was used longest ago goes first."""


class TiersConfig(base.Config):
    """Where the entries lie that an indexer selects from. The tiers change no answer, whatever their sizes."""

    hot_entries: _Positive = 1024
    """Entries of a sequence and layer that are on the device. At least what a step selects."""
    host_bytes: _Positive
    """Host memory for all entries."""
    disk: DiskConfig | None = None
    """Takes what host memory cannot hold, and prompts' caches for later processes."""


class DecodingConfig(base.Config):
    """What `v4train generate` and `v4train serve` do with a checkpoint where no option says otherwise. Training reads none of it."""

    cache: Literal["fp32", "bf16", "fp8"] = "bf16"
    """Format of compressed entries and index keys (`--cache`)."""
    prefill_chunk: _Positive = 512
    """Tokens of a prompt that are processed at a time (`--chunk`)."""
    speculate: bool = False
    """Draft with the model's MTP block (`--speculate`)."""
    tiers: TiersConfig | None = None
    """Entries that an indexer selects from in host memory and on disk, with the bytes that each may take (`--host-cache`, `--disk-cache`).
    null: everything is on the device."""
    prefix_bytes: Annotated[int, pydantic.Field(ge=0)] | None = None
    """Host memory for taking up prompts that begin as earlier ones did (`--prefix-bytes`). null: 256 MiB in a server and with a disk, else
    none."""
    keep_answers: bool = False
    """Take up answers too, not only prompts (`--keep-answers`): the next turn of a conversation then computes its own message alone. What
    steps compute agrees with what a prompt's chunks would have only up to rounding, so an answer may then depend on what was asked before.
    """
    slots: _Positive = 8
    """Requests that a server answers together (`--slots`)."""
    max_length: _Positive | None = None
    """Most tokens of prompt and answer in a server (`--max-length`). null: 4096, or what the model was made for if that is less."""
    device_bytes: _Positive | None = None
    """Size of a server's cache on the device (`--device-bytes`). null: enough for every slot to reach max_length."""


class DecodeConfig(base.Config):
    """Sizes and formats of the decoder. None of them changes an answer, but `cache` and `attention`, and by rounding `keep_answers`."""

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
    tiers: TiersConfig | None = None
    """Entries that an indexer selects from in host memory and on disk. null: everything is on the device."""
    prefix_bytes: Annotated[int, pydantic.Field(ge=0)] = 0
    """Host memory for states in which a prompt is taken up that begins as an earlier one did. 0: every prompt is computed."""
    state_tokens: _Positive = 4096
    """Such a state is kept every so many tokens, and at the last whole chunk of a prompt."""
    keep_answers: bool = False
    """Pages and states of answers are kept as well, though their numbers are those of chunks only up to rounding; see `decode.prefix`."""
    speculate: bool = False
    """Draft with the model's MTP block."""

    @pydantic.model_validator(mode="after")
    def _check(self):
        if self.keep_answers and not self.prefix_bytes:
            raise ValueError(
                "keep_answers is true, but prefix_bytes 0 leaves no room for states: set prefix_bytes, or leave keep_answers out"
            )
        if self.pages is not None and self.device_bytes is not None:
            raise ValueError(f"pages {self.pages} and device_bytes {self.device_bytes} both set the size of the pool: give one of them")
        return self

    @property
    def pages_per_slot(self) -> int:
        """Pages of a sequence of max_length tokens."""
        return -(-self.max_length // self.page_tokens)
