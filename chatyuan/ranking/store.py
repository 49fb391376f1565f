"""annotations.jsonl: every decision of every annotator, on the disk before the page goes on.

Lines are only ever added; a later line of an annotator about an item replaces an earlier one. Each
holds the texts that were seen, so it stays readable when the drafts change.
"""

import dataclasses
import fcntl
import json
import os
import pathlib
import types
from typing import TextIO

from chatyuan.checkpoint_files import sync
from chatyuan.errors import UserError

ANNOTATIONS = "annotations.jsonl"
LOCK = "rank.lock"


@dataclasses.dataclass(frozen=True)
class Annotation:
    """What one annotator said of one item.

    Attributes:
        item: key of the item.
        annotator: name.
        prompt: of the item.
        answers: in the order in which they were shown.
        sources: of each answer.
        ranks: of each answer, 0 the best, equal is a tie; None = skipped.
        skipped: the reason; None = ranked.
        category: of the user's taxonomy, if there is one.
        seconds: from showing to saving.
        time: of saving, ISO 8601, UTC.
    """

    item: str
    annotator: str
    prompt: str
    answers: tuple[str, ...]
    sources: tuple[tuple[str, ...], ...]
    ranks: tuple[int, ...] | None
    skipped: str | None
    category: str | None
    seconds: float
    time: str


class AnnotationLog:
    """The annotations of a folder, held by one process at a time.

    `by_item` maps the key of an item to annotator -> newest annotation; `by_annotator` maps the
    annotator to item -> the same, in the order of saving. Not thread safe.
    """

    def __init__(self, folder: pathlib.Path) -> None:
        """Locks the folder, which is created, and reads what is there.

        Raises:
            UserError: another process has it, or a line cannot be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(folder)
        self.path = folder / ANNOTATIONS
        self.by_item: dict[str, dict[str, Annotation]] = {}
        self.by_annotator: dict[str, dict[str, Annotation]] = {}
        try:
            found, self.note, size = read_annotations(self.path)
            self._file = self.path.open("ab")
            self._file.truncate(size)
            sync(folder)  # the name of a new file, too
        except BaseException:
            self._lock.close()
            raise
        for annotation in found:
            self._take(annotation)

    def append(self, annotation: Annotation) -> None:
        """Saves; returns when the line is on the disk.

        Raises:
            OSError: it is not; the file is as it was before.
        """
        line = json.dumps(dataclasses.asdict(annotation), ensure_ascii=False) + "\n"
        before = os.fstat(self._file.fileno()).st_size
        try:
            _write_all(self._file.fileno(), line.encode("utf-8"))
            os.fsync(self._file.fileno())
        except OSError:
            os.ftruncate(self._file.fileno(), before)
            raise
        self._take(annotation)

    def _take(self, annotation: Annotation) -> None:
        self.by_item.setdefault(annotation.item, {})[annotation.annotator] = annotation
        own = self.by_annotator.setdefault(annotation.annotator, {})
        own.pop(annotation.item, None)  # what is saved again is the last one saved
        own[annotation.item] = annotation

    def close(self) -> None:
        """Lets others have the folder."""
        self._file.close()
        self._lock.close()

    def __enter__(self) -> "AnnotationLog":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()


def read_annotations(path: pathlib.Path) -> tuple[list[Annotation], str, int]:
    """Reads annotations.jsonl.

    Returns:
        (annotations, what to tell the user or "", bytes of the complete lines).

    Raises:
        UserError: a line that cannot be read, other than a last one that was cut off.
    """
    data = path.read_bytes() if path.exists() else b""
    size = data.rfind(b"\n") + 1
    found = []
    for number, line in enumerate(data[:size].splitlines(), 1):
        try:
            row = json.loads(line)
            row["answers"] = tuple(row["answers"])
            row["sources"] = tuple(tuple(names) for names in row["sources"])
            row["ranks"] = None if row["ranks"] is None else tuple(row["ranks"])
            found.append(Annotation(**row))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"Line {number} of {path} is not an annotation ({error}); mend or remove that line."
            ) from error
    note = ""
    if size < len(data):
        note = (
            f"The last line of {path} had been cut off ({len(data) - size:,} bytes of an "
            f"annotation that was never confirmed to its annotator); it is left out."
        )
    return found, note, size


def _write_all(descriptor: int, data: bytes) -> None:
    """The system may write less than it is given, as on a disk that is nearly full."""
    while data:
        data = data[os.write(descriptor, data) :]


def _locked(folder: pathlib.Path) -> TextIO:
    """The lock file, open and held; the kernel lets go of it when the process ends, however."""
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.seek(0)
        holder = file.read().strip()
        file.close()
        raise UserError(
            f"MODEL_DIR = {folder} is in use by another process{holder and f' ({holder})'}, and "
            "two would overwrite each other's work. Use its page, end it, or choose another "
            "MODEL_DIR."
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    return file
