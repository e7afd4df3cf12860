"""What a step says besides its arrays: a dict that comes back from JSON exactly as it went in.

JSON turns a tuple into a list, an integer key into a string, and takes no numpy numbers. A data pipeline that compares its restored
position ``[3, 7]`` with ``(3, 7)`` then skips data without a word. So whatever would come back changed is refused when it is saved.
"""

import math


def check_plain(value: object, *, path: str = "metadata") -> None:
    """Checks that a value survives JSON.

    Raises:
        ValueError: it would not; the message names the path of the first offender, what it is, and what to use.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if type(key) is not str:
                raise ValueError(f"{path} has the key {key!r}, which JSON would bring back as a string: use strings as keys.")
            check_plain(item, path=f"{path}.{key}")
    elif type(value) is list:
        for index, item in enumerate(value):
            check_plain(item, path=f"{path}.{index}")
    elif type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{path} is {value}, which JSON cannot hold: use a finite number or None.")
    elif value is not None and type(value) not in (str, int, bool):
        raise ValueError(
            f"{path} is a {type(value).__name__} ({value!r}), which JSON would not bring back as it is: "
            "use dicts, lists, strings, numbers, booleans or None."
        )
