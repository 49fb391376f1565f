"""Evaluate a checkpoint on cached tasks: choices, generated answers, loss per token and per byte.

1. A task whose examples carry `answer_choices` is answered by the likeliest choice (the sum of the
   log-probabilities of its tokens, end token included); the others by generation.
2. Every example counts once, and all of the split unless `max_examples` says otherwise.
3. Beside the generated answers' overlap with the targets stand their length in characters and the
   distinct character n-grams among them, so that a collapse shows, and what a `judge` calls them.
4. Beside a task named in `baseline` stands a linear model on character n-grams, fitted to the train
   split: what a network has to beat.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from chatyuan import checkpoints, configs, report
from chatyuan.checkpoint_files import check_writable
from chatyuan.data.cache import EXAMPLES, Cache, open_cache, read_mixture
from chatyuan.data.loader import DataConfig, EvalLoader, open_sources
from chatyuan.data.objectives import Objective, ObjectiveConfig
from chatyuan.decode.config import DecodeConfig
from chatyuan.decode.text import TextConfig, TextGenerator
from chatyuan.errors import UserError, did_you_mean
from chatyuan.evaluate import text_metrics
from chatyuan.evaluate.baseline import CharNgramClassifier, cached_examples
from chatyuan.evaluate.choices import ChoiceScorer
from chatyuan.models import Model, build
from chatyuan.models.loss import LossConfig, eval_loss
from chatyuan.stages import _run_folder
from chatyuan.text.vocabulary import Vocabulary

RESULTS = "evaluation.json"
PREDICTIONS = "predictions.jsonl"


def _field(help_text: str, unit: str = "", **kwargs: Any) -> Any:
    return dataclasses.field(metadata={"help": help_text, "unit": unit}, **kwargs)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is evaluated on what."""

    model_dir: str = _field("folder for evaluation.json, predictions.jsonl and report.md")
    init_from: str = _field("run or checkpoint to evaluate")
    mixture: str = _field("cached task or mixture of tasks with inputs and targets")
    cache_dir: str = _field("folder of all caches")
    vocabulary: str | None = _field("None = the copy that the run keeps", default=None)
    use_ema: bool = _field("evaluate the moving average of the weights", default=False)
    split: str = _field("split to evaluate", default="test")
    max_examples: int | None = _field(
        "examples of each task with choices, evenly spread; None = all", "examples", default=None
    )
    max_generated: int | None = _field(
        "the same for tasks answered by generation", "examples", default=None
    )
    input_length: int = _field("prompts are cut to this", "tokens", default=512)
    target_length: int = _field("answers are cut to this in the loss", "tokens", default=512)
    batch_size: int = _field("prompts at once", "prompts", default=64)
    decoding: DecodeConfig = _field("how answers are generated", default=DecodeConfig())
    normalisation: str = _field(
        "of a choice's log-probability: sum, tokens or characters", default="sum"
    )
    baseline: tuple[str, ...] = _field(
        "tasks with the same choices in every example that a linear model on character n-grams "
        "is fitted to as well (needs scikit-learn)",
        default=(),
    )
    seed: int = _field("of generation by sampling; example i uses seed + i", default=0)
    judge: str | None = _field(
        "cached task of short texts (inputs) and their labels (targets): a linear model on "
        "character n-grams learns it and labels the generated answers (needs scikit-learn)",
        default=None,
    )
    judge_split: str = _field(
        "what it learns from; not the split that is evaluated", default="test"
    )

    def __post_init__(self) -> None:
        """Raises UserError where a judge would be measured on what it learned."""
        if self.judge is not None and self.judge_split == self.split:
            raise UserError(
                f"evaluate.Config.judge_split = {self.judge_split!r} is the split that is "
                "evaluated, and a judge must not know it; name another."
            )


@dataclasses.dataclass(frozen=True)
class _Subject:
    """The model under evaluation."""

    config: Config
    vocabulary: Vocabulary
    model: Model
    params: Any
    judge: "_Judge | None" = None

    @property
    def text_config(self) -> TextConfig:
        """Buckets for prompts."""
        longest = self.config.input_length
        lengths = [n for n in (16, 32, 64, 128, 256, 512, 1024, 2048) if n < longest]
        # One size of batch: rows of padding are cheaper than a second program of every length.
        return TextConfig(input_lengths=(*lengths, longest), batch_sizes=(self.config.batch_size,))


