"""``python -m v4train.train``: the same program as ``v4train train``."""

import sys

from v4train.cli import main

sys.exit(main.main(["train", *sys.argv[1:]]))
