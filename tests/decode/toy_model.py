"""A model small enough to enumerate: prompt, step and a fading sum over past tokens decide."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ToyCache:
    """Row-wise: what the prompt adds and a running sum of the tokens read. Shared: the prompts."""

    position: Any  # int32 [R]
    running: Any  # float32 [R, V]: a self-cache that reordering must follow
    prompt: Any  # float32 [B, V]: a cross-cache that is never expanded

    def expand(self, samples):
        return dataclasses.replace(
            self,
            position=jnp.repeat(self.position, samples, axis=0),
            running=jnp.repeat(self.running, samples, axis=0),
        )

    def take(self, rows):
        return dataclasses.replace(self, position=self.position[rows], running=self.running[rows])


@dataclasses.dataclass(frozen=True)
class ToyBound:
    """The decoding interface of a bound model."""

    params: Any

    def prefill(self, tokens, lengths, max_decode_length, cache_dtype=None):
        del max_decode_length, cache_dtype
        batch, width = tokens.shape
        real = (jnp.arange(width)[None, :] < lengths[:, None]).astype(jnp.float32)
        prompt = jnp.einsum("bs,bsv->bv", real, self.params["prompt"][tokens])
        cache = ToyCache(jnp.zeros(batch, jnp.int32), jnp.zeros_like(prompt), prompt)
        return self.step(jnp.zeros(batch, jnp.int32), cache)

    def step(self, tokens, cache):
        rows, prompts = tokens.shape[0], cache.prompt.shape[0]
        running = 0.5 * cache.running + self.params["table"][tokens]
        prompt = jnp.repeat(cache.prompt, rows // prompts, axis=0)
        logits = running + prompt + self.params["step"][cache.position]
        return logits, dataclasses.replace(cache, position=cache.position + 1, running=running)


@dataclasses.dataclass(frozen=True)
class ToyModel:
    """The part of a model that generation uses."""

    def bind(self, params):
        return ToyBound(params)


def toy_params(vocab_size, steps, seed=0, scale=1.0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    return {
        "table": normal(vocab_size, vocab_size),
        "prompt": normal(vocab_size, vocab_size),
        "step": normal(steps + 1, vocab_size),
    }


class NumpyToy:
    """The same model, recomputed from the whole prefix, for naive reference loops."""

    def __init__(self, params, prompt):
        self.params = {name: np.asarray(leaf, np.float64) for name, leaf in params.items()}
        self.prompt = self.params["prompt"][list(prompt)].sum(0)

    def logits(self, prefix):
        running = 0.0
        for token in [0, *prefix]:
            running = 0.5 * running + self.params["table"][token]
        return running + self.prompt + self.params["step"][len(prefix)]

    def log_probs(self, prefix):
        return log_softmax(self.logits(prefix))


def log_softmax(scores):
    scores = np.asarray(scores, np.float64)
    shifted = scores - scores.max()
    with np.errstate(divide="ignore"):
        return shifted - np.log(np.exp(shifted).sum())