def run(config: Config) -> None:
    """Evaluates, prints a table and writes it."""
    check_writable(pathlib.Path(config.model_dir))
    configs.check_same_run(config, config.model_dir)
    model_config, vocabulary = _run_folder.read_model(config.init_from, config.vocabulary)
    tasks = _open_tasks(config, vocabulary)
    for task in config.baseline:
        if task not in tasks:
            raise UserError(
                f"evaluate.Config.baseline names {task}, which is not in MIXTURE = "
                f"{config.mixture} ({', '.join(tasks)}).{did_you_mean(task, tasks)}"
            )
    judge = None if config.judge is None else _Judge(config, vocabulary)
    model = build(model_config)
    params = checkpoints.load_params(
        config.init_from, model.abstract_params(), use_ema=config.use_ema
    )
    subject = _Subject(config, vocabulary, model, params, judge)
    rows, samples, predictions = [], [], []
    for task, cache in tasks.items():
        examples = list(cache.examples())
        chosen = "answer_choices" in examples[0]
        limit = config.max_examples if chosen else config.max_generated
        examples = _spread(examples, limit)
        answer = _choose if chosen else _generate
        figures, outputs = answer(subject, examples)
        row = {"task": task, "examples": len(examples), **figures, **_loss(subject, task)}
        if task in config.baseline:
            row["linear baseline"] = _baseline(config, task, vocabulary, examples)
        rows.append(row)
        for example, output in zip(examples, outputs, strict=True):
            predictions.append({"task": task, **example, "prediction": output})
        samples += [
            {"task": task, "input": e["inputs"], "target": e["targets"], "output": output}
            for e, output in list(zip(examples, outputs, strict=True))[:4]
        ]
        print("  ".join(f"{k} {_shown(v)}" for k, v in row.items()), flush=True)
    _write(config, rows, samples, predictions)


def dry_run(config: Config) -> None:
    """Opens the checkpoint's description and every cache."""
    model_config, vocabulary = _run_folder.read_model(config.init_from, config.vocabulary)
    print(f"{config.init_from}: {build(model_config).num_params:,} parameters")
    for task, cache in _open_tasks(config, vocabulary).items():
        print(f"{task} {config.split}: {len(cache):,} examples")


def _open_tasks(config: Config, vocabulary: Vocabulary) -> dict[str, Cache]:
    """The caches of all tasks, before anything is computed.

    Raises:
        UserError: see `open_cache`; a task of plain text, or a split without untokenised examples.
    """
    caches = {}
    for task, rate in read_mixture(config.cache_dir, config.mixture):
        if rate <= 0:
            continue
        caches[task] = open_cache(config.cache_dir, task, config.split, vocabulary)
        if "inputs" not in caches[task].features:
            raise UserError(
                f"Task {task} has no inputs, only {', '.join(caches[task].features)}; evaluate "
                "needs tasks with inputs and targets. (The loss on held-out text is reported while "
                "pretraining: eval/loss.)"
            )
        if not (caches[task].path / EXAMPLES).exists():
            raise UserError(
                f"The cache of {task} keeps no untokenised examples of split {config.split!r}, "
                "only of validation and test; evaluate on one of those: "
                "--gin.evaluate.Config.split=test"
            )
    return caches


def _spread(items: list, limit: int | None) -> list:
    if limit is None or limit >= len(items):
        return items
    return [items[int(i)] for i in np.linspace(0, len(items) - 1, limit)]


def _choose(
    subject: _Subject, examples: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], list[str]]:
    """Accuracy, with its standard error, of the likeliest choice."""
    scorer = ChoiceScorer(
        subject.model,
        subject.vocabulary,
        subject.text_config,
        normalisation=subject.config.normalisation,
    )
    results = scorer.score(
        subject.params,
        [e["inputs"] for e in examples],
        [e["answer_choices"] for e in examples],
    )
    outputs = [e["answer_choices"][r.best] for e, r in zip(examples, results, strict=True)]
    right = [output == e["targets"] for e, output in zip(examples, outputs, strict=True)]
    accuracy = sum(right) / len(right)
    counts = {e["targets"]: 0 for e in examples}
    for e in examples:
        counts[e["targets"]] += 1
    return {
        "accuracy": accuracy,
        "standard error": math.sqrt(accuracy * (1 - accuracy) / len(right)),
        "majority": max(counts.values()) / len(right),
    }, outputs


