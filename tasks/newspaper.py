"""One month of a newspaper as plain text, an article per document."""

from collections.abc import Iterator
from typing import Any

from chatyuan.data import seqio_tasks
from chatyuan.text import files
from tasks import sources


def texts(split: str, skipped: files.Skipped) -> Iterator[dict[str, Any]]:
    """Articles: headline and paragraphs, a line each."""
    for item in sources.select("news", split, skipped):
        yield {"targets": item.key_text, "id": item.id}


seqio_tasks.add_text_task(
    "newspaper",
    seqio_tasks.TextSource(texts, sources.SPLITS, files=sources.all_files),
    features=("targets",),
)
