"""Makes tunix.json: tunix's GAE, whitening, KL estimators, group advantages and aggregations.

    python tests/ops/golden/make_tunix.py

tunix has an environment of its own, and of its 40 requirements only those that these files import:

    python3.11 -m venv tunixref
    tunixref/bin/pip install --no-deps google-tunix==0.1.7 jax==0.10.2 jaxlib==0.10.2 \
        flax==0.12.8 ml_dtypes opt_einsum numpy scipy typing_extensions absl-py optax chex toolz \
        msgpack rich humanize PyYAML markdown-it-py mdurl pygments treescope orbax-checkpoint \
        fsspec huggingface_hub etils tensorstore

`import tunix` pulls in every trainer, so the packages are entered without their `__init__`. The
committed file was made with these versions, whose numbers it names, on Python 3.11 and CPU, in
float32, as tunix computes. Under the zeros of a mask stands poison where tunix's function never
reads it, and only kept values are stored (0 elsewhere).
"""

import importlib.metadata
import json
import pathlib
import sys
import types

import jax.numpy as jnp
import numpy as np


def enter(*names: str) -> None:
    """Makes packages importable without running their `__init__`."""
    root = next(pathlib.Path(p) for p in sys.path if (pathlib.Path(p) / "tunix").is_dir())
    for name in names:
        module = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")))]
        sys.modules[name] = module


enter("tunix", "tunix.rl", "tunix.sft", "tunix.oss")

from tunix.rl import algo_core, common  # noqa: E402

ROWS, TOKENS = 5, 8
KL_NAMES = {"k1": "kl", "k2": "mse_kl", "k3": "low_var_kl"}
AGGREGATIONS = {
    "token-mean": "token-mean",
    "seq-mean-token-mean": "sequence-mean-token-mean",
    "seq-mean-token-sum": "seq-mean-token-sum",
    "seq-mean-token-sum-norm": "sequence-mean-token-scale",  # constant: the row's full length
}


def masks() -> dict[str, np.ndarray]:
    """Responses of several lengths, and some with tokens in the middle that are not theirs."""
    ragged = np.arange(TOKENS) < np.array([8, 1, 5, 3, 7])[:, None]
    gaps = ragged.copy()
    gaps[0, 2:4] = gaps[2, 1] = gaps[4, 0] = False
    return {"ragged": ragged, "gaps": gaps}


def numbers(array: object, mask: np.ndarray | None = None) -> list:
    """Nested lists of an array, 0 where the mask is."""
    array = np.asarray(array, np.float64)
    return (array if mask is None else np.where(mask, array, 0.0)).tolist()


def advantages(rng: np.random.Generator, mask: np.ndarray, gamma: float, lam: float) -> dict:
    """GAE, its returns and the whitened advantages of one batch."""
    rewards, values = rng.normal(size=(2, ROWS, TOKENS)).astype(np.float32)
    as_number = jnp.asarray(mask, jnp.float32)
    poisoned = np.where(mask, rewards, np.float32(50.0)), np.where(mask, values, np.float32(-50.0))
    # It whitens what it returns; its returns are those of the advantages before that.
    whitened, returns = algo_core.compute_gae_advantages(
        *map(jnp.asarray, poisoned), as_number, gamma, lam
    )
    return {
        "gamma": gamma,
        "lam": lam,
        "mask": mask.astype(int).tolist(),
        "rewards": numbers(poisoned[0]),
        "values": numbers(poisoned[1]),
        "advantages": numbers(np.asarray(returns) - poisoned[1], mask),
        "returns": numbers(returns, mask),
        "whitened": numbers(whitened, mask),
    }


def divergences(rng: np.random.Generator) -> dict:
    """The three estimators at log-ratios from small to large."""
    policy = -rng.exponential(size=20).astype(np.float32)
    reference = policy + (rng.normal(size=20) * np.logspace(-2, 0.5, 20)).astype(np.float32)
    found = {
        ours: numbers(
            common.compute_kl_divergence(jnp.asarray(policy), jnp.asarray(reference), name)
        )
        for ours, name in KL_NAMES.items()
    }
    return {"policy": numbers(policy), "reference": numbers(reference), **found}


def groups(rng: np.random.Generator) -> dict:
    """Advantages of 6 prompts with 4 responses each."""
    scores = rng.normal(size=(6, 4)).astype(np.float32)
    flat = scores.reshape(-1)
    found = {
        "grpo": algo_core.compute_advantages(flat, 4),
        "rloo": algo_core.compute_rloo_advantages(jnp.asarray(flat), 4),
        "dr_grpo": algo_core.compute_drgrpo_advantages(jnp.asarray(flat), 4),
    }
    named = {name: numbers(np.asarray(value).reshape(6, 4)) for name, value in found.items()}
    return {"scores": numbers(scores), **named}


def aggregated(rng: np.random.Generator) -> dict:
    """Losses of a batch with one empty row, reduced in each way."""
    mask = masks()["gaps"]
    mask[3] = False
    losses = rng.normal(size=(ROWS, TOKENS)).astype(np.float32)
    found = {
        ours: float(
            common.aggregate_loss(jnp.asarray(losses), jnp.asarray(mask, jnp.float32), name)
        )
        for ours, name in AGGREGATIONS.items()
    }
    return {"losses": numbers(losses), "mask": mask.astype(int).tolist(), **found}


def main() -> None:
    """Writes tunix.json beside this file."""
    rng = np.random.default_rng(0)
    settings = [("ragged", 1.0, 0.95), ("gaps", 1.0, 0.95), ("gaps", 0.9, 0.7)]
    found = {
        "gae": [advantages(rng, masks()[kind], gamma, lam) for kind, gamma, lam in settings],
        "kl": divergences(rng),
        "groups": groups(rng),
        "aggregate": aggregated(rng),
    }
    names = ("google-tunix", "jax", "flax", "numpy")
    versions = {name: importlib.metadata.version(name) for name in names}
    text = json.dumps({"versions": versions, **found})
    for key in ("rewards", "whitened", "kl", "groups", "aggregate"):
        text = text.replace(f'"{key}"', f'\n"{key}"')
    pathlib.Path(__file__).with_name("tunix.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
