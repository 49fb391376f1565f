"""Makes rlax.json: rlax's GAE and clipped surrogate, which ours must equal.

    python tests/ops/golden/make_rlax.py

rlax has an environment of its own (it needs a nightly of TensorFlow Probability):

    python3.11 -m venv rlaxref
    rlaxref/bin/pip install --no-deps rlax==0.1.9 distrax==0.1.9 chex==0.1.92 dm-env tfp-nightly \
        jax==0.10.2 jaxlib==0.10.2 ml_dtypes opt_einsum numpy scipy absl-py typing_extensions \
        toolz cloudpickle decorator gast six wrapt dm-tree attrs setuptools

The committed file was made with these versions, whose numbers it names, on Python 3.11 and CPU.
rlax's `truncated_generalized_advantage_estimation` knows no mask: here the rewards and values of
padding are 0 and the discount to a padded position is 0, which ends the episode there. The file
holds poison in their place, since ours must not see it. `clipped_surrogate_pg_loss` is a mean over
tokens; its gradient by the ratios is stored as well.
"""

import importlib.metadata
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import rlax

GAMMAS = [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.99, 0.0)]
ROWS, TOKENS = 5, 8


def advantages(rng: np.random.Generator, gamma: float, lam: float) -> dict:
    """GAE of a ragged batch."""
    lengths = np.array([8, 1, 5, 3, 7])
    mask = np.arange(TOKENS) < lengths[:, None]
    rewards, values = rng.normal(size=(2, ROWS, TOKENS))
    next_mask = np.pad(mask[:, 1:], ((0, 0), (0, 1)))
    found = jax.vmap(rlax.truncated_generalized_advantage_estimation, in_axes=(0, 0, None, 0))(
        jnp.asarray(rewards * mask),
        jnp.asarray(gamma * next_mask),
        lam,
        jnp.asarray(np.pad(values * mask, ((0, 0), (0, 1)))),
    )
    return {
        "gamma": gamma,
        "lam": lam,
        "mask": mask.astype(int).tolist(),
        "rewards": np.where(mask, rewards, 1e3).tolist(),
        "values": np.where(mask, values, -1e3).tolist(),
        "advantages": (np.asarray(found) * mask).tolist(),
    }


def surrogate(rng: np.random.Generator, epsilon: float) -> dict:
    """The clipped surrogate of tokens on both sides of both clips."""
    ratios = np.exp(rng.normal(size=24) * 0.4)
    scores = rng.normal(size=24)
    loss, gradient = jax.value_and_grad(rlax.clipped_surrogate_pg_loss)(
        jnp.asarray(ratios), jnp.asarray(scores), epsilon
    )
    return {
        "epsilon": epsilon,
        "ratios": ratios.tolist(),
        "advantages": scores.tolist(),
        "loss": float(loss),
        "gradient": np.asarray(gradient).tolist(),
    }


def main() -> None:
    """Writes rlax.json beside this file."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        found = {
            "gae": [advantages(rng, *pair) for pair in GAMMAS],
            "surrogate": [surrogate(rng, epsilon) for epsilon in (0.1, 0.2)],
        }
    versions = {name: importlib.metadata.version(name) for name in ("rlax", "jax", "numpy")}
    text = json.dumps({"versions": versions, **found})
    path = pathlib.Path(__file__).with_name("rlax.json")
    path.write_text(
        text.replace('"rewards"', '\n"rewards"').replace('"ratios"', '\n"ratios"') + "\n"
    )


if __name__ == "__main__":
    main()
