"""Where scores come from: reward models and Python functions, weighted and added up.

A function is named `package.module:function` and takes what it asks for by name, one entry for each
answer of the batch: prompts, answers (texts), prompt_tokens, answer_tokens (lists of ids). It
returns as many numbers. What it does wrong is told with its name and the answer at fault; nothing
has been learned from the batch by then. Models are scored on the devices (`align.experience`), and
their scores come here to be normalised and added.
"""

import dataclasses
import importlib
import inspect
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from chatyuan.align.answers import Answers
from chatyuan.errors import RunFailed, UserError, did_you_mean

ARGUMENTS = ("prompts", "answers", "prompt_tokens", "answer_tokens")


class Decodes(Protocol):
    """What this module asks of `chatyuan.text.vocabulary.Vocabulary`."""

    size: int
    pad_id: int
    eos_id: int

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """One source of scores.

    Raises:
      UserError: none or both of function and model, or a weight that is not a number.
    """

    function: str = dataclasses.field(
        default="", metadata={"help": "package.module:function of prompts and answers", "unit": ""}
    )
    model: str = dataclasses.field(
        default="", metadata={"help": "run or checkpoint of `python run.py reward`", "unit": ""}
    )
    weight: float = dataclasses.field(
        default=1.0, metadata={"help": "factor of its scores in the sum", "unit": ""}
    )
    normalise: bool = dataclasses.field(
        default=True,
        metadata={"help": "model: bring its scores to mean 0, deviation 1 as stored", "unit": ""},
    )

    def __post_init__(self) -> None:
        """Checks the fields; see the class."""
        if bool(self.function) == bool(self.model):
            raise UserError(
                f"RewardSource needs either function or model, got function = {self.function!r}, "
                f"model = {self.model!r}."
            )
        if not np.isfinite(self.weight):
            raise UserError(f"RewardSource.weight = {self.weight} should be a finite number.")

    @property
    def name(self) -> str:
        """The function or the model's folder, for messages."""
        return self.function or self.model

    @property
    def label(self) -> str:
        """The last word of it, for metrics."""
        return self.function.rpartition(":")[2] or pathlib.PurePath(self.model).name


