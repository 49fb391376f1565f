"""What stages know about the folder of a finished or running training run."""

import dataclasses
import os
import pathlib
import shutil
from typing import Any

import jax

from chatyuan import checkpoint_files, checkpoints, sharding
from chatyuan.checkpoint_files import write_whole as write_whole  # for the stages
from chatyuan.configs import from_json
from chatyuan.errors import UserError
from chatyuan.models import Model, adapters, build
from chatyuan.models.config import ModelConfig
from chatyuan.models.reward import Normalisation, RewardModel, read_normalisation
from chatyuan.text.vocabulary import Vocabulary

VOCABULARY_NAME = "vocabulary.model"
REWARD_MODEL = "reward_model"  # the `kind` in a reward model's checkpoints; others have none


def keep_vocabulary(vocabulary: Vocabulary, model_dir: str | os.PathLike[str]) -> None:
    """Copies the vocabulary into the run's folder, so that the folder answers prompts by itself."""
    target = pathlib.Path(model_dir) / VOCABULARY_NAME
    if not target.exists():
        temporary = target.with_name(f"{target.name}.tmp{os.getpid()}")
        shutil.copyfile(vocabulary.path, temporary)
        temporary.replace(target)


def model_meta(model: ModelConfig, vocabulary: Vocabulary) -> dict[str, Any]:
    """Returns what a checkpoint says about its model: enough to use it without its recipe."""
    return {"model": dataclasses.asdict(model), "vocabulary_sha256": vocabulary.sha256}


def read_meta(path: str) -> dict[str, Any]:
    """Returns what the newest checkpoint of INIT_FROM says about itself.

    Raises:
        UserError: there is no checkpoint.
    """
    try:
        return checkpoints.read_meta(path)
    except UserError as error:
        raise UserError(f"INIT_FROM = {path}: {error}") from error


def identity(path: str, setting: str = "INIT_FROM") -> str:
    """Returns what tells a run's newest checkpoint (or a STEP folder) from all others.

    Raises:
        UserError: it is damaged.
    """
    try:
        return checkpoint_files.identity(read_meta(path)["path"])
    except checkpoint_files.DamagedCheckpoint as error:
        raise UserError(
            f"{setting} = {path}: its newest checkpoint is damaged ({error}). Give another one, "
            f"{setting}=.../checkpoints/STEP."
        ) from error


def read_tuned_meta(path: str, remedy: str) -> dict[str, Any]:
    """Returns the meta of INIT_FROM. Raises UserError, with the remedy, for a reward model's."""
    meta = read_meta(path)
    if meta.get("kind") == REWARD_MODEL:
        raise UserError(f"INIT_FROM = {path} is a reward model; {remedy}.")
    return meta


def check_vocabulary(
    path: str, meta: dict[str, Any], vocabulary: Vocabulary, setting: str = "INIT_FROM"
) -> None:
    """Raises UserError when the run or checkpoint `path` was trained with another vocabulary."""
    trained = meta.get("vocabulary_sha256")
    if trained is not None and trained != vocabulary.sha256:
        own = run_folder(path) / VOCABULARY_NAME
        raise UserError(
            f"{setting} = {path} was trained with another vocabulary (sha256 {trained[:12]}...) "
            f"than VOCABULARY = {vocabulary.path} ({vocabulary.sha256[:12]}...); every token would "
            f"mean something else. Use the run's own: --gin.VOCABULARY={own}"
        )


