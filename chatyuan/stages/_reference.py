"""What the reference says of preferences: log-probs that are computed once and kept in a file.

The file's name and content hold what they were computed from: checkpoint, caches, lengths, pairs,
model. Another of these is another file, so a stale one is never read; one is written whole or not
at all. Runs that differ in the loss alone share it.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import time
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from chatyuan import sharding
from chatyuan.align.pairs import answer_log_probs
from chatyuan.checkpoint_files import check_writable
from chatyuan.data.cache import folder_name
from chatyuan.data.pairs import PairLoader
from chatyuan.errors import UserError
from chatyuan.models import Model
from chatyuan.models.config import ModelConfig
from chatyuan.stages import _run_folder

FOLDER = "reference_log_probs"  # in CACHE_DIR
SETTING = "dpo.Config.reference_dir"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Reference:
    """A fixed model and where its log-probs are kept.

    Attributes:
        checkpoint: folder of the one checkpoint that is meant.
        identity: of its content.
        use_ema: whether its moving average is meant.
        folder: of the files.
    """

    checkpoint: str
    identity: str
    use_ema: bool
    folder: pathlib.Path

    def file(self, loader: PairLoader, model: ModelConfig) -> tuple[pathlib.Path, str]:
        """Returns the file for the rows of a loader, and what it has to say of itself."""
        # What changes no value beyond rounding may differ; dropout is off.
        free = (
            *("dropout_rate", "scan_layers", "remat", "sequence_parallel"),
            *("attention_implementation", "pipeline_microbatches", "pipeline_repeats"),
        )
        about = {
            "version": VERSION,
            "checkpoint": self.identity,
            "use_ema": self.use_ema,
            "data": loader.identity(),
            "model": {k: v for k, v in dataclasses.asdict(model).items() if k not in free},
        }
        text = json.dumps(about, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        name = folder_name(f"{loader.config.mixture}-{loader.config.split}")
        return self.folder / f"{name}-{key}.npz", text


def open_reference(config: Any) -> Reference:
    """Finds INIT_FROM's checkpoint. Raises UserError: none, or not a language model's."""
    stage = type(config).__module__.rpartition(".")[2]
    if config.init_from is None:
        raise UserError(
            f"INIT_FROM must be set: {stage} keeps the model near the one it starts from, except "
            "with the losses orpo and simpo. Tune one first: python run.py sft ..."
        )
    meta = _run_folder.read_tuned_meta(
        config.init_from,
        f"{stage} starts from a tuned language model, the run of python run.py sft",
    )
    folder = pathlib.Path(config.reference_dir or pathlib.Path(config.data.cache_dir) / FOLDER)
    check_writable(folder, SETTING)
    content = _run_folder.identity(config.init_from)
    return Reference(meta["path"], content, config.init_from_ema, folder)


def read(file: pathlib.Path, about: str, shape: tuple[int, int]) -> np.ndarray | None:
    """Returns the log-probs, float32 `[rows, C]`; None: not computed yet, or a damaged file."""
    try:
        # Opened here: of a damaged file np.load would leave its own handle open.
        with file.open("rb") as opened, np.load(opened, allow_pickle=False) as stored:
            values = stored["log_probs"]
            fits = str(stored["about"]) == about and values.shape == shape
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        fits = False
    if not fits:
        print(f"{file} is damaged; its log-probs are computed again.", flush=True)
        return None
    return values


def _write(file: pathlib.Path, about: str, values: np.ndarray) -> None:
    temporary = file.with_name(f"{file.name}.tmp{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as opened:
            np.savez(opened, log_probs=values, about=np.array(about))
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(
            f"The reference's log-probs cannot be written to {file}: {error.strerror or error}. "
            f"Make room, or choose another folder: --gin.{SETTING}=..."
        ) from error


def fill(
    reference: Reference,
    loaders: list[PairLoader],
    model: Model,
    mesh: jax.sharding.Mesh,
    answers_of: Callable[[Mapping[str, Any]], Any],
    microbatches: int,
) -> None:
    """Gives every loader its reference log-probs, from the file or computed now and written.

    Raises:
        UserError: the checkpoint is damaged or another model's, a log-prob is not finite, or the
            file cannot be written.
    """
    missing = []
    for loader in loaders:
        file, about = reference.file(loader, model.config)
        loader.reference = read(file, about, (len(loader.kept), loader.columns))
        if loader.reference is None:
            missing.append((loader, file, about))
    if not missing:
        return
    shapes = model.abstract_params()
    places = sharding.shardings(shapes, model.logical_axes(), mesh)
    abstract = sharding.with_shardings(shapes, places)
    params = _run_folder.load_weights(
        reference.checkpoint, model, abstract, mesh, use_ema=reference.use_ema
    )
    score = jax.jit(
        lambda params, batch: answer_log_probs(model, params, answers_of(batch), mesh=mesh)
    )
    for loader, file, about in missing:
        start = time.perf_counter()
        size = loader.config.batch_size // microbatches
        values = _computed(loader.once(size), score, params, mesh)
        if not np.isfinite(values).all():
            row = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise UserError(
                f"INIT_FROM = {reference.checkpoint} gives no finite log-prob for preference {row} "
                f"of the {loader.config.split} split of {loader.config.mixture}; use a checkpoint "
                "from before its training failed, or DTYPE=float32."
            )
        _write(file, about, values)
        loader.reference = values
        print(
            f"Reference log-probs of {len(values):,} prompts ({loader.config.split}): "
            f"{time.perf_counter() - start:.1f} s, kept in {file}",
            flush=True,
        )


def _computed(loader: PairLoader, score: Callable[..., Any], params: Any, mesh: Any) -> np.ndarray:
    """Log-probs `[rows, C]` of a pass over the rows, the next batch sent before one is read."""
    found, ahead = [], None
    for index in range(len(loader)):
        batch = loader.batch(index)
        ready, ahead = ahead, score(params, sharding.shard_batch(batch, mesh))
        if ready is not None:
            found.append(np.asarray(ready))
    found.append(np.asarray(ahead))
    return np.concatenate(found)[: len(loader.kept)]
