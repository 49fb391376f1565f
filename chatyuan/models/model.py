"""From a configuration to functions of parameters."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from chatyuan.models.adapters import adapters_of
from chatyuan.models.config import ModelConfig
from chatyuan.models.encoder_decoder import EncoderDecoder
from chatyuan.models.initializers import Initializer
from chatyuan.models.language_model import LanguageModel
from chatyuan.models.prefix_lm import PrefixLM

Array = jax.Array
Params = dict[str, Any]

_CLASSES = {"encoder_decoder": EncoderDecoder, "prefix_lm": PrefixLM}


@dataclasses.dataclass(frozen=True)
class Model:
    """A model without parameters: hashable, allocates nothing, may be closed over by `jax.jit`.

    Parameters are a plain nested dict of float32 arrays, a checkpoint is exactly that dict; block
    parameters are stacked on axis 0 whether layers are scanned or not.
    """

    config: ModelConfig

    def init(self, key: Array, shardings: Params | None = None) -> Params:
        """Returns random parameters, T5X's initialisation, one by one on their devices.

        Args:
            key: PRNG key.
            shardings: tree of parameters with the `Sharding` of each, which changes no value.
        """
        skeleton = _skeleton(self.config)
        places = [None] * len(skeleton.names) if shardings is None else jax.tree.leaves(shardings)
        leaves, structure = jax.tree.flatten(skeleton.params)
        entries = zip(skeleton.initializers, skeleton.names, leaves, places, strict=True)
        return structure.unflatten(
            initializer.draw(key, name, leaf.shape, place)
            for initializer, name, leaf, place in entries
        )

    def init_adapters(self, key: Array, shardings: Params | None = None) -> Params:
        """Returns the adapters of `init` alone; arguments as there, of the adapters."""
        skeleton = _skeleton(self.config)
        shapes = adapters_of(skeleton.params)
        order = {name: place for place, name in enumerate(skeleton.names)}
        leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
        places = [None] * len(leaves) if shardings is None else jax.tree.leaves(shardings)
        drawn = []
        for (path, leaf), place in zip(leaves, places, strict=True):
            name = "/".join(part.key for part in path)
            initializer = skeleton.initializers[order[name]]
            drawn.append(initializer.draw(key, name, leaf.shape, place))
        return structure.unflatten(drawn)

    def abstract_params(self) -> Params:
        """Returns the parameters as `jax.ShapeDtypeStruct`s."""
        return jax.tree.map(lambda leaf: leaf, _skeleton(self.config).params)

    def logical_axes(self) -> Params:
        """Returns the tree of parameters with, at each leaf, the tuple of its axis names."""
        skeleton = _skeleton(self.config)
        return jax.tree.structure(skeleton.params).unflatten(skeleton.axes)

    @property
    def num_params(self) -> int:
        """The number of trained values."""
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.abstract_params()))

    def bind(self, params: Params) -> LanguageModel:
        """Returns the module with these parameters (arrays or tracers)."""
        return nnx.merge(_skeleton(self.config).graph, params)


def build(config: ModelConfig) -> Model:
    """Returns the model of a configuration."""
    return Model(config)


class _Skeleton(NamedTuple):
    """A model without values; the lists are in the order of the leaves of `params`."""

    graph: Any
    params: Params  # of ShapeDtypeStructs
    names: list[str]
    axes: list[tuple[str, ...]]
    initializers: list[Initializer]


@functools.lru_cache(maxsize=64)
def _skeleton(config: ModelConfig) -> _Skeleton:
    graph, state = nnx.split(_CLASSES[config.architecture](config))
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    variables = nnx.to_pure_dict(state, lambda variable: variable)
    flat, structure = jax.tree_util.tree_flatten_with_path(variables, is_leaf=is_variable)
    return _Skeleton(
        graph,
        structure.unflatten(variable.get_value() for _, variable in flat),
        ["/".join(key.key for key in path) for path, _ in flat],
        [variable.get_metadata("out_sharding") for _, variable in flat],
        [variable.get_metadata("initializer") for _, variable in flat],
    )
