"""Rollouts: answers drawn from the policy, with the log-probabilities they were drawn at.

1. The random numbers of a token come from (seed, prompt's number, sample, step) alone, so a rollout
   does not depend on its batch, on the mesh or on a restart.
2. The token ids drawn are those that are learned from: nothing is decoded and encoded again.
3. The log-probabilities are the sampler's own, of the distribution drawn from.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from chatyuan import sharding
from chatyuan.align.answers import Answers
from chatyuan.decode.config import DecodeConfig
from chatyuan.decode.engine import make_generate
from chatyuan.errors import UserError
from chatyuan.metrics import unwritable


def _field(default: object, help_text: str, unit: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, "unit": unit})


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How answers are drawn.

    Raises:
      UserError: a value outside its range.
    """

    samples: int = _field(1, "answers drawn for each prompt", "answers")
    max_length: int = _field(64, "longest answer, the end token included", "tokens")
    temperature: float = _field(
        1.0, "divisor of the logits, in every log-probability that is learned from too"
    )
    top_k: int = _field(
        0, "keep this many of the likeliest tokens; 0 keeps all, as learning assumes"
    )
    top_p: float = _field(
        1.0, "keep the likeliest tokens that reach this probability; 1 keeps all, as is assumed"
    )
    cache_dtype: str | None = _field(
        None, "float32 or bfloat16: the decoder's own keys and values; None = the compute dtype"
    )

    def __post_init__(self) -> None:
        """Checks every value, by the rules of decoding."""
        self.decoding()

    def decoding(self, method: str = "sample") -> DecodeConfig:
        """Returns the decoding that this means; method greedy gives one answer a prompt."""
        filters = {"temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p}
        return DecodeConfig(
            method=method,
            max_decode_length=self.max_length,
            num_samples=self.samples if method == "sample" else 1,
            suppress_pad=False,  # a mask here would have to be in every log-probability too
            cache_dtype=self.cache_dtype,
            **(filters if method == "sample" else {}),
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollouts:
    """Answers, what the sampler knew about them, and which prompts they answer.

    Attributes:
      answers: see `Answers`.
      log_probs: float32 `[B, G, T]`, of the distribution drawn from; 0 past the end.
      prompt_ids: uint32 `[B]`, the number of each prompt in the order of the run.
    """

    answers: Answers
    log_probs: Array
    prompt_ids: Array


RolloutFn = Callable[[Any, Array, Array, Array], Rollouts]


def make_rollout(
    model: Any,
    config: RolloutConfig,
    *,
    eos_id: int,
    pad_id: int = 0,
    seed: int = 0,
    mesh: Mesh | None = None,
    apart: bool = False,
    method: str = "sample",
) -> RolloutFn:
    """Returns `rollout(params, prompts, prompt_lengths, prompt_ids) -> Rollouts`, compiled once.

    Prompts are int32 `[B, S]` with their lengths `[B]`, prompt_ids uint32 `[B]`. Decoding is one
    `while_loop` that ends when every row has; the encoder runs once a prompt, its G samples share
    the cross keys and values.

    Args:
      model: of `chatyuan.models.build`.
      config: how answers are drawn.
      eos_id: the end token.
      pad_id: fills up answers.
      seed: of the draws.
      mesh: the devices of a run; weights that are split to save memory (fsdp) are gathered once a
        call instead of once a token. None = one device.
      apart: the parameters and prompts come from other devices than those of `mesh` and are copied
        to them; all that is returned is there.
      method: sample, or greedy for one most likely answer a prompt.
    """
    generate = make_generate(model, config.decoding(method), eos_id=eos_id, pad_id=pad_id)
    gather = _gather(model, mesh, apart)

    @jax.jit
    def keys_of(prompt_ids: Array) -> Array:
        return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), prompt_ids)

    def rollout(params: Any, prompts: Array, prompt_lengths: Array, prompt_ids: Array) -> Rollouts:
        if apart:
            prompts, prompt_lengths, prompt_ids = moved((prompts, prompt_lengths, prompt_ids), mesh)
        output = generate(gather(params), prompts, prompt_lengths, keys_of(prompt_ids))
        answers = Answers(prompts, prompt_lengths, output.tokens, output.lengths)
        return Rollouts(answers, output.log_probs, prompt_ids)

    return rollout


