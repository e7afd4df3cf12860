"""From a path to a model that can be asked: config, parameters and tokenizer of a checkpoint, and prompts made as training data are.

A path is a run directory, its checkpoints, one step of them, an import, or a directory in the released layout. What a step says of itself
is in its recipe. The released layout says the architecture and nothing else; a directory that v4train exported has a recipe too.

**Which tokenizer.** Ids of one tokenizer read by another are an error that nothing notices but the reader of the answer, so nothing is
guessed: a ``tokenizer.json`` beside the checkpoint goes before the path in the recipe (which may be one of another machine); the recipe of
an import may name a tokenizer only because every recipe has one, so it counts only if its ids are as many as the model's; and without
either there is no answer.
"""

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pydantic

from v4train import recipe as recipe_lib
from v4train.checkpoint import restore, step_directory
from v4train.config import load as config_load
from v4train.core import tree
from v4train.data import config as data_config
from v4train.data import document as document_lib
from v4train.data import tokenizer as tokenizer_lib
from v4train.data.prepare import config as prepare_config
from v4train.data.prepare import decode as media_decode
from v4train.data.prepare import record
from v4train.decode import config as config_lib
from v4train.decode import prompt as prompt_lib
from v4train.interop import released, score, tokenizer_files
from v4train.model import config as model_config
from v4train.numerics import config as numerics_config

