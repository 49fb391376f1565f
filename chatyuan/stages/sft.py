"""Tune a pretrained model on instructions and dialogues (tasks with inputs and targets).

How it differs from ChatYuan's own script, in numbered sentences:
1. The decoder starts from the padding token and learns the first token of an answer (ChatYuan's
   shift by hand dropped it, clue-ai/ChatYuan#11).
2. Several examples share a row, each attending only to itself: no padding to 512.
3. Long dialogues lose their oldest tokens, not the question (`truncate_inputs = 'left'`).
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
    """An instruction-tuning run."""


def run(config: Config) -> None:
    """Trains in MODEL_DIR, or continues there."""
    _supervised.run(config, title="Instruction tuning")


def dry_run(config: Config) -> None:
    """Checks everything, shows two rows and the costs; writes nothing."""
    _supervised.dry_run(config)
