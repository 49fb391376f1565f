"""Several answers to each prompt as arrays, and what a model makes of them in one pass.

The contract of every array here, for an answer y1..yn whose last token is the end token:
1. The decoder reads d = [start, y1, ..., yn]; hidden state t predicts y(t+1). So log-probability,
   value and reward of y(t+1) all stand at place t, and arrays have the length of the answers.
2. State n has read the end token: a reward model scores there. It exists with `reads_end` only.
3. Masks come from lengths, never from token ids: padding and the start token share an id.
4. The encoder runs once a prompt; its G answers share the cross keys and values.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from chatyuan.models.reward import RewardModel
from chatyuan.ops.linear_cross_entropy import (
    token_log_probs,
    token_log_probs_and_entropies,
    token_loss_sum,
)
from chatyuan.ops.policy_losses import entropy


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Answers:
    """G answers to each of B prompts, token ids as they were drawn.

    Attributes:
      prompts: int32 `[B, S]`, padded on the right.
      prompt_lengths: int32 `[B]`; 0 marks a row that only fills up the batch.
      tokens: int32 `[B, G, T]`, the end token included, then padding.
      lengths: int32 `[B, G]`, the end token included.
    """

    prompts: Array
    prompt_lengths: Array
    tokens: Array
    lengths: Array

    @property
    def mask(self) -> Array:
        """bool `[B, G, T]`: the places of the tokens that were drawn."""
        return jnp.arange(self.tokens.shape[-1]) < self.lengths[..., None]

    def ended(self, eos_id: int) -> Array:
        """bool `[B, G]`: whether an answer ends with the end token, not at the longest length."""
        last_BG1 = jnp.maximum(self.lengths - 1, 0)[..., None]
        last_BG = jnp.take_along_axis(self.tokens, last_BG1, axis=-1)[..., 0]
        return (last_BG == eos_id) & (self.lengths > 0)


def batch_of(answers: Answers, architecture: str, *, reads_end: bool = False) -> dict[str, Array]:
    """Returns the features that `module.hidden` reads: B encoder rows, R = B * G decoder rows.

    Args:
      answers: see `Answers`.
      architecture: encoder_decoder or prefix_lm (rows [start, prompt, answer], no encoder).
      reads_end: the decoder also reads the last token of each answer: T + 1 states, not T.
    """
    tokens_RT = answers.tokens.reshape(-1, answers.tokens.shape[-1])
    lengths_R = answers.lengths.reshape(-1)
    if architecture == "prefix_lm":
        return _joined(answers, tokens_RT, lengths_R, reads_end)
    places_S = jnp.arange(answers.prompts.shape[1])
    real_BS = places_S < answers.prompt_lengths[:, None]
    read_RU = jnp.pad(tokens_RT, ((0, 0), (1, 0)))
    read_RU = read_RU if reads_end else read_RU[:, :-1]
    last_R = lengths_R + 1 if reads_end else lengths_R
    places_U = jnp.arange(read_RU.shape[1])
    return {
        "encoder_input_tokens": answers.prompts,
        "encoder_segment_ids": real_BS.astype(jnp.int32),
        "decoder_input_tokens": read_RU,
        "decoder_segment_ids": (places_U < last_R[:, None]).astype(jnp.int32),
    }


def _joined(
    answers: Answers, tokens_RT: Array, lengths_R: Array, reads_end: bool
) -> dict[str, Array]:
    """Rows [start, prompt, answer] of one stack."""
    groups, longest = answers.tokens.shape[1], tokens_RT.shape[1]
    prompts_RS = jnp.repeat(answers.prompts, groups, axis=0)
    prompt_R1 = jnp.repeat(answers.prompt_lengths, groups)[:, None]
    width = 1 + prompts_RS.shape[1] + longest - (not reads_end)
    places_1P = jnp.arange(width)[None, :]
    rows = (tokens_RT.shape[0], width)
    prompt_RP = jnp.take_along_axis(
        prompts_RS, jnp.broadcast_to(jnp.clip(places_1P - 1, 0, prompts_RS.shape[1] - 1), rows), 1
    )
    answer_RP = jnp.take_along_axis(
        tokens_RT, jnp.clip(places_1P - 1 - prompt_R1, 0, longest - 1), axis=1
    )
    read_RP = jnp.where(places_1P <= prompt_R1, prompt_RP, answer_RP)
    read_RP = jnp.where(places_1P == 0, 0, read_RP)
    end_R1 = prompt_R1 + lengths_R[:, None] + (1 if reads_end else 0)
    return {
        "decoder_input_tokens": read_RP,
        "decoder_segment_ids": (places_1P < end_R1).astype(jnp.int32),
        "decoder_causal_attention": (places_1P <= prompt_R1).astype(jnp.int32),
    }


def answer_hidden(
    module: Any,
    answers: Answers,
    *,
    reads_end: bool = False,
    dropout_key: Array | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Returns the states that predict the answers' tokens, `[B, G, T, D]` in the compute dtype.

    Args:
      module: `model.bind(params)`.
      answers: see `Answers`.
      reads_end: T + 1 states, the last of an answer of n tokens, at place n, has read its end.
      dropout_key: None when not training.
      mesh: over which parameters and batch are split; None = one device.
    """
    architecture = module.config.architecture
    batch = batch_of(answers, architecture, reads_end=reads_end)
    hidden_RUD = module.hidden(batch, dropout_key=dropout_key, mesh=mesh)
    count, groups, longest = answers.tokens.shape
    states = longest + reads_end
    if architecture == "prefix_lm":
        first_R1 = jnp.repeat(answers.prompt_lengths, groups)[:, None]
        places_RT = first_R1 + jnp.arange(states)[None, :]
        hidden_RUD = jnp.take_along_axis(hidden_RUD, places_RT[..., None], axis=1)
    return hidden_RUD.reshape(count, groups, states, -1)