def load_function(name: str) -> Callable[..., Any]:
    """Imports `package.module:function` and checks its parameters.

    Raises:
      UserError: a malformed name, nothing there, or parameters that are not offered.
    """
    module_name, colon, attribute = name.partition(":")
    if not (module_name and colon and attribute):
        raise UserError(f"The reward function {name!r} should be written package.module:function.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise UserError(
            f"The reward function {name}: {error}. Install the package, or run from the folder "
            "that holds it."
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(
            f"{module_name} has no function {attribute}.{did_you_mean(attribute, dir(module))}"
        )
    _parameters(name, function)
    return function


def _parameters(name: str, function: Callable[..., Any]) -> list[str]:
    """The names a function asks for. Raises UserError for others than ARGUMENTS."""
    wanted = [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    unknown = [n for n in wanted if n not in ARGUMENTS]
    if unknown or not wanted:
        raise UserError(
            f"The reward function {name} asks for {', '.join(wanted) or 'nothing'}; it is offered "
            f"{', '.join(ARGUMENTS)} by these names.{did_you_mean((unknown or [''])[0], ARGUMENTS)}"
        )
    return wanted


def text_of(vocabulary: Decodes, ids: Sequence[int]) -> str:
    """Returns the text of ids, without padding, end token and ids that are no piece."""
    special = (vocabulary.pad_id, vocabulary.eos_id)
    return vocabulary.decode([int(i) for i in ids if i < vocabulary.size and i not in special])


class HostAnswers:
    """Answers on the host, as texts where somebody asks for them; row-major over prompts."""

    def __init__(self, answers: Answers, vocabulary: Decodes | None) -> None:
        """Takes answers with numpy arrays; without a vocabulary there are no texts."""
        self.answers, self.vocabulary = answers, vocabulary
        self._made: dict[str, list[Any]] = {}

    def __getitem__(self, name: str) -> list[Any]:
        """Returns the B * G entries of one of ARGUMENTS."""
        if name not in self._made:
            self._made[name] = getattr(self, f"_{name}")()
        return self._made[name]

    def _prompt_tokens(self) -> list[list[int]]:
        groups = self.answers.tokens.shape[1]
        rows = zip(self.answers.prompts, self.answers.prompt_lengths, strict=True)
        return [row[:length].tolist() for row, length in rows for _ in range(groups)]

    def _answer_tokens(self) -> list[list[int]]:
        tokens = self.answers.tokens.reshape(-1, self.answers.tokens.shape[-1])
        rows = zip(tokens, self.answers.lengths.reshape(-1), strict=True)
        return [row[:length].tolist() for row, length in rows]

    def _prompts(self) -> list[str]:
        return self._texts("prompt_tokens")

    def _answers(self) -> list[str]:
        return self._texts("answer_tokens")

    def _texts(self, name: str) -> list[str]:
        assert self.vocabulary is not None, "texts need a vocabulary"
        return [text_of(self.vocabulary, ids) for ids in self[name]]


def call_function(name: str, function: Callable[..., Any], host: HostAnswers) -> np.ndarray:
    """Returns a function's scores of all answers, float32 `[B, G]`.

    Raises:
      UserError: it returns the wrong number of scores, no numbers, or one that is not finite.
      RunFailed: it raises an exception.
    """
    arguments = {n: host[n] for n in _parameters(name, function)}
    try:
        returned = function(**arguments)
    except Exception as error:
        raise RunFailed(
            f"The reward function {name} failed: {type(error).__name__}: {error}. Nothing was "
            "learned from this batch; mend it and start the same command again to continue."
        ) from error
    return checked_scores(name, returned, host)


def checked_scores(name: str, returned: Any, host: HostAnswers) -> np.ndarray:
    """Returns scores as float32 `[B, G]`; see `call_function` for what is raised."""
    shape = host.answers.lengths.shape
    remedy = "Nothing was learned from this batch; mend it and start the same command again."
    try:
        scores = np.asarray(returned)
    except ValueError as error:
        raise UserError(f"{name} returned scores of unequal shapes: {error}. {remedy}") from error
    count = int(np.prod(shape))
    if scores.shape not in ((count,), shape):
        raise UserError(
            f"{name} returned scores of shape {scores.shape} for {count} answers; it should "
            f"return one number for each. {remedy}"
        )
    if not (np.issubdtype(scores.dtype, np.number) or scores.dtype == bool) or (
        np.issubdtype(scores.dtype, np.complexfloating)
    ):
        raise UserError(
            f"{name} returned scores of type {scores.dtype}; they should be numbers. {remedy}"
        )
    scores = scores.astype(np.float32).reshape(-1)
    bad = np.flatnonzero(~np.isfinite(scores))
    if len(bad):
        what = "answers" if host.vocabulary is not None else "answer_tokens"
        raise UserError(
            f"{name} returned {scores[bad[0]]} for {len(bad)} of {count} answers, the first being "
            f"{host[what][bad[0]]!r}. {remedy}"
        )
    return scores.reshape(shape)


@dataclasses.dataclass(frozen=True)
class OpenSource:
    """A source that has been found.

    Attributes:
      source: as it was set.
      function: the function, or None for a model.
      normalise: applied to the scores of a model.
    """

    source: RewardSource
    function: Callable[..., Any] | None = None
    normalise: Callable[[Any], Any] | None = None


def total_scores(
    sources: Mapping[str, OpenSource], host: HostAnswers, model_scores: Sequence[np.ndarray]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the weighted sum of all sources' scores, and the scores of each; float32 `[B, G]`.

    Args:
      sources: by the name they have in metrics.
      host: the answers.
      model_scores: raw scores of those sources that are models, in their order.

    Raises:
      UserError: scores of the wrong number or that are not finite.
      RunFailed: a function raised an exception.
    """
    of_models = iter(model_scores)
    parts = {}
    for name, opened in sources.items():
        if opened.function is not None:
            parts[name] = call_function(opened.source.name, opened.function, host)
            continue
        raw = checked_scores(f"The reward model {opened.source.name}", next(of_models), host)
        parts[name] = raw if opened.normalise is None else opened.normalise(raw)
    weighted = [np.float32(sources[name].source.weight) * scores for name, scores in parts.items()]
    return np.sum(weighted, axis=0, dtype=np.float32), parts


def by_label(sources: Sequence[OpenSource]) -> dict[str, OpenSource]:
    """Returns sources by their labels; of equal ones the later are numbered."""
    named: dict[str, OpenSource] = {}
    for opened in sources:
        label = opened.source.label
        same = sum(other.source.label == label for other in named.values())
        named[f"{label}_{same + 1}" if same else label] = opened
    return named
