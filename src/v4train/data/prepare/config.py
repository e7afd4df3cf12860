"""What `v4train data prepare` is asked for: the spec. Like every config it imports no jax and reads no file."""

from typing import Annotated, Literal, Self

import pydantic

from v4train.config import base
from v4train.data import config as data_config

Kind = Literal["image", "audio", "text"]


def _once(kinds: tuple[Kind, ...]) -> tuple[Kind, ...]:
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"{list(kinds)} names a part twice: a document has one of each kind")
    return kinds


_Layout = Annotated[tuple[Kind, ...], pydantic.Field(min_length=1), pydantic.AfterValidator(_once)]


class FilterConfig(base.Config):
    """Which documents of an input are left out, by their text alone. What is left out is counted, and is no error."""

    min_chars: int = pydantic.Field(default=0, ge=0)
    """Shortest text that is kept, characters."""
    max_chars: int | None = pydantic.Field(default=None, gt=0)
    """Longest text that is kept, characters."""
    min_printable: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Least share of characters that are printable, a space or a line end."""
    min_letters: float = pydantic.Field(default=0.0, ge=0, le=1)
    """Least share of letters among the characters that are not spaces."""
    max_repeated_lines: float = pydantic.Field(default=1.0, ge=0, le=1)
    """Largest share of non-empty lines that came before in the same document."""


class _Input(base.Config):
    name: str = pydantic.Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")
    """Short name, for messages, counts and keys of documents."""
    filters: FilterConfig = FilterConfig()
    """Documents to leave out."""


class _Fields(_Input):
    text: str | None = "text"
    """Field with the text; null if there is none."""
    image: str | None = None
    """Field with an image: a path (relative to the file), or the bytes of an image file."""
    audio: str | None = None
    """Field with sound, likewise."""
    parts: str | None = None
    """Field with a list of `{text: ...}`, `{image: ...}` and `{audio: ...}` in reading order; replaces the three fields above."""
    key: str | None = None
    """Field that names the document. Documents that share material must share a name, because it decides what is held out; by default
    every record has its own."""
    layout: _Layout = ("image", "audio", "text")
    """Order of the parts of a document."""

    @pydantic.model_validator(mode="after")
    def _something_is_read(self) -> Self:
        if not any((self.text, self.image, self.audio, self.parts)):
            raise ValueError("text, image, audio and parts are all null, so nothing is read: name the fields of a record")
        return self


class JsonLinesConfig(_Fields):
    """JSON objects, one a line; `.gz` and `.zst` are read as they are. A plain file is divided among workers, a compressed one is not."""

    kind: Literal["jsonl"] = "jsonl"
    path: str
    """File or glob (`data/*.jsonl.gz`, `**` for subfolders)."""


class ParquetConfig(_Fields):
    """Parquet: only the columns that are asked for, a batch of rows at a time. Media are bytes, paths, or structs of these two."""

    kind: Literal["parquet"] = "parquet"
    path: str
    """File or glob."""


class WebDatasetConfig(_Input):
    """Tar files (also `.gz` and `.zst`) in which consecutive files of one name and different endings make a sample."""

    kind: Literal["webdataset"] = "webdataset"
    path: str
    """File or glob."""
    layout: _Layout = ("image", "text")
    """Parts of a document in order; a sample that lacks one is a bad record."""
    json_text: str = "caption"
    """Field of a sample's `.json` with the text, used if it has no `.txt`."""


class TextConfig(_Input):
    """Text files (UTF-8; also `.gz` and `.zst`), a document each."""

    kind: Literal["text"] = "text"
    path: str
    """File or glob."""
    document_bytes: int = pydantic.Field(default=2**20, gt=0)
    """A longer file is cut at line ends into documents of about this size; they share a key, so a file is held out as a whole."""


class ImagesConfig(_Input):
    """A folder of images, each with its caption in a text file of the same name."""

    kind: Literal["images"] = "images"
    path: str
    """Folder; its subfolders are read too."""
    caption: str = ".txt"
    """Ending of the caption's file."""
    layout: _Layout = ("image", "text")
    """Order of the parts of a document."""


