"""Adapters in a tree of parameters: low-rank matrices beside frozen ones (LoRA, arXiv:2106.09685).

A model whose `ModelConfig.adapter_rank` is above 0 holds `adapter_in` [in, r] and `adapter_out`
[r, out] beside each `kernel` of its blocks (`models.layers.Linear`). Trees here are nested dicts,
of arrays or of anything that stands for them; a subtree without what is asked for is left out.
"""

from typing import Any

import jax.numpy as jnp

from chatyuan.models.config import ModelConfig

NAMES = ("adapter_in", "adapter_out")
Tree = Any


def adapters_of(params: Tree) -> Tree:
    """Returns the adapters alone."""
    return _picked(params, lambda name: name in NAMES)


def without_adapters(params: Tree) -> Tree:
    """Returns everything else."""
    return _picked(params, lambda name: name not in NAMES)


def _picked(tree: Tree, wanted: Any) -> Tree:
    found = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            inner = _picked(value, wanted)
            if inner:
                found[name] = inner
        elif wanted(name):
            found[name] = value
    return found


def joined(params: Tree, adapters: Tree) -> Tree:
    """Returns `params` with these adapters in the place of its own."""
    new = dict(params)
    for name, value in adapters.items():
        new[name] = joined(params.get(name, {}), value) if isinstance(value, dict) else value
    return new


def merged(params: Tree, config: ModelConfig) -> Tree:
    """Returns the parameters of the same function without adapters: kernel + scale * in @ out.

    Args:
      params: with adapters.
      config: of the model with adapters.
    """
    new = {}
    for name, value in params.items():
        if isinstance(value, dict):
            new[name] = merged(value, config)
        elif name == "kernel" and NAMES[0] in params:
            low, high = (params[part] for part in NAMES)
            new[name] = value + config.adapter_scale * jnp.matmul(low, high, precision="highest")
        elif name not in NAMES:
            new[name] = value
    return new
