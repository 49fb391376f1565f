"""What ppo writes about answers: figures and samples of held-out prompts, all rollouts."""

import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from chatyuan import sharding
from chatyuan.align.iteration import Iteration, Scored
from chatyuan.align.roles import AlignState
from chatyuan.align.rollout import write_rollouts
from chatyuan.metrics import Writer, truncate
from chatyuan.stages import _samples, _supervised

EVALUATED = 1 << 31  # evaluation's prompts are numbered from here, training's from 0


class Evaluation:
    """Scores of answers to held-out prompts, drawn with the same numbers every time; samples."""

    def __init__(self, parts: Any, iteration: Iteration, writer: Writer) -> None:
        """Takes the `Parts` of ppo, its step and where samples go."""
        self.parts, self.iteration, self.writer = parts, iteration, writer

    def __call__(self, state: AlignState, step: int) -> dict[str, float]:
        """Returns the figures of an evaluation; writes samples.jsonl."""
        config, held_out = self.parts.config, self.parts.evaluation
        if held_out is None:
            batches = [self.parts.loader.batch(0)]
        else:
            batches = list(_supervised.spread(held_out, config.eval_batches))
        columns, samples = [], []
        for number, batch in enumerate(batches):
            if held_out is None and not config.num_samples:
                break
            filled, real = _filled(batch)
            rows = self.parts.prompts(filled, EVALUATED + number * len(real))
            rollouts = self.iteration.rollouts(state, sharding.shard_batch(rows, self.parts.mesh))
            scored = self.iteration.scored(state, rollouts)
            columns.append(_columns(scored, self.parts.vocabulary.eos_id, real))
            wanted = -(-(config.num_samples - len(samples)) // (len(batches) - number))
            places = np.flatnonzero(real)[:wanted]
            samples += [self._sample(filled, scored, row) for row in places]
        if samples:
            self.writer.write_samples(step, samples)
        if held_out is None:
            return {}
        joined = {name: np.concatenate([c[name] for c in columns]) for name in columns[0]}
        figures = {
            f"eval/{name}": float(np.mean(joined[name], dtype=np.float64))
            for name in ("score", "kl", "length", "ended")
        }
        figures["eval/score_std"] = float(np.std(joined["score"], dtype=np.float64))
        total = joined["entropy"].sum(dtype=np.float64)
        figures["eval/entropy"] = float(total / joined["length"].sum(dtype=np.float64))
        return figures

    def _sample(self, batch: Mapping[str, np.ndarray], scored: Scored, row: int) -> dict[str, Any]:
        """The first answer to a prompt, as text."""
        show = functools.partial(_samples.show, self.parts.vocabulary)
        answers = scored.answers.answers
        target = batch["decoder_target_tokens"][row][batch["decoder_loss_weights"][row] > 0]
        return {
            "input": show(answers.prompts[row][: answers.prompt_lengths[row]]),
            "target": show(target),
            "output": show(answers.tokens[row, 0][: answers.lengths[row, 0]]),
            "score": float(scored.scores[row, 0]),
        }


def _filled(batch: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """(the batch, the first row in place of rows that only fill it up; which rows are real)."""
    real = batch["decoder_segment_ids"].any(axis=1)
    places = np.where(real, np.arange(len(real)), np.flatnonzero(real)[0])
    return {name: value[places] for name, value in batch.items()}, real


def _columns(scored: Scored, eos_id: int, real: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of each answer to the real prompts, [rows * G]."""
    experience, answers = scored.experience, scored.experience.rollouts.answers
    found = {
        "kl": jnp.sum(experience.log_probs - experience.reference_log_probs, axis=-1),
        "entropy": jnp.sum(experience.entropies, axis=-1),
        "length": answers.lengths,
        "ended": answers.ended(eos_id),
    }
    host = {"score": scored.scores, **jax.device_get(found)}
    return {name: value[real].reshape(-1) for name, value in host.items()}


class Recorder:
    """Appends the answers of each iteration to a file, from the place where the run goes on."""

    def __init__(self, path: pathlib.Path) -> None:
        """Opens nothing yet."""
        self.path, self.next = path, -1

    def __call__(self, step: int, version: int, scored: Scored) -> None:
        """Writes those that iteration `step` learns from, drawn by policy `version`."""
        if step != self.next:  # after a start, or after going back
            truncate(self.path, step - 1)
        self.next = step + 1
        host, groups = scored.answers, scored.scores.shape[1]
        answers = host["answers"]
        texts = [
            (prompt, answers[row * groups : (row + 1) * groups])
            for row, prompt in enumerate(host["prompts"][::groups])
        ]
        write_rollouts(
            self.path,
            scored.experience.rollouts,
            step=step,
            version=version,
            rewards=scored.scores,
            texts=texts,
        )
