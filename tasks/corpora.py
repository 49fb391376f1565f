"""The large Chinese corpora of the field, read from the user's own copies as they are published.

Put (or link) a copy anywhere below the folder named by the environment variable CHATYUAN_DATA; the
files are found by the names they are published under:

    c4_zh, c4_multilingual   allenai/c4: multilingual/c4-zh.tfrecord-00000-of-01024.json.gz, a json
                             object with "text" per line; c4-zh-validation.* is the validation split
    clue_corpus_small,       CLUECorpus*/**/*.txt: a sentence per line, an empty line between
    clue_corpus_2020         documents
    wudao                    WuDaoCorpus*/**/*.json: one array of {"title", "content"} per file
    yuan                     Yuan*/**/*.txt: a document per line
    the_stack                the-stack*/**: parquet, jsonl or json with "content" (and "lang")
    c4_zh_tfds               the TFDS build of the same C4 (TFDS_DATA_DIR or ~/tensorflow_datasets)

Corpora without a validation split hold out one document in a thousand, by a hash of its text.
`add_corpus` and `add_tfds_text` register more of the same kind, for instance with a folder of their
own: `add_corpus("my_wudao", CORPORA["wudao"], data_dir="/data/wudao2")`.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import seqio

from chatyuan.data import seqio_tasks
from chatyuan.data.sources import hash_fraction
from chatyuan.errors import UserError
from chatyuan.text import files

VARIABLE = "CHATYUAN_DATA"
_HELD_OUT = 1e-3


@dataclasses.dataclass(frozen=True)
class Corpus:
    """How a corpus is published.

    `patterns[split]` are globs below the data folder. `layout` is "objects" (a json object with
    text per line or row, or one array per file), "lines" (a document per line) or "documents" (a
    sentence per line, empty lines between documents).
    """

    layout: str
    patterns: Mapping[str, tuple[str, ...]]
    exclude: str | None = None


CORPORA: dict[str, Corpus] = {
    "c4_zh": Corpus(
        "objects",
        {
            "train": ("**/c4-zh.tfrecord-*.json.gz",),
            "validation": ("**/c4-zh-validation.tfrecord-*.json.gz",),
        },
    ),
    "c4_multilingual": Corpus(
        "objects",
        {
            "train": ("**/c4-*.tfrecord-*.json.gz",),
            "validation": ("**/c4-*-validation.tfrecord-*.json.gz",),
        },
        exclude="-validation.",
    ),
    "clue_corpus_small": Corpus("documents", {"train": ("**/CLUECorpusSmall*/**/*.txt",)}),
    "clue_corpus_2020": Corpus("documents", {"train": ("**/CLUECorpus2020*/**/*.txt",)}),
    "wudao": Corpus("objects", {"train": ("**/WuDaoCorpus*/**/*.json",)}),
    "yuan": Corpus("lines", {"train": ("**/[Yy]uan*/**/*.txt",)}),
    "the_stack": Corpus(
        "objects",
        {
            "train": (
                "**/the-stack*/**/*.parquet",
                "**/the-stack*/**/*.jsonl*",
                "**/the-stack*/**/*.json",
                "**/the-stack*/**/*.json.gz",
            )
        },
    ),
}


def _root(name: str, data_dir: str | None) -> pathlib.Path:
    root = data_dir or os.environ.get(VARIABLE)
    if not root:
        raise UserError(
            f"Task {name} reads your own copy of the corpus: set the variable {VARIABLE} "
            f"to the folder that holds it, for example {VARIABLE}=/data python run.py cache ..."
        )
    if not os.path.isdir(root):
        raise UserError(f"Task {name}: {VARIABLE}={root} is not a folder.")
    return pathlib.Path(root)


def corpus_files(
    name: str, corpus: Corpus, split: str, data_dir: str | None = None
) -> list[pathlib.Path]:
    """The files of a corpus's split below the data folder, sorted.

    Raises:
      UserError: no data folder, or no train file in it; shows the names that were looked for.
    """
    root = _root(name, data_dir)
    found = {path for pattern in corpus.patterns[split] for path in root.glob(pattern)}
    if split == "train" and corpus.exclude:
        found = {path for path in found if corpus.exclude not in path.name}
    if not found and split == "train":
        raise UserError(
            f"Task {name} found no file named {' or '.join(corpus.patterns[split])} below {root}. "
            f"Put the corpus there under its published names, or change {VARIABLE}."
        )
    return sorted(path for path in found if path.is_file())


def _documents(path: pathlib.Path, layout: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
    if layout == "documents":
        for text in files.read_documents(path, skipped):
            yield {"targets": text}
    elif layout == "lines":
        for text in files.read_lines(path, skipped):
            yield {"targets": text}
    else:
        yield from files.read_examples(path, skipped)


def add_corpus(name: str, corpus: Corpus, data_dir: str | None = None) -> seqio.Task:
    """Registers a pretraining task that reads `corpus` below `data_dir` (None: CHATYUAN_DATA)."""

    def rows(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
        own_split = "validation" in corpus.patterns
        for path in corpus_files(name, corpus, split if own_split else "train", data_dir):
            for example in _documents(path, corpus.layout, skipped):
                if not own_split:
                    held = hash_fraction(example["targets"]) < _HELD_OUT
                    if held != (split == "validation"):
                        continue
                yield {"targets": example["targets"]}

    def all_files() -> list[pathlib.Path]:
        return [f for split in corpus.patterns for f in corpus_files(name, corpus, split, data_dir)]

    source = seqio_tasks.TextSource(rows, ("train", "validation"), files=all_files)
    return seqio_tasks.add_text_task(name, source, features=("targets",))


def add_tfds_text(
    name: str,
    tfds_name: str,
    *,
    splits: Mapping[str, str],
    text_key: str = "text",
    data_dir: str | None = None,
) -> seqio.Task:
    """Registers a pretraining task that reads a TensorFlow dataset's text.

    `splits` maps our split names to the dataset's; `tfds_name` must name a version.
    """
    source = seqio.TfdsDataSource(tfds_name=tfds_name, splits=dict(splits), tfds_data_dir=data_dir)
    return seqio_tasks.add_text_task(
        name,
        source,
        features=("targets",),
        preprocessors=[functools.partial(seqio.preprocessors.rekey, key_map={"targets": text_key})],
    )


for _name, _corpus in CORPORA.items():
    add_corpus(_name, _corpus)
add_tfds_text(
    "c4_zh_tfds",
    "c4/multilingual:3.1.0",
    splits={"train": "zh", "validation": "zh-validation"},
)
