"""From a configuration to functions of parameters."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
from flax import nnx

from chatyuan.models.config import ModelConfig
from chatyuan.models.encoder_decoder import EncoderDecoder
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

    def init(self, key: Array) -> Params:
        """Returns random parameters, T5X's initialisation."""
        module = _CLASSES[self.config.architecture](key, self.config)
        return nnx.to_pure_dict(nnx.split(module)[1])

    def abstract_params(self) -> Params:
        """Returns the parameters as `jax.ShapeDtypeStruct`s."""
        return jax.tree.map(lambda leaf: leaf, _skeleton(self.config)[1])

    def logical_axes(self) -> Params:
        """Returns the tree of parameters with, at each leaf, the tuple of its axis names."""
        return jax.tree.map(
            lambda axes: axes, _skeleton(self.config)[2], is_leaf=lambda x: isinstance(x, tuple)
        )

    @property
    def num_params(self) -> int:
        """The number of trained values."""
        return sum(int(np.prod(x.shape)) for x in jax.tree.leaves(self.abstract_params()))

    def bind(self, params: Params) -> LanguageModel:
        """Returns the module with these parameters (arrays or tracers)."""
        return nnx.merge(_skeleton(self.config)[0], params)


def build(config: ModelConfig) -> Model:
    """Returns the model of a configuration."""
    return Model(config)


@functools.lru_cache(maxsize=64)
def _skeleton(config: ModelConfig) -> tuple[Any, Params, Params]:
    """Returns (graph definition, abstract parameters, logical axes) by abstract evaluation."""
    found = {}

    def construct(key: Array) -> Params:
        graph, state = nnx.split(_CLASSES[config.architecture](key, config))
        found["graph"] = graph
        found["axes"] = jax.tree.map(
            lambda v: v.get_metadata("out_sharding"),
            state,
            is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
        )
        return nnx.to_pure_dict(state)

    abstract = jax.eval_shape(construct, jax.random.key(0))
    return found["graph"], abstract, _plain(found["axes"])


def _plain(state: Any) -> Any:
    """Returns nested mappings as plain dicts."""
    if isinstance(state, tuple):
        return state
    return {name: _plain(value) for name, value in state.items()}
