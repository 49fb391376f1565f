"""The enumerable model of the decoding tests serves here too."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "decode"))