def reward_scores(
    model: RewardModel,
    params: Any,
    answers: Answers,
    *,
    dropout_key: Array | None = None,
    mesh: Mesh | None = None,
) -> Array:
    """Returns a reward model's raw score of each answer, float32 `[B, G]`, read at its end.

    Args:
      model: a reward model.
      params: its parameters.
      answers: see `Answers`; one of length 0 has a score without meaning.
      dropout_key: None when not training.
      mesh: over which parameters and batch are split; None = one device.
    """
    batch = batch_of(answers, model.config.architecture, reads_end=True)
    scores_R = model.score(params, batch, dropout_key=dropout_key, mesh=mesh)
    return scores_R.reshape(answers.lengths.shape)


def all_reward_scores(
    models: Sequence[RewardModel], trees: Sequence[Any], answers: Answers, mesh: Mesh | None
) -> tuple[Array, ...]:
    """Returns `reward_scores` of several models and their parameters, in their order."""
    pairs = zip(models, trees, strict=True)
    return tuple(reward_scores(model, tree, answers, mesh=mesh) for model, tree in pairs)


def token_scores(
    module: Any,
    hidden_BGTD: Array,
    answers: Answers,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
) -> Array:
    """Returns log softmax(logits / temperature) of each token drawn, float32 `[B, G, T]`, nats.

    Over the whole vocabulary, nothing filtered; 0 past the end of an answer.

    Args:
      module: `model.bind(params)`.
      hidden_BGTD: of `answer_hidden`, without the state that has read the end.
      answers: see `Answers`.
      temperature: that of sampling.
      mesh: as there.
    """
    head, options = _head_of(module, hidden_BGTD, answers, temperature, mesh)
    log_probs = token_log_probs(*head, **options).reshape(answers.tokens.shape)
    return jnp.where(answers.mask, log_probs, 0.0)


def token_scores_and_entropies(
    module: Any,
    hidden_BGTD: Array,
    answers: Answers,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """Returns `token_scores` and the entropies of the distributions, float32 `[B, G, T]`, nats.

    Arguments as there; no gradient passes.
    """
    head, options = _head_of(module, hidden_BGTD, answers, temperature, mesh)
    both = token_log_probs_and_entropies(*head, **options)
    return tuple(jnp.where(answers.mask, x.reshape(answers.tokens.shape), 0.0) for x in both)


def token_loss(
    function: Callable[..., Array],
    constants: Sequence[Array],
    module: Any,
    hidden_BGTD: Array,
    answers: Answers,
    temperature: float = 1.0,
    mesh: Mesh | None = None,
) -> tuple[Array, Array]:
    """Returns the sum over tokens of a function of each one's score, and `token_scores`.

    Args:
      function: see `chatyuan.ops.linear_cross_entropy.token_loss_sum`; it must give 0 past the end.
      constants: `[B, G, T]` each.
      module: as in `token_scores`, like all that follow.
      hidden_BGTD: as there.
      answers: as there.
      temperature: as there.
      mesh: as there.
    """
    head, options = _head_of(module, hidden_BGTD, answers, temperature, mesh)
    rows = [x.reshape(head[-1].shape) for x in constants]
    total, log_probs = token_loss_sum(function, *head, rows, **options)
    return total, jnp.where(answers.mask, log_probs.reshape(answers.tokens.shape), 0.0)


def _head_of(
    module: Any, hidden_BGTD: Array, answers: Answers, temperature: float, mesh: Mesh | None
) -> tuple[tuple[Array, Array, Array], dict[str, Any]]:
    """What the functions of the head read: (states, head, tokens), and their options."""
    hidden_BGTD = module.head_inputs(hidden_BGTD)
    if temperature != 1.0:
        hidden_BGTD = hidden_BGTD / jnp.asarray(temperature, hidden_BGTD.dtype)
    rows = (-1, *answers.tokens.shape[2:])
    hidden_RTD = hidden_BGTD.reshape(*rows, hidden_BGTD.shape[-1])
    on = mesh if mesh is not None and mesh.size > 1 else None
    options = {"norm_head": module.config.norm_head, "mesh": on}
    return (hidden_RTD, module.head_kernel(), answers.tokens.reshape(rows)), options


def token_entropies(
    module: Any, hidden_BGTD: Array, temperature: float = 1.0, chunk_tokens: int = 1024
) -> Array:
    """Returns the entropy of the distribution each token was drawn from, float32 `[B, G, T]`, nats.

    The logits of `chunk_tokens` tokens exist at a time, and again in the backward pass.

    Args:
      module: `model.bind(params)`.
      hidden_BGTD: of `answer_hidden`.
      temperature: that of sampling.
      chunk_tokens: tokens worked off together.
    """
    shape, width = hidden_BGTD.shape[:-1], hidden_BGTD.shape[-1]
    rows = hidden_BGTD.reshape(-1, width)
    count = rows.shape[0]
    chunk = min(chunk_tokens, count)
    rows = jnp.pad(rows, ((0, -count % chunk), (0, 0))).reshape(-1, chunk, width)
    weight = module.head_weight().astype(hidden_BGTD.dtype)

    @jax.checkpoint
    def one(hidden_CD: Array) -> Array:
        logits_CV = jnp.matmul(hidden_CD, weight, preferred_element_type=jnp.float32) / temperature
        return entropy(logits_CV)

    return jax.lax.map(one, rows).reshape(-1)[:count].reshape(shape)