_RECIPE = "recipe.yaml"
_CHAT_TEMPLATE = "chat_template.jinja"


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and its tokenizer.

    Attributes:
        name: of the recipe, or of the directory.
        step: of training; None for the released layout.
        model: its config; without the MTP block unless it was asked for.
        params: all arrays, on the default device, in the precision they are stored in.
        tokenizer: whose ids the model knows.
        numerics: what the model was trained with.
        patches_per_row: that training put in a row at most; None if it is not known.
        chat_template: Jinja text beside the checkpoint's tokenizer; None if there is none.
        decode: the recipe's section; defaults if there is no recipe, or one from before it had this section.
    """

    name: str
    step: int | None
    model: model_config.ModelConfig
    params: dict
    tokenizer: tokenizer_lib.Tokenizer
    numerics: numerics_config.NumericsConfig
    patches_per_row: int | None = None
    chat_template: str | None = None
    decode: config_lib.DecodingConfig = dataclasses.field(default_factory=config_lib.DecodingConfig)

    def prompt(self, parts: Sequence[record.Part], *, image_patches: int = 256) -> prompt_lib.Prompt:
        """The beginning of a document, from text and files of images and sound in reading order.

        Args:
            parts: texts and media.
            image_patches: most patches of an image, as `image.max_patches` of the preparation.

        Raises:
            ValueError: a file cannot be read, or the model has no stem for it.
        """
        return self.compose([np.array([self.tokenizer.bos]), *parts], image_patches=image_patches)

    def compose(self, parts: Sequence[record.Part | np.ndarray], *, image_patches: int = 256) -> prompt_lib.Prompt:
        """A prompt of any pieces, with nothing before or after them.

        Args:
            parts: texts, media, and ids of tokens: the only way to write control tokens.
            image_patches: see `prompt`.

        Raises:
            ValueError: as `prompt`.
        """
        pieces = [self._piece(part, image_patches) for part in parts]
        tokens, modality = (np.concatenate([np.zeros(0, np.int32), *(getattr(x, name) for x in pieces)]) for name in ("tokens", "modality"))
        patches = [x.patches for x in pieces if x.patches is not None]
        places = [x.patch_xy for x in pieces if x.patch_xy is not None]
        frames = [x.audio for x in pieces if x.audio is not None]
        return prompt_lib.Prompt(
            tokens,
            modality,
            np.concatenate(patches) if patches else None,
            np.concatenate(places) if places else None,
            np.concatenate(frames) if frames else None,
        )

    def _piece(self, part: record.Part | np.ndarray, image_patches: int) -> prompt_lib.Prompt:
        """One text, medium or run of ids, as `data.document.compose` writes it."""
        if isinstance(part, np.ndarray):
            return prompt_lib.Prompt.of_tokens(part)
        if isinstance(part, str):
            return prompt_lib.Prompt.of_tokens(self.tokenizer.encode(part))
        document = document_lib.compose([self._read(part, image_patches)], key="prompt", tokenizer=self.tokenizer)
        whole = prompt_lib.Prompt.of_document(document)
        return dataclasses.replace(whole, tokens=whole.tokens[1:-1], modality=whole.modality[1:-1])  # no bos, no eos

    def _read(self, part: record.Media, image_patches: int) -> Any:
        subject = f"{part.kind} {part.source}" if isinstance(part.source, pathlib.Path) else f"the {part.kind}"
        stem = self.model.image if part.kind == "image" else self.model.audio
        if stem is None:
            raise ValueError(f"{subject}: the model {self.name} was not made for {part.kind}: it has no stem for it")
        media_decode.check_extras({part.kind})
        try:
            if part.kind == "image":
                assert self.model.image is not None
                config = prepare_config.ImageConfig(patch=self.model.image.patch, max_patches=image_patches)
                return media_decode.image(part.source, config=config)
            return media_decode.sound(part.source, config=prepare_config.SoundConfig())
        except media_decode.OverLimitError as error:
            raise ValueError(f"{subject} is larger than data may be ({error})") from None
        except media_decode.BadMediaError as error:
            raise ValueError(f"{subject}: {error}") from None


def load(path: str | pathlib.Path, *, mtp: bool | None = False) -> Loaded:
    """Reads a checkpoint, comparing digests.

    Args:
        path: a run directory, its checkpoints, one step, an import, or a directory in the released layout.
        mtp: read the MTP block too; None: if the recipe's `decode` section drafts with it.

    Raises:
        ValueError: it is none of these, is damaged, or there is no tokenizer for it; said before weights are read where possible.
    """
    directory = pathlib.Path(path)
    if (directory / "config.json").is_file():
        return _released(directory, mtp=mtp)
    try:
        steps, step = step_directory.locate(directory)
    except ValueError as error:
        raise ValueError(f"{error}, or a directory in the released layout (with config.json)") from None
    found = restore.describe(steps, step=step)
    where, saved = step_directory.path(steps, step=found.step), found.metadata["recipe"]
    try:
        model = _part(model_config.ModelConfig, saved["model"])
        model = model.after(found.metadata.get("stages", ()))
        tokenizer_config = _part(data_config.TokenizerConfig, saved["data"]["tokenizer"])
        numerics = _part(numerics_config.NumericsConfig, saved["numerics"])
        decode = _part(config_lib.DecodingConfig, saved.get("decode", {}))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{where}: its recipe cannot be used by this version of v4train: {error}") from None
    # An import without a recipe of its own has the defaults': bytes.
    doubtful = "imported" in found.metadata and isinstance(tokenizer_config, data_config.ByteTokenizerConfig)
    tokenizer = _tokenizer(tokenizer_config, beside=steps.parent, model=model, certain=not doubtful)
    model = model if _drafts(mtp, decode) else model.model_copy(update={"mtp": None})
    read = score.read_step(model, found, where=where)
    params = tree.merge(read.trained, read.buffers)
    patches, template = saved["data"]["max_patches"] or None, _chat_template(steps.parent)
    return Loaded(saved["name"], found.step, model, params, tokenizer, numerics, patches, template, decode)


def _released(directory: pathlib.Path, *, mtp: bool | None) -> Loaded:
    opened = released.Released.open(directory)
    name, numerics, config, patches = directory.absolute().name, numerics_config.NumericsConfig(), None, None
    decode = config_lib.DecodingConfig()
    if (directory / _RECIPE).is_file():
        recipe = config_load.load(directory / _RECIPE, cls=recipe_lib.Recipe).config
        name, numerics, config, patches = recipe.name, recipe.numerics, recipe.data.tokenizer, recipe.data.max_patches or None
        decode = recipe.decode
    tokenizer = _tokenizer(config, beside=directory, model=opened.model, certain=config is not None)
    template = _chat_template(directory)
    opened.verify()
    params = opened.parameters()
    model = opened.model
    if not _drafts(mtp, decode) and model.mtp is not None:
        model = model.model_copy(update={"mtp": None})
        params = {key: value for key, value in params.items() if key != "mtp"}
    return Loaded(name, None, model, params, tokenizer, numerics, patches, template, decode)


def _drafts(mtp: bool | None, decode: config_lib.DecodingConfig) -> bool:
    return decode.speculate if mtp is None else mtp


def _part(kind: Any, values: Any) -> Any:
    return pydantic.TypeAdapter(kind).validate_json(json.dumps(values))


def _tokenizer(
    config: data_config.TokenizerConfig | None, *, beside: pathlib.Path, model: model_config.ModelConfig, certain: bool
) -> tokenizer_lib.Tokenizer:
    """The tokenizer of a checkpoint.

    Args:
        config: of the recipe; None if there is no recipe.
        beside: directory that may hold a tokenizer.json.
        model: whose ids they must be.
        certain: the recipe is the one that the model was trained with.
    """
    file = beside / tokenizer_files.TOKENIZER
    if config is not None and (certain or _ids(config) == model.vocab_size):
        if file.is_file() and not isinstance(config, data_config.ByteTokenizerConfig):
            config = config.model_copy(update={"path": str(file)})
    elif file.is_file():
        config = _of_file(file, model=model)
    else:
        raise ValueError(
            f"{beside} has no {tokenizer_files.TOKENIZER}, and nothing else says what the {model.vocab_size} ids of the model mean: "
            "put the model's own there"
        )
    made, own = tokenizer_lib.build(config), 0
    if isinstance(config, data_config.HuggingFaceTokenizerConfig) and not certain:
        own = sum(text is None for text in config.specials.model_dump().values())  # ids that we append, and the model does not have
    if made.vocab_size - own > model.vocab_size:
        raise ValueError(
            f"{beside}: the tokenizer has {made.vocab_size - own} ids, the model only {model.vocab_size}: it is that of another model"
        )
    return made


def _ids(config: data_config.TokenizerConfig) -> int | None:
    """Ids of a tokenizer that needs no file."""
    return tokenizer_lib.ByteTokenizer.vocab_size if isinstance(config, data_config.ByteTokenizerConfig) else None


def _of_file(file: pathlib.Path, *, model: model_config.ModelConfig) -> data_config.TokenizerConfig:
    """Of a tokenizer.json with nothing but a tokenizer_config.json beside it."""
    if model.vocab_size == tokenizer_lib.DEEPSEEK_IDS:
        return data_config.DeepSeekTokenizerConfig(path=str(file))
    beside = file.with_name(tokenizer_files.CONFIG)
    said = _json(beside)
    texts = {role: _text(said.get(f"{role}_token")) for role in ("bos", "eos", "pad")}
    missing = [f"{role}_token" for role in ("bos", "eos") if texts[role] is None]
    if missing:
        raise ValueError(f"{beside} does not name {' and '.join(missing)}: without them nobody knows where a text begins or ends; add them")
    same = texts["pad"] in (texts["bos"], texts["eos"])
    return data_config.HuggingFaceTokenizerConfig(
        path=str(file), specials=data_config.SpecialTokensConfig(**texts | ({"pad": None} if same else {}))
    )


def _text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _chat_template(directory: pathlib.Path) -> str | None:
    """The chat template that lies beside a tokenizer: in a file of its own, or in ``tokenizer_config.json``."""
    file = directory / _CHAT_TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    said = _json(directory / tokenizer_files.CONFIG).get("chat_template")
    if isinstance(said, list):  # several, by name
        said = next((each.get("template") for each in said if isinstance(each, dict) and each.get("name") == "default"), None)
    return said if isinstance(said, str) else None


def _json(file: pathlib.Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(said, dict):
        raise ValueError(f"{file} is JSON, but not an object: it is no tokenizer configuration")
    return said
