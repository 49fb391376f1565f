"""Pretrain a model on cached text: span corruption, denoiser mixtures, prefix LM, LM, UniLM.

How it differs from T5's own recipe (Raffel et al. 2020), in numbered sentences:
1. Documents are packed with segment ids instead of being joined across their boundaries
   (`DataConfig.concatenate = True` gives T5's way).
2. The order of the data is a function of (seed, step): a run that is stopped continues exactly.
3. Embeddings are read by a gather and the relative bias is computed once per stack.
"""

import dataclasses

from chatyuan.stages import _supervised

FLAGS = {
    "precompile": "compile the training step, show its memory and communication, and end; "
    "=v5e:2x4 for TPUs that are not attached"
}
TRAINS = True  # takes the flags of several processes and of restarts


@dataclasses.dataclass(frozen=True)
class Config(_supervised.Config):
    """A pretraining run."""


def run(config: Config) -> None:
    """Trains in MODEL_DIR, or continues there."""
    _supervised.run(config, title="Pretraining")


def dry_run(config: Config) -> None:
    """Checks everything, shows two rows and the costs; writes nothing."""
    _supervised.dry_run(config)
