"""seqio tasks as cache sources: our text tasks, and the tasks of existing T5X users unchanged.

1. A text task (`add_text_task`) has string features: its source and preprocessors run, and the
   caller's vocabulary tokenises. A `seqio.preprocessors.tokenize` at the end is left out.
2. Any other task is run by `task.get_dataset` exactly as T5X would, without shuffling; its ids are
   stored, and its vocabulary must be the one the model will have.

This module imports TensorFlow; only building a cache does.
"""

import functools
import hashlib
import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from chatyuan.data.quiet import without_greetings

try:
    with without_greetings():
        import seqio
        import tensorflow as tf
except ImportError as _error:  # pragma: no cover - depends on the installation
    from chatyuan.errors import UserError as _UserError

    raise _UserError(
        f"Building a cache of a seqio task needs seqio and TensorFlow ({_error}): "
        "pip install 'chatyuan[data]'. A file: path needs neither."
    ) from _error

from chatyuan.data import sources
from chatyuan.errors import UserError, did_you_mean
from chatyuan.text import files
from chatyuan.text.vocabulary import Vocabulary

# Rank 0 strings: "not tokenised yet". seqio checks both when a task is read.
TEXT_FEATURE = seqio.Feature(
    vocabulary=seqio.PassThroughVocabulary(size=0), add_eos=False, dtype=tf.string, rank=0
)
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
RowsFn = Callable[[str, files.Skipped], Iterable[dict[str, Any]]]
FilesFn = Callable[[], Sequence[pathlib.Path]]


class TextSource(seqio.DataSource):
    """A seqio data source whose examples are made in Python: `rows(split, skipped)` yields dicts.

    Values are str, int or lists of them. `files()` names what is read, so that a cache knows when
    it is out of date; the code of the function's package counts too.
    """

    def __init__(
        self, rows: RowsFn, splits: Iterable[str], *, files: FilesFn | None = None
    ) -> None:
        """Reads nothing yet."""
        self.rows = rows
        self.files = files
        super().__init__(splits=splits, caching_permitted=True)

    @property
    def supports_arbitrary_sharding(self) -> bool:
        """No: examples are made in order."""
        return False

    def list_shards(self, split: str) -> Sequence[str]:
        """One shard, named after the split."""
        return [split]

    def get_dataset(
        self,
        split: str = "train",
        shuffle: bool = True,
        seed: int | None = None,
        shard_info: seqio.ShardInfo | None = None,
        *,
        sequence_length: Mapping[str, int] | None = None,
        use_cached: bool = False,
        num_epochs: int | None = 1,
    ) -> tf.data.Dataset:
        """The examples as tf.data, for T5X and for preprocessors that want a dataset."""
        if shard_info is not None and shard_info.num_shards > 1:
            raise ValueError("TextSource has one shard; it cannot be split by shard_info.")
        rows = list(self.rows(split, files.Skipped()))
        dataset = tf.data.Dataset.from_generator(
            lambda: iter(rows), output_signature=_signature(rows, split)
        )
        return dataset.shuffle(len(rows), seed=seed) if shuffle else dataset

    def fingerprint(self) -> str:
        """Changes with the code that makes the rows and with the files it reads."""
        module = sys.modules[self.rows.__module__]
        top = sys.modules[module.__name__.split(".")[0]]
        code = pathlib.Path(str(top.__file__))
        parts = sorted(code.parent.rglob("*.py")) if code.name == "__init__.py" else [code]
        hashed = [hashlib.sha256(path.read_bytes()).hexdigest() for path in parts]
        stats = sources.stat_key(list(self.files())) if self.files else ""
        return sources.digest(self.rows.__qualname__, *hashed, stats)


def _signature(rows: Sequence[Mapping[str, Any]], split: str) -> dict[str, tf.TensorSpec]:
    if not rows:
        raise UserError(f"The split {split!r} of a text source is empty.")
    spec = {}
    for name, value in rows[0].items():
        shape = (None,) if isinstance(value, (list, tuple)) else ()
        leaf = value[0] if shape else value
        spec[name] = tf.TensorSpec(shape, tf.int64 if isinstance(leaf, int) else tf.string)
    return spec


def add_text_task(
    name: str,
    source: seqio.DataSource,
    *,
    features: Sequence[str] = ("inputs", "targets"),
    preprocessors: Sequence[Callable[..., tf.data.Dataset]] = (),
) -> seqio.Task:
    """Registers a task of untokenised text; see the module's docstring."""
    return seqio.TaskRegistry.add(
        name,
        source=source,
        preprocessors=list(preprocessors),
        output_features={feature: TEXT_FEATURE for feature in features},
        metric_fns=[],
    )


