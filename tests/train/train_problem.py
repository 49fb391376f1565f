"""A small supervised problem with the contract of a real loss: two layers, padding, dropout."""

import jax
import jax.numpy as jnp
import numpy as np

from chatyuan.ops.losses import cross_entropy
from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
from chatyuan.train.schedules import ScheduleConfig, make_schedule

VOCAB, EMBED, MLP, LENGTH = 32, 16, 24, 8
AXES = {
    "embedding": ("vocab", "embed"),
    "wi": ("layers", "embed", "mlp"),
    "wo": ("layers", "mlp", "embed"),
    "norm": ("embed",),
    "head": ("embed", "vocab"),
}


def init_params(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 4))
    return {
        "embedding": jax.random.normal(next(keys), (VOCAB, EMBED)),
        "wi": jax.random.normal(next(keys), (2, EMBED, MLP)) * EMBED**-0.5,
        "wo": jax.random.normal(next(keys), (2, MLP, EMBED)) * MLP**-0.5,
        "norm": jnp.ones((EMBED,)),
        "head": jax.random.normal(next(keys), (EMBED, VOCAB)) * EMBED**-0.5,
    }


def make_loss(dropout_rate=0.0, traces=None):
    """`loss_fn(params, batch, key)`; every trace of it is appended to `traces`."""

    def loss_fn(params, batch, key):
        if traces is not None:
            traces.append(1)
        x = params["embedding"][batch["decoder_input_tokens"]]
        for wi, wo in zip(params["wi"], params["wo"], strict=True):
            hidden = jax.nn.relu(x @ wi)
            if dropout_rate:
                hidden *= jax.random.bernoulli(key, 1 - dropout_rate, hidden.shape)
            x = x + hidden @ wo
        weights = batch["decoder_loss_weights"]
        logits = (x * params["norm"]) @ params["head"]
        sums = cross_entropy(logits, batch["decoder_target_tokens"], weights, z_loss=1e-3)
        count = jnp.sum((weights > 0).astype(jnp.float32))
        metrics = {
            "loss": (sums.nll, sums.weight),
            "accuracy": (sums.correct, sums.weight),
            "target_tokens": (count, jnp.ones(())),
        }
        return sums.total, sums.weight, metrics

    return loss_fn


def make_batch(size=8, seed=0):
    """Rows of uneven length, so that microbatches have uneven weights."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, VOCAB, (size, LENGTH)).astype(np.int32)
    lengths = rng.integers(1, LENGTH + 1, (size, 1))
    return {
        "decoder_input_tokens": tokens,
        "decoder_target_tokens": np.roll(tokens, -1, axis=1),
        "decoder_loss_weights": (np.arange(LENGTH) < lengths).astype(np.float32),
    }


def make_parts(name="adamw", rate=0.01, **changes):
    """(schedule, optimizer) for the problem."""
    schedule = make_schedule(ScheduleConfig("rsqrt", learning_rate=rate, warmup_steps=2))
    config = OptimizerConfig(name, **changes)
    return schedule, make_optimizer(config, schedule, jax.eval_shape(init_params), AXES)