def moved(tree: Any, mesh: Mesh | None) -> Any:
    """Copies arrays `[B, ...]` to the devices of a mesh, B split over them; None = no change."""
    if mesh is None:
        return tree
    return jax.tree.map(lambda x: jax.device_put(x, sharding.batch_sharding(x.shape, mesh)), tree)


def _gather(model: Any, mesh: Mesh | None, apart: bool) -> Callable[[Any], Any]:
    """From the training placement to that of decoding, in which no parameter is split by fsdp."""
    if mesh is None or (mesh.shape["fsdp"] == 1 and not apart):
        return lambda params: params
    rules = {
        name: tuple(axis for axis in axes if axis != "fsdp")
        for name, axes in sharding.RULES.items()
    }
    places = sharding.shardings(model.abstract_params(), model.logical_axes(), mesh, rules=rules)
    if apart:
        return lambda params: jax.device_put(params, places)
    return jax.jit(lambda params: params, out_shardings=places)


def prompts_of(batch: dict[str, np.ndarray], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the prompts of a loader's batch of one example a row: int32 `[B, width]` and lengths.

    Args:
      batch: features of `chatyuan.data.loader`, packed or not; the first example of a row counts.
      width: S; longer prompts keep their end.

    Raises:
      UserError: a row without a prompt (the data are plain texts, or an empty prompt).
    """
    if "encoder_input_tokens" in batch:
        tokens, kept = batch["encoder_input_tokens"], batch["encoder_segment_ids"] == 1
    else:
        # The decoder reads [start, prompt]: its targets in the bidirectional part are the prompt.
        tokens = batch["decoder_target_tokens"]
        kept = (
            (batch["decoder_segment_ids"] == 1)
            & (batch["decoder_causal_attention"] == 1)
            & (batch["decoder_loss_weights"] == 0)
        )
    prompts = np.zeros((len(tokens), width), np.int32)
    lengths = np.zeros(len(tokens), np.int32)
    for row, (ids, here) in enumerate(zip(tokens, kept, strict=True)):
        prompt = ids[here][-width:]
        prompts[row, : len(prompt)], lengths[row] = prompt, len(prompt)
    if not lengths.all():
        raise UserError(
            f"{int((lengths == 0).sum())} of {len(lengths)} rows have no prompt; the mixture needs "
            "`inputs` that are not empty (a task of questions, not of plain texts)."
        )
    return prompts, lengths


def write_rollouts(
    path: str | os.PathLike[str],
    rollouts: Rollouts,
    *,
    step: int,
    version: int | None = None,
    rewards: np.ndarray,
    texts: Sequence[tuple[str, Sequence[str]]] | None = None,
) -> None:
    """Appends rollouts to a JSONL file, one answer a line; whole lines only.

    Fields: step (the iteration that learns from it, counted from 0), version (how many iterations
    the policy had learned from when it drew it), prompt_id, sample, prompt_tokens, tokens,
    log_probs, reward, and prompt and answer with `texts`.

    Args:
      path: the file.
      rollouts: with arrays on the host or on devices.
      step: see above.
      version: see above; None = step.
      rewards: `[B, G]`.
      texts: for each prompt its text and those of its answers.

    Raises:
      UserError: the file cannot be written.
    """
    host = jax.device_get(rollouts)
    lines = []
    for row, number in enumerate(host.prompt_ids):
        prompt = host.answers.prompts[row][: host.answers.prompt_lengths[row]].tolist()
        for sample, length in enumerate(host.answers.lengths[row]):
            entry = {
                "step": int(step),
                "version": int(step if version is None else version),
                "prompt_id": int(number),
                "sample": sample,
                "prompt_tokens": prompt,
                "tokens": host.answers.tokens[row, sample, :length].tolist(),
                "log_probs": [float(x) for x in host.log_probs[row, sample, :length]],
                "reward": float(rewards[row, sample]),
            }
            if texts is not None:
                entry |= {"prompt": texts[row][0], "answer": texts[row][1][sample]}
            lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    path = pathlib.Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))
    except OSError as error:
        raise unwritable(path, error) from error


def read_rollouts(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the entries of a file of `write_rollouts`; a half-written last line is left out."""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.endswith("\n")]