def _import_tasks(task_modules: Sequence[str]) -> None:
    for name in task_modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
                raise UserError(
                    f"The task module {name} needs {error.name}, which is not installed."
                ) from error
            raise UserError(
                f"task_modules: there is no module {name}. Run from the folder that holds it, or "
                "put that folder on PYTHONPATH."
            ) from error


def resolve(
    name: str,
    *,
    task_modules: Sequence[str],
    sequence_length: Mapping[str, int] | None,
    vocabulary: Vocabulary | None,
) -> tuple[tuple[sources.BuildTask, ...], Callable[[str, Mapping[str, int]], float]]:
    """The build tasks of a registered task or mixture, and the rate of each.

    The rate function takes a task's name and the train examples of all tasks, which rates that
    depend on size (`seqio.mixing_rate_num_examples`) are given.
    """
    _import_tasks(task_modules)
    known = sorted({*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()})
    if name not in known:
        raise UserError(
            f"MIXTURE={name} is neither a task nor a mixture of {', '.join(task_modules)}."
            f"{did_you_mean(name, known)} Known: {', '.join(known)}; or file:/path/to/your.jsonl"
        )
    provider = seqio.get_mixture_or_task(name)
    tasks = seqio.get_subtasks(provider)
    built = tuple(_build_task(task, sequence_length, vocabulary) for task in tasks)

    def rate(task_name: str, counts: Mapping[str, int]) -> float:
        if not isinstance(provider, seqio.Mixture):
            return 1.0
        return _rate(provider, task_name, counts)

    return built, rate


class _Counted:
    """A task that answers a rate function's questions about size from what was cached."""

    def __init__(self, task: seqio.Task, count: int) -> None:
        self._task = task
        self._count = count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def num_input_examples(self, split: str) -> int:
        """Examples of the split that was built first."""
        return self._count

    def get_cached_stats(self, split: str = "train") -> dict[str, int]:
        """The same, by the name that T5X's rate functions use."""
        return {"examples": self._count}


def _rate(mixture: seqio.Mixture, task_name: str, counts: Mapping[str, int]) -> float:
    """`Mixture.get_rate`, with sizes from our caches; a sub-mixture's rate is shared inside it."""
    total = 0.0
    for name, rate in mixture.rate_per_task_name.items():
        if name == task_name:
            task = _Counted(seqio.TaskRegistry.get(name), counts.get(name, 0))
            total += float(rate(task) if callable(rate) else rate)
        elif name in seqio.MixtureRegistry.names():
            inner = seqio.MixtureRegistry.get(name)
            shares = {task.name: _rate(inner, task.name, counts) for task in inner.tasks}
            if task_name in shares:
                total += float(rate) * shares[task_name] / sum(shares.values())
    return total


def _describe(function: Any) -> str:
    """A preprocessor by name and bound arguments."""
    if isinstance(function, functools.partial):
        bound = [repr(value) for value in function.args]
        bound += [f"{key}={value!r}" for key, value in function.keywords.items()]
        return f"{_describe(function.func)}({', '.join(_ADDRESS.sub('', b) for b in bound)})"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}".lstrip(".")


def _code(function: Any) -> str:
    while isinstance(function, functools.partial):
        function = function.func
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return repr(function)


def _source_key(source: seqio.DataSource) -> str:
    if isinstance(source, TextSource):
        return source.fingerprint()
    parts = [_ADDRESS.sub("", repr(source))]
    patterns = getattr(source, "_split_to_filepattern", {})
    for split, pattern in sorted(patterns.items()):
        for one in [pattern] if isinstance(pattern, str) else pattern:
            found = [pathlib.Path(path) for path in tf.io.gfile.glob(one)]
            parts.append(f"{split}:{sources.stat_key([p for p in found if p.exists()])}")
    function = getattr(source, "_dataset_fn", None)
    return sources.digest(*parts, _code(function) if function else "")


def _build_task(
    task: seqio.Task, sequence_length: Mapping[str, int] | None, vocabulary: Vocabulary | None
) -> sources.BuildTask:
    is_text = all(f.dtype == tf.string and f.rank == 0 for f in task.output_features.values())
    features = tuple(name for name, f in task.output_features.items() if is_text or _is_ids(f))
    steps = _until_tokenize(task) if is_text else list(task.preprocessors)
    described = tuple(map(_describe, steps))
    key = sources.digest(
        task.name,
        features,
        _source_key(task.source),
        *described,
        *map(_code, steps),
        "" if is_text else sorted((sequence_length or {}).items()),
    )
    source = _ADDRESS.sub("", str(task.source))
    if isinstance(task.source, TextSource):
        source = f"{task.source.rows.__module__}.{task.source.rows.__qualname__}"
        if task.source.files:
            source += f" ({', '.join(path.name for path in list(task.source.files())[:5])})"
    eos_id = None
    if not is_text:
        for name in features:
            eos_id = _check_vocabulary(task, name, vocabulary)
    return sources.BuildTask(
        name=task.name,
        features=features,
        splits=tuple(task.splits),
        source=source,
        preprocessors=described,
        key=key,
        rows=_text_rows(task, steps) if is_text else _id_rows(task, features, sequence_length),
        tokenized=not is_text,
        eos_id=eos_id,
    )


