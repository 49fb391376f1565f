"""Makes span_corruption.json: statistics of t5.data's span corruption, which ours must reproduce.

    python tests/data/golden/make_span_corruption.py

t5 replaces the seqio package that others use, so give it an environment of its own:

    python3.11 -m venv t5ref
    t5ref/bin/pip install tensorflow==2.21.0 seqio==0.0.20 tensorflow-text==2.21.1
    t5ref/bin/pip install --no-deps t5==0.9.4
    t5ref/bin/pip install babel gin-config rouge-score sacrebleu nltk scikit-learn pandas

The committed file was made with exactly these versions on Python 3.11. For every setting (tokens,
density, mean span length) it holds, over `samples` masks of `random_spans_noise_mask`: the number
of noise tokens and of spans, which do not vary, histograms of the lengths of noise and of non-noise
spans, and how often each position is noise. A few complete examples (mask, inputs, targets of
`noise_span_to_unique_sentinel` and `nonnoise_span_to_unique_sentinel`) fix the format.
"""

import collections
import importlib.metadata
import itertools
import json
import pathlib

import numpy as np
import tensorflow as tf
from t5.data import preprocessors

SETTINGS = [
    (2, 0.15, 3.0), (5, 0.15, 3.0), (10, 0.15, 3.0), (30, 0.15, 3.0), (84, 0.15, 3.0),
    (100, 0.15, 3.0), (568, 0.15, 3.0), (128, 0.5, 3.0), (128, 0.15, 8.0), (128, 0.5, 8.0),
    (100, 0.15, 64.0), (100, 0.5, 64.0), (70, 0.3, 1.0),
]  # fmt: skip
SAMPLES = 4000
VOCABULARY_SIZE = 32100


class SizeOnly:
    """A vocabulary as far as `sentinel_id` looks at it."""

    vocab_size = VOCABULARY_SIZE


def masks(n: int, density: float, mean: float) -> np.ndarray:
    """Boolean [SAMPLES, n], the noise masks of different seeds."""

    @tf.function
    def one(seed: tf.Tensor) -> tf.Tensor:
        seeds = tf.stack([tf.stack([seed, 1]), tf.stack([seed, 2])])
        return preprocessors.random_spans_noise_mask(n, density, seeds, mean)

    return np.stack([one(tf.constant(seed, tf.int32)).numpy() for seed in range(SAMPLES)])


def statistics(n: int, density: float, mean: float) -> dict:
    """Counts over all masks of one setting."""
    noise, kept = collections.Counter(), collections.Counter()
    spans = set()
    sample = masks(n, density, mean)
    for mask in sample:
        runs = [(value, len(list(run))) for value, run in itertools.groupby(mask.tolist())]
        assert not runs[0][0]
        noise.update(length for value, length in runs if value)
        kept.update(length for value, length in runs if not value)
        spans.add(len(runs) // 2)
    assert len(spans) == 1 and len(set(sample.sum(axis=1))) == 1
    return {
        "tokens": n,
        "density": density,
        "mean": mean,
        "noise_tokens": int(sample[0].sum()),
        "spans": spans.pop(),
        "noise_lengths": sorted(noise.items()),
        "kept_lengths": sorted(kept.items()),
        "noise_at": sample.sum(axis=0).tolist(),
    }


def example(n: int, density: float, mean: float, seed: int) -> dict:
    """One text, its mask, and T5's inputs and targets without end-of-sequence."""
    tokens = tf.range(1000, 1000 + n)
    seeds = tf.constant([[seed, 1], [seed, 2]], tf.int32)
    mask = preprocessors.random_spans_noise_mask(n, density, seeds, mean)
    vocabulary = SizeOnly()
    inputs = preprocessors.noise_span_to_unique_sentinel(tokens, mask, vocabulary, seeds)
    targets = preprocessors.nonnoise_span_to_unique_sentinel(tokens, mask, vocabulary, seeds)
    return {
        "tokens": tokens.numpy().tolist(),
        "density": density,
        "mean": mean,
        "mask": mask.numpy().astype(int).tolist(),
        "inputs": inputs.numpy().tolist(),
        "targets": targets.numpy().tolist(),
    }


def main() -> None:
    """Writes span_corruption.json beside this file."""
    lengths = {
        f"{n},{density},{mean}": preprocessors.random_spans_helper(n, density, mean, 1, 1)
        for n, density, mean in [(512, 0.15, 3.0), (1024, 0.15, 3.0), (114, 0.15, 3.0)]
    }
    packages = ("t5", "tensorflow", "seqio")
    result = {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "samples": SAMPLES,
        "vocabulary_size": VOCABULARY_SIZE,
        "random_spans_helper": lengths,
        "settings": [statistics(*setting) for setting in SETTINGS],
        "examples": [
            example(n, density, mean, seed)
            for seed, (n, density, mean) in enumerate(
                [(1, 0.15, 3.0), (2, 0.15, 3.0), (20, 0.15, 3.0), (20, 0.5, 2.0), (40, 0.3, 3.0)]
            )
        ],
    }
    path = pathlib.Path(__file__).with_name("span_corruption.json")
    path.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    print(f"wrote {path} ({path.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
