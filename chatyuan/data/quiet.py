"""Keeps the greetings of native libraries off the screen; what they have to say stays on it."""

import contextlib
import os
import re
import sys
import tempfile
from collections.abc import Iterator

# absl's lines of level INFO, and its remark that they come too early to be filtered.
_GREETING = re.compile(rb"^(I\d{4} \d\d:|WARNING: All log messages before absl::InitializeLog)")


@contextlib.contextmanager
def without_greetings() -> Iterator[None]:
    """Holds back what is written to the file descriptor of stderr, then passes on the rest.

    TensorFlow writes eight such lines when it is imported, whatever TF_CPP_MIN_LOG_LEVEL says.
    """
    sys.stderr.flush()
    screen = os.dup(2)
    try:
        with tempfile.TemporaryFile() as held:
            os.dup2(held.fileno(), 2)
            try:
                yield
            finally:
                sys.stderr.flush()
                os.dup2(screen, 2)
                held.seek(0)
                for line in held:
                    if not _GREETING.match(line):
                        os.write(2, line)
    finally:
        os.close(screen)
