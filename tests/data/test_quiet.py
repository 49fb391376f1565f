"""What native code writes to stderr is held back only where it is a greeting."""

import os

from chatyuan.data.quiet import without_greetings


def test_only_greetings_are_held_back(capfd):
    with without_greetings():
        os.write(2, b"WARNING: All log messages before absl::InitializeLog() is called are ...\n")
        os.write(2, b"I0000 00:00:1795375961.000784    5997 port.cc:153] operations are on\n")
        os.write(2, b"E0000 00:00:1795375961.000784    5997 port.cc:153] something is wrong\n")
        os.write(2, b"Traceback\n")
    os.write(2, b"I0000 00:00:1 after\n")
    error = capfd.readouterr().err
    assert [line.split()[0] for line in error.splitlines()] == ["E0000", "Traceback", "I0000"]


def test_an_exception_passes_with_what_was_said(capfd):
    try:
        with without_greetings():
            os.write(2, b"why\n")
            raise ImportError("no")
    except ImportError:
        assert capfd.readouterr().err == "why\n"