def _generate(
    subject: _Subject, examples: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], list[str]]:
    """Overlap of generated answers with the targets, their length and variety, the judge's view."""
    generator = TextGenerator(
        subject.model, subject.vocabulary, subject.config.decoding, subject.text_config
    )
    prompts = [e["inputs"] for e in examples]
    results = generator.generate(subject.params, prompts, subject.config.seed)
    outputs = [result.text for result in results]
    pairs = [(output, e["targets"]) for e, output in zip(examples, outputs, strict=True)]
    measures = {"exact match": text_metrics.exact_match, "rouge_l": text_metrics.rouge_l,
                "chrf": text_metrics.chrf}  # fmt: skip
    figures = {
        name: sum(measure(*pair) for pair in pairs) / len(pairs)
        for name, measure in measures.items()
    }
    figures["characters"] = sum(map(len, outputs)) / len(outputs)
    figures |= {f"distinct-{n}": text_metrics.distinct(outputs, n) for n in (1, 2)}
    if subject.judge is not None:
        figures |= subject.judge.figures(outputs)
    return figures, outputs


def _loss(subject: _Subject, task: str) -> dict[str, float]:
    """Teacher-forced loss of the split: nats per target token, bits per byte of target text."""
    config = subject.config
    objective = Objective(
        ObjectiveConfig(name="seq2seq"), subject.vocabulary, subject.model.config.architecture
    )
    data = DataConfig(
        mixture=task,
        cache_dir=config.cache_dir,
        split=config.split,
        input_length=config.input_length,
        target_length=config.target_length,
        batch_size=config.batch_size,
    )
    # Rows as wide as asked would be mostly padding where examples are short: pack, in fewer rows.
    data = dataclasses.replace(data, batch_size=max(1, config.batch_size // 8))
    loader = EvalLoader(data, objective, open_sources(data, subject.vocabulary))
    function = jax.jit(eval_loss(subject.model, LossConfig()))
    total = weight = 0.0
    for batch in loader:
        loss_sum, count = function(subject.params, batch)[2]["loss"]
        total, weight = total + float(loss_sum), weight + float(count)
    cache = open_cache(config.cache_dir, task, config.split, subject.vocabulary)
    size = sum(len(example["targets"].encode()) for example in cache.examples())
    return {"loss": total / weight, "bits per byte": total / math.log(2) / max(1, size)}


def _baseline(
    config: Config, task: str, vocabulary: Vocabulary, examples: Sequence[Mapping[str, Any]]
) -> float:
    """Accuracy of logistic regression on character n-grams, fitted to the cached train split."""
    fitted = _linear(config, task, "train", vocabulary)
    return fitted.accuracy([e["inputs"] for e in examples], [e["targets"] for e in examples])


def _linear(config: Config, task: str, split: str, vocabulary: Vocabulary) -> Any:
    """A linear model on character n-grams, fitted to a cached task."""
    return CharNgramClassifier(*cached_examples(config.cache_dir, task, split, vocabulary))


class _Judge:
    """Labels generated answers, and says how good it is at that."""

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        """Fits it on judge_split; measures it on the split that is evaluated."""
        assert config.judge is not None
        self.model = _linear(config, config.judge, config.judge_split, vocabulary)
        known = cached_examples(config.cache_dir, config.judge, config.split, vocabulary)
        self.accuracy = self.model.accuracy(*known)

    def figures(self, outputs: Sequence[str]) -> dict[str, float]:
        """The share of each label among the answers, and the judge's own accuracy."""
        found = self.model.predict(outputs)
        shares = {f"judged {label}": found.count(label) / len(found) for label in self.model.labels}
        return {**shares, "judge's accuracy": self.accuracy}


def _shown(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _write(
    config: Config,
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
) -> None:
    folder = pathlib.Path(config.model_dir)
    configs.save_run(config, folder)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in predictions)
    whole = json.dumps({"split": config.split, "tasks": list(rows)}, ensure_ascii=False, indent=1)
    for name, text in ((PREDICTIONS, lines), (RESULTS, whole + "\n")):
        _run_folder.write_whole(folder / name, text)
    columns = dict.fromkeys(key for row in rows for key in row)
    table = [{key: row.get(key, "") for key in columns} for row in rows]
    path = report.write_report(
        folder,
        title=f"Evaluation on {config.split}",
        evaluation=table,
        samples=samples,
        config_text=(folder / configs.GIN_NAME).read_text(encoding="utf-8"),
    )
    print(f"Written: {folder / RESULTS}, {folder / PREDICTIONS}, {path}")
