"""Makes rax.json: rax's ranking losses and their gradients, which ours must equal.

    python tests/ops/golden/make_rax.py

rax has an environment of its own (it must not decide which jax this project uses):

    python3.11 -m venv raxref
    raxref/bin/pip install --no-deps rax==0.4.0 jax==0.10.2 jaxlib==0.10.2 \
        ml_dtypes opt_einsum numpy scipy typing_extensions

The committed file was made with these versions, whose numbers it names, on Python 3.11 and CPU. A
case is one prompt: scores of its answers, ranks (0 the best), a mask, the loss and d loss / d
score. `kwise` is `pairwise_logistic_loss`, a mean over the pairs that are no ties; `plackett_luce`
is `listmle_loss`, which knows no ties. Masked answers hold a score and a rank that would matter.
"""

import importlib.metadata
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import rax

CASES = 8
ANSWERS = 6
LOSSES = {"kwise": (rax.pairwise_logistic_loss, True), "plackett_luce": (rax.listmle_loss, False)}


def inputs(rng: np.random.Generator, ties: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores, ranks and mask of one prompt; ranks without ties are a permutation."""
    scores = rng.normal(size=ANSWERS) * 2
    ranks = rng.integers(0, 4, ANSWERS) if ties else rng.permutation(ANSWERS)
    mask = np.arange(ANSWERS) < rng.integers(2, ANSWERS + 1)
    ranks[:2] = [0, 1] if ties else ranks[:2]  # at least one pair
    return np.where(mask, scores, 40.0), np.where(mask, ranks, -1), mask


def cases(loss: object, ties: bool) -> list[dict]:
    """One dictionary per random prompt, and the worked example of four answers."""
    rng = np.random.default_rng(0)
    made = [inputs(rng, ties) for _ in range(CASES)]
    made.append((np.array([1.2, 0.4, 0.1, -0.7]), np.arange(4), np.ones(4, bool)))
    rows = []
    for scores, ranks, mask in made:

        def value(scores, ranks=ranks, mask=mask):
            return loss(scores, jnp.asarray(10.0 - ranks), where=jnp.asarray(mask))

        total, gradient = jax.value_and_grad(value)(jnp.asarray(scores))
        rows.append(
            {
                "scores": scores.tolist(),
                "ranks": ranks.tolist(),
                "mask": mask.tolist(),
                "loss": float(total),
                "gradient": np.asarray(gradient).tolist(),
            }
        )
    return rows


def main() -> None:
    """Writes rax.json beside this file."""
    with jax.enable_x64(True):
        found = {name: {"cases": cases(*entry)} for name, entry in LOSSES.items()}
    versions = {name: importlib.metadata.version(name) for name in ("rax", "jax", "numpy")}
    path = pathlib.Path(__file__).with_name("rax.json")
    text = json.dumps({"versions": versions, **found})
    path.write_text(text.replace('{"scores"', '\n{"scores"') + "\n")  # a case a line


if __name__ == "__main__":
    main()
