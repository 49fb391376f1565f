"""Files of a checkpoint folder: inventory, verification, atomic removal, what to say about disks.

A helper of `chatyuan.checkpoints`, without jax.
"""

import errno
import hashlib
import json
import os
import pathlib
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable
from typing import Any

from chatyuan.errors import UserError

FOLDER = "checkpoints"  # of MODEL_DIR
STATE, META, FILES = "state", "meta.json", "files.json"
TMP, DELETED, DAMAGED = ".tmp", ".deleted", ".damaged"
_SHOWN = 4  # items listed in a message before "and N more"


class DamagedCheckpoint(Exception):
    """A checkpoint folder whose files are missing, truncated or altered."""


def write_inventory(folder: pathlib.Path, checksums: bool) -> None:
    """Flushes every file under `folder` to the disk and writes files.json: {name: [bytes, CRC]}.

    CRC-32 sums are null without `checksums`.
    """
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            sync(path)
            crc = crc32(path) if checksums else None
            found[path.relative_to(folder).as_posix()] = [path.stat().st_size, crc]
    (folder / FILES).write_text(json.dumps(found, indent=0) + "\n", encoding="utf-8")
    sync(folder / FILES)


def verified_meta(folder: pathlib.Path, checksums: bool) -> dict[str, Any]:
    """Returns meta.json after comparing every file with the inventory.

    Raises:
      DamagedCheckpoint: a file is missing or of another size or (with `checksums`) content.
    """
    for name, (size, crc) in read_json(folder / FILES).items():
        path = folder / name
        if not path.is_file():
            raise DamagedCheckpoint(f"{name} is missing")
        actual = path.stat().st_size
        if actual != size:
            raise DamagedCheckpoint(f"{name} has {actual:,} bytes, should have {size:,}")
        if checksums and crc is not None and crc32(path) != crc:
            raise DamagedCheckpoint(f"the bytes of {name} have changed")
    return read_json(folder / META)


def identity(folder: str | os.PathLike[str]) -> str:
    """Returns a hash of what a checkpoint holds: of its inventory with every file's sum.

    Raises:
      DamagedCheckpoint: it has none.
    """
    parts = [pathlib.Path(folder) / name for name in (FILES, META)]
    try:
        return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    except OSError as error:
        raise DamagedCheckpoint(f"{folder} cannot be read: {error}") from error


def crc32(path: pathlib.Path) -> int:
    """Returns the CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def sync(path: pathlib.Path) -> None:
    """Asks the kernel to put a file or folder on the disk before the rename that commits it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(descriptor)


def write_whole(path: pathlib.Path, text: str) -> None:
    """Replaces a file, which never exists half-written under its name."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Returns the JSON object in a file. Raises DamagedCheckpoint."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DamagedCheckpoint(f"{path.name} is not a JSON object")
    return value


def discard(folder: pathlib.Path) -> None:
    """Renames a committed checkpoint to STEP.deleted, for `clean` to delete.

    A kill half-way through a deletion cannot leave a broken checkpoint behind then.
    """
    aside = folder.with_name(folder.name + DELETED)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(folder, aside)


def set_aside(folder: pathlib.Path) -> None:
    """Renames a damaged checkpoint to STEP.damaged and says so."""
    target = folder.with_name(folder.name + DAMAGED)
    try:
        shutil.rmtree(target, ignore_errors=True)
        os.rename(folder, target)
        warn(f"the damaged checkpoint is now {target}; it can be deleted.")
    except OSError as error:
        warn(f"the damaged checkpoint {folder} cannot be renamed ({error}); delete it by hand.")


def clean(directory: pathlib.Path, endings: tuple[str, ...] = (TMP, DELETED)) -> None:
    """Deletes what was given up, and what a killed process left half written or half deleted."""
    if directory.is_dir():
        for path in directory.iterdir():
            if path.name.endswith(endings):
                shutil.rmtree(path, ignore_errors=True)


def committed_steps(directory: pathlib.Path) -> list[int]:
    """Returns the steps whose folders are committed, ascending."""
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal() and p.is_dir())


def check_writable(directory: pathlib.Path, setting: str = "MODEL_DIR") -> None:
    """Raises UserError when `directory` could not be created or written, without touching it.

    `setting` is what the user would change.
    """
    existing = directory.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"{setting}: {existing} is a file, not a folder; choose another {setting}.")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"{setting}: {existing} cannot be written (read-only, or another user's); choose "
            f"another {setting} or change its permissions."
        )


def disk_reason(error: BaseException | None) -> str | None:
    """Returns what to say about a failed write when the disk is to blame, else None."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EROFS: "the file system is read-only",
        errno.EACCES: "permission denied",
        errno.EPERM: "permission denied",
    }
    while error is not None:
        if isinstance(error, OSError) and error.errno in reasons:
            return reasons[error.errno]
        for number, reason in reasons.items():  # TensorStore raises ValueError with errno's text
            if os.strerror(number) in str(error):
                return reason
        error = error.__cause__ or error.__context__
    return None


def free_space(directory: pathlib.Path) -> str:
    """Returns the free space of the disk of `directory` as text."""
    try:
        return f"{shutil.disk_usage(directory).free / 2**20:,.0f} MiB"
    except OSError:
        return "unknown space"


def first_few(items: Iterable[str], separator: str = ", ") -> str:
    """Joins the first few items and counts the rest."""
    items = list(items)
    rest = f"{separator}and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return separator.join(items[:_SHOWN]) + rest


def quietly(function: Callable[[], object]) -> None:
    """Calls `function` while another failure is being reported, dropping a second one."""
    try:
        function()
    except Exception:  # noqa: BLE001
        pass


def warn(message: str) -> None:
    """Prints a warning on stderr."""
    print(f"WARNING: {message}", file=sys.stderr, flush=True)
