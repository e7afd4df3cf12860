"""The byte tokenizer round-trips any text and keeps its ids."""

import numpy as np
import pytest

from v4train.data import config, tokenizer


@pytest.mark.parametrize("text", ["", "plain", "naïve – 你好 🙂", "tab\tnewline\n\x00nul", "<eos>"])
def test_round_trip(text):
    t = tokenizer.build(config.ByteTokenizerConfig())
    ids = t.encode(text)
    assert ids.dtype == np.uint32
    assert ids.tolist() == list(text.encode())
    assert t.decode(ids) == text


def test_ids_are_frozen():
    """Models are trained on these numbers: they may never move."""
    t = tokenizer.ByteTokenizer()
    names = ["bos", "eos", "pad", "image", "audio", "image_start", "image_end", "audio_start", "audio_end"]
    assert [getattr(t, name) for name in names] == list(range(256, 265))
    assert len(t.names) == len(set(t.names)) == t.vocab_size == 272
    assert t.decode(np.array([104, 105, 257])) == "hi<eos>"
    assert set(t.never_targets) == set(range(256, 265)) - {t.eos}
    assert set(t.media_token_ids) == set(range(259, 265))
    assert t.fingerprint == "b1fa193098c32912480fad4458700e97cb96979dafec6f2f7711d671ec447c55"


def test_foreign_ids_are_refused():
    with pytest.raises(ValueError, match="id 300 is outside the byte vocabulary of 272"):
        tokenizer.ByteTokenizer().decode(np.array([300]))
