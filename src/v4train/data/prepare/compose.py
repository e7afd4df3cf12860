"""A record becomes a document: media are decoded, text is filtered and tokenized, and what identifies the content is hashed."""

import dataclasses
import hashlib
import pathlib
import unicodedata

import numpy as np

from v4train.data import document as document_lib
from v4train.data import media
from v4train.data import tokenizer as tokenizer_lib
from v4train.data.prepare import config as config_lib
from v4train.data.prepare import decode, filters, record

LONGEST_KEY = 2**16 - 1  # a stored record has two bytes for its length


@dataclasses.dataclass(frozen=True)
class Composed:
    """A document and the 128-bit hash of its content; equal content has equal hashes, whatever the key."""

    document: document_lib.Document
    content: bytes


@dataclasses.dataclass(frozen=True)
class Refused:
    """A record that a filter left out, by the filter's name."""

    filter: str


class Composer:
    """Makes documents for one spec."""

    def __init__(self, spec: config_lib.PrepareConfig, tokenizer: tokenizer_lib.Tokenizer):
        self._spec, self._tokenizer = spec, tokenizer
        self._rules = document_lib.Rules.of(tokenizer, image_patch=spec.image.patch)
        self._latest: dict[str, tuple[pathlib.Path, media.Patches | np.ndarray]] = {}

    def compose(self, found: record.Record, *, source: int) -> Composed | Refused | record.Bad:
        """The document of a record of input ``source``, or why there is none."""
        text = "".join(part for part in found.parts if isinstance(part, str))
        if not text.strip() and all(isinstance(part, str) for part in found.parts):
            return record.Bad(found.at, "an empty document", found.size)
        refused = filters.refusal(text, filters=self._spec.inputs[source].filters)
        if refused:
            return Refused(refused)
        try:
            if len(found.key.encode()) > LONGEST_KEY:
                return record.Bad(found.at, f"a key of more than {LONGEST_KEY} bytes", found.size)
            parts = [self._decode(part) for part in found.parts]
            content = fingerprint(parts)
            document = document_lib.compose(parts, key=found.key, tokenizer=self._tokenizer)
            self._rules.check(document)
        except decode.OverLimitError as error:
            return Refused(str(error))
        except (decode.BadMediaError, document_lib.DamagedRecordError) as error:
            return record.Bad(found.at, str(error), found.size)
        except UnicodeEncodeError as error:
            return record.Bad(found.at, f"text that is no Unicode: {error.reason}", found.size)
        return Composed(document, content)

    def _decode(self, part: record.Part) -> str | media.Patches | np.ndarray:
        """Remembers the last image and the last sound, because the captions of one of them are mostly next to each other."""
        if isinstance(part, str):
            return part
        path, made = self._latest.get(part.kind, (None, None))
        if made is None or path != part.source:
            if part.kind == "image":
                made = decode.image(part.source, config=self._spec.image)
            else:
                made = decode.sound(part.source, config=self._spec.audio)
            if isinstance(part.source, pathlib.Path):
                self._latest[part.kind] = (part.source, made)
        return made


def fingerprint(parts: list) -> bytes:
    """16 bytes that are equal for documents whose parts are equal.

    Texts are equal if they are so in Unicode's composed form and with every run of white space as one space: the same page, saved by
    two programs. Letters keep their case, because ``US`` is not ``us``. Media are equal if their patches or frames are.
    """
    hashed = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, str):
            content = [" ".join(unicodedata.normalize("NFC", part).split()).encode()]
            mark = b"t"
        elif isinstance(part, media.Patches):
            content = [part.values.tobytes(), part.xy.tobytes()]
            mark = b"i"
        else:
            content = [np.ascontiguousarray(part).tobytes()]
            mark = b"a"
        hashed.update(mark + sum(map(len, content)).to_bytes(8, "little"))
        for piece in content:
            hashed.update(piece)
    return hashed.digest()
