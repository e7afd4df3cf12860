"""What JSON would change is refused when it is saved, with its path."""

import json

import numpy as np
import pytest

from v4train.checkpoint import metadata


def test_plain_values_pass_and_come_back():
    value = {"recipe": {"lr": 3e-4, "axes": [1, 2, {"x": None}]}, "row": 2**60, "on": True, "name": "é", "empty": {}}
    metadata.check_plain(value)
    assert json.loads(json.dumps(value)) == value


@pytest.mark.parametrize(
    "value, message",
    [
        ({"data": {"at": [0, (3, 7)]}}, r"metadata\.data\.at\.1 is a tuple \(\(3, 7\)\)"),
        ({"step": np.int64(3)}, r"metadata\.step is a int64"),
        ({"counts": {3: 1}}, r"metadata\.counts has the key 3, which JSON would bring back as a string"),
        ({"loss": float("nan")}, r"metadata\.loss is nan"),
    ],
)
def test_what_would_come_back_changed_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        metadata.check_plain(value)
