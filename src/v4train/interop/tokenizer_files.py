"""A tokenizer in the two files that `transformers` and other runtimes read: ``tokenizer.json`` and ``tokenizer_config.json``.

The byte tokenizer is a BPE without merges over the bytes of UTF-8, which the `tokenizers` library writes as one character each. Its
special ids stand in the vocabulary but not among the "added tokens": those are searched for in every text, so that a page that mentions
``<eos>`` would end a document, and ids would differ from those that the model was trained on. ``split_special_tokens`` keeps
`transformers` from adding them.
"""

import json
import pathlib
import shutil
from collections.abc import Sequence

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"


def write_bytes(directory: pathlib.Path, *, names: Sequence[str], special: dict[str, int], longest: int) -> None:
    """Writes both files for ids that are bytes first.

    Args:
        directory: to write to.
        names: of all ids; the first 256 are the bytes.
        special: role (``bos``, ``eos``, ``pad``) -> id.
        longest: tokens that the model takes at most.
    """
    vocabulary = {character: byte for byte, character in _characters().items()}
    vocabulary |= {name: i for i, name in enumerate(names) if i >= len(vocabulary)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / TOKENIZER))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": longest, "split_special_tokens": True}
    config |= {"clean_up_tokenization_spaces": False, **{f"{role}_token": names[i] for role, i in special.items()}}
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy(source: pathlib.Path, directory: pathlib.Path) -> None:
    """Copies a tokenizer's own file, as ``tokenizer.json``, and the configuration beside it, if there is one."""
    shutil.copyfile(source, directory / TOKENIZER)
    beside = source.parent / CONFIG
    if beside.is_file():
        shutil.copyfile(beside, directory / CONFIG)


def _characters() -> dict[int, str]:
    """Byte -> the character that stands for it: itself where it is visible, else the next ones from 256 on, as in GPT-2."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