def run_folder(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the MODEL_DIR that a checkpoint path lies in: itself, or one or two folders up."""
    given = pathlib.Path(path)
    for folder in (given, given.parent, given.parent.parent):
        if (folder / checkpoints.FOLDER).is_dir():
            return folder
    return given


def read_model(path: str, vocabulary: str | None = None) -> tuple[ModelConfig, Vocabulary]:
    """Returns the model configuration and vocabulary of a run or checkpoint.

    Args:
        path: MODEL_DIR, its checkpoints folder, or one STEP folder.
        vocabulary: a SentencePiece file; None = the copy that the run keeps.

    Raises:
        UserError: nothing there, no model in it, or a vocabulary that is not the run's.
    """
    meta = read_meta(path)
    if "model" not in meta:
        raise UserError(f"INIT_FROM = {path} does not say which model it holds; train it again.")
    file = vocabulary or str(run_folder(path) / VOCABULARY_NAME)
    loaded = Vocabulary(file)
    check_vocabulary(path, meta, loaded)
    return from_json(ModelConfig, meta["model"]), loaded


def load_weights(
    path: str,
    model: Model,
    abstract: Any,
    mesh: jax.sharding.Mesh,
    *,
    use_ema: bool = False,
    seed: int = 0,
) -> Any:
    """Returns the weights of INIT_FROM for a model, adapters (`ModelConfig.adapter_rank`) included.

    A run without adapters gives them none: they begin afresh, adding nothing. Those of a run with
    adapters are added to its matrices for a model without.

    Args:
        path: MODEL_DIR, its checkpoints folder, or one STEP folder.
        model: what they are for.
        abstract: its shapes, placed.
        mesh: on which.
        use_ema: take the moving average.
        seed: of new adapters.

    Raises:
        UserError: adapters of another rank or alpha, or as `checkpoints.load_params`.
    """
    meta, wanted = read_meta(path).get("model", {}), model.config
    stored = {n: meta[n] for n in ("adapter_rank", "adapter_alpha") if meta.get("adapter_rank")}
    if wanted.adapter_rank and stored:
        if any(getattr(wanted, name) != value for name, value in stored.items()):
            has, new = stored.values(), (wanted.adapter_rank, wanted.adapter_alpha)
            raise UserError(
                f"INIT_FROM = {path} has adapters of rank and alpha {', '.join(map(str, has))}; "
                f"ModelConfig says {', '.join(map(str, new))}. Set adapter_rank and adapter_alpha "
                "as there, or adapter_rank = 0 to add them to the matrices."
            )
    if bool(wanted.adapter_rank) == bool(stored):
        return checkpoints.load_params(path, abstract, use_ema=use_ema)
    if wanted.adapter_rank:
        base = adapters.without_adapters(abstract)
        weights = checkpoints.load_params(path, base, use_ema=use_ema)
        places = jax.tree.map(lambda leaf: leaf.sharding, adapters.adapters_of(abstract))
        return adapters.joined(weights, model.init_adapters(jax.random.key(seed), places))
    whole = dataclasses.replace(wanted, **stored)
    source = build(whole)
    shapes = source.abstract_params()
    shapes = sharding.with_shardings(
        shapes, sharding.shardings(shapes, source.logical_axes(), mesh)
    )
    weights = checkpoints.load_params(path, shapes, use_ema=use_ema)
    merge = jax.jit(
        lambda params: adapters.merged(params, whole),
        out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract),
    )
    return merge(weights)


def read_reward_model(
    path: str, vocabulary: Vocabulary, *, setting: str = "REWARD_MODEL", raw: bool = False
) -> tuple[RewardModel, Normalisation]:
    """Returns the reward model of a run of `reward`, and how to normalise its scores.

    Its weights are `checkpoints.load_params(path, model.abstract_params())`.

    Args:
        path: MODEL_DIR, its checkpoints folder, or one STEP folder.
        vocabulary: the policy's; scores are of token ids, so the reward model must have the same.
        setting: what the user set, for messages.
        raw: accept a checkpoint without normalisation, and do not normalise.

    Raises:
        UserError: nothing there, not a reward model, another vocabulary, no normalisation.
    """
    try:
        meta = checkpoints.read_meta(path)
    except UserError as error:
        raise UserError(f"{setting} = {path}: {error}") from error
    if meta.get("kind") != REWARD_MODEL:
        raise UserError(
            f"{setting} = {path} is not a reward model. Train one first: python run.py reward "
            f"--gin.INIT_FROM={path} --gin.MIXTURE=..."
        )
    check_vocabulary(path, meta, vocabulary, setting)
    model = RewardModel(from_json(ModelConfig, meta["model"]))
    return model, Normalisation() if raw else read_normalisation(path, meta)