class AudioConfig(_Input):
    """A folder of sound, each with its transcript in a text file of the same name."""

    kind: Literal["audio"] = "audio"
    path: str
    """Folder; its subfolders are read too."""
    caption: str = ".txt"
    """Ending of the transcript's file."""
    layout: _Layout = ("audio", "text")
    """Order of the parts of a document."""


class TriplesConfig(_Input):
    """A folder with an image, a sound and a text of each name."""

    kind: Literal["triples"] = "triples"
    path: str
    """Folder; its subfolders are read too."""
    caption: str = ".txt"
    """Ending of the text's file."""
    layout: _Layout = ("image", "audio", "text")
    """Order of the parts of a document."""


FolderConfig = ImagesConfig | AudioConfig | TriplesConfig
InputConfig = Annotated[
    JsonLinesConfig | ParquetConfig | WebDatasetConfig | TextConfig | ImagesConfig | AudioConfig | TriplesConfig,
    pydantic.Field(discriminator="kind"),
]


class ImageConfig(base.Config):
    """How an image becomes tokens."""

    patch: int = pydantic.Field(default=32, gt=0)
    """Side of a patch, pixels; the recipe's `data.image_patch` must be the same."""
    max_patches: int = pydantic.Field(default=256, gt=0)
    """Token budget of an image: it is scaled down, with its proportions, until its patches are no more than this."""
    upscale: Literal["never", "to_budget"] = "never"
    """Whether an image smaller than its budget is enlarged."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour below transparent pixels: red, green, blue, 0 to 255."""
    max_pixels: int = pydantic.Field(default=2**27, gt=0)
    """A larger image is left out, before it is decoded."""


class SoundConfig(base.Config):
    """How sound becomes tokens (dMel, 20 frames a second); any sample rate is resampled to 16 kHz."""

    max_seconds: float = pydantic.Field(default=60.0, gt=0)
    """A longer sound is left out, before it is decoded."""


class QuarantineConfig(base.Config):
    """When bad records stop the preparation."""

    max_share: float = pydantic.Field(default=0.01, ge=0, le=1)
    """Largest share of an input's records that may be bad."""
    judge_after: int = pydantic.Field(default=1000, gt=0)
    """Records of an input before its share is looked at the first time; at its end it is looked at in any case."""


class PrepareConfig(base.Config):
    """One token store and what it is made from."""

    output: str
    """Directory of the store; new, or one in which the same preparation was interrupted."""
    inputs: tuple[InputConfig, ...] = pydantic.Field(min_length=1)
    """What to read; the order is the order of the store."""
    licence: str
    """Of the data, as readers of the store should see it."""
    origin: str
    """Where the data come from."""
    tokenizer: data_config.TokenizerConfig = data_config.ByteTokenizerConfig()
    """The recipe's `data.tokenizer` must be the same."""
    image: ImageConfig = ImageConfig()
    audio: SoundConfig = SoundConfig()
    duplicates: Literal["remove_exact", "keep"] = "remove_exact"
    """`remove_exact` keeps the first of several documents whose text (up to Unicode form and white space) and media are equal, over
    all inputs."""
    quarantine: QuarantineConfig = QuarantineConfig()
    task_bytes: int = pydantic.Field(default=2**26, gt=0)
    """Input that is read in one piece, bytes: what a kill loses at most, per worker. Compressed files are not divided; media that lines
    of JSON name by their paths do not count."""
    shard_bytes: int = pydantic.Field(default=2**28, gt=0)
    """A new shard begins after this many uncompressed bytes of documents."""
    store: Literal["records", "flat"] = "flat"
    """Layout of the shards: `flat` is the fastest to read, `records` are compressed, less than half the size, and keep documents' keys."""
    compression: int = pydantic.Field(default=3, ge=1, le=22)
    """Level of zstd, of the layout `records`; 19 writes ten times slower and takes some 15 % less space."""
    workers: int = pydantic.Field(default=0, ge=0)
    """Processes; 0 for one a CPU core. The result does not depend on it."""

    @pydantic.model_validator(mode="after")
    def _names_differ(self) -> "PrepareConfig":
        names = [source.name for source in self.inputs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two inputs are called {twice[0]!r}: give each input its own name")
        return self