def _is_ids(feature: seqio.Feature) -> bool:
    return feature.dtype in (tf.int32, tf.int64) and feature.rank == 1


def _until_tokenize(task: seqio.Task) -> list[Callable]:
    """A text task's preprocessors, without a final tokenize and append_eos."""
    steps = [p for p in task.preprocessors if not isinstance(p, seqio.CacheDatasetPlaceholder)]
    for index, step in enumerate(steps):
        inner = step.func if isinstance(step, functools.partial) else step
        if inner is seqio.preprocessors.tokenize:
            allowed = (seqio.preprocessors.append_eos, seqio.preprocessors.append_eos_after_trim)
            rest = [p for p in steps[index + 1 :] if p not in allowed]
            if rest:
                raise UserError(
                    f"Task {task.name} has text features but the preprocessors "
                    f"{', '.join(map(_describe, rest))} after tokenize. Move them before it."
                )
            return steps[:index]
    return steps


def _text_rows(task: seqio.Task, steps: Sequence[Callable]) -> sources.Rows:
    if isinstance(task.source, TextSource) and not steps:
        return task.source.rows

    def rows(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
        dataset = task.source.get_dataset(split=split, shuffle=False)
        for step in steps:
            dataset = step(dataset, **_extra_arguments(step, task))
        for example in dataset.as_numpy_iterator():
            try:
                yield {name: _to_python(value) for name, value in example.items()}
            except UnicodeDecodeError:
                skipped["invalid_utf8"] += 1

    return rows


def _extra_arguments(step: Callable, task: seqio.Task) -> dict[str, Any]:
    known = {"sequence_length": None, "output_features": task.output_features}
    bound = step.keywords if isinstance(step, functools.partial) else {}
    names = inspect.signature(step).parameters
    return {name: value for name, value in known.items() if name in names and name not in bound}


def _to_python(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray) or isinstance(value, np.generic):
        return _to_python(value.tolist())
    if isinstance(value, list):
        return [_to_python(item) for item in value]
    return value


def _id_rows(
    task: seqio.Task, features: Sequence[str], sequence_length: Mapping[str, int] | None
) -> sources.Rows:
    def rows(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
        dataset = task.get_dataset(
            sequence_length=dict(sequence_length) if sequence_length else None,
            split=split,
            shuffle=False,
            seed=0,
            try_in_mem_cache=False,
        )
        for example in dataset.as_numpy_iterator():
            if not set(features) <= example.keys():
                skipped["missing_feature"] += 1
                continue
            extra = {}
            for name, value in example.items():
                if name not in features:
                    try:
                        extra[name.removesuffix("_pretokenized")] = _to_python(value)
                    except UnicodeDecodeError:
                        continue  # raw bytes, an image say, are no use in a json line
            yield {name: example[name] for name in features} | {sources.EXAMPLE: extra}

    return rows


def _check_vocabulary(task: seqio.Task, feature: str, vocabulary: Vocabulary | None) -> int | None:
    """The end-of-sequence id of a feature's vocabulary; UserError when it is not ours."""
    theirs = task.output_features[feature].vocabulary
    if vocabulary is None:
        return theirs.eos_id
    if isinstance(theirs, seqio.SentencePieceVocabulary):
        path = theirs.sentencepiece_model_file
        hashed = hashlib.sha256(tf.io.gfile.GFile(path, "rb").read())
        if theirs.extra_ids:
            hashed.update(f":{theirs.extra_ids}".encode())
        if hashed.hexdigest() != vocabulary.sha256:
            spelled = f"{path}:{theirs.extra_ids}" if theirs.extra_ids else path
            raise UserError(
                f"Task {task.name} tokenises {feature} with {path} (extra_ids="
                f"{theirs.extra_ids}), which is not VOCABULARY={vocabulary.path} (extra_ids="
                f"{vocabulary.extra_ids}). Use the task's: --gin.VOCABULARY={spelled}"
            )
    elif theirs.vocab_size not in (0, vocabulary.size):
        raise UserError(
            f"Task {task.name} makes {feature} with {type(theirs).__name__} of "
            f"{theirs.vocab_size} ids, but VOCABULARY={vocabulary.path} has {vocabulary.size}. "
            "A model has one vocabulary: give the task this one."
        )
    return theirs.eos_id
