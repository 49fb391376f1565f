"""The one exception that means "the user can fix this", and spelling suggestions."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a command, a configuration or a file; its message is all that the user sees.

    The message names the thing, its value, the constraint and the remedy. `chatyuan.main` prints it
    on stderr and exits with status 2, without a traceback unless `--debug` is given.
    """


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns ` Did you mean X?` for the choice nearest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""
