"""How a parameter starts: a distribution and a scale, drawn by one small program per shape.

One program for all parameters would take longer to compile than the training step: XLA compiles
the random bits of every array anew. Drawn one by one, parameters of one shape share a program, and
a model that fills its devices is never there twice.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

# The deviation of a unit normal cut at +-2.
_TRUNCATED_DEVIATION = 0.87962566103423978


@dataclasses.dataclass(frozen=True)
class Initializer:
    """A distribution, "normal", "truncated_normal", "uniform" or "ones", times a scale."""

    distribution: str
    scale: float = 1.0

    def draw(
        self,
        key: Array,
        name: str,
        shape: tuple[int, ...],
        sharding: jax.sharding.Sharding | None = None,
    ) -> Array:
        """Returns the float32 parameter `name` of a model whose key is `key`.

        The values depend on key, name, shape and nothing else: not on the sharding, nor on which
        other parameters there are.
        """
        if self.distribution == "ones":  # needs no program
            values = np.full(shape, self.scale, np.float32)
            if sharding is None:
                return jnp.array(values)
            return jax.make_array_from_callback(shape, sharding, values.__getitem__)
        program = _program(self.distribution, shape, sharding)
        return program(key, jnp.uint32(zlib.crc32(name.encode())), jnp.float32(self.scale))


def normal(standard_deviation: float) -> Initializer:
    """Returns the initialiser drawing normals."""
    return Initializer("normal", standard_deviation)


def truncated_normal(standard_deviation: float) -> Initializer:
    """Returns the initialiser drawing normals cut at twice their deviation, rescaled."""
    return Initializer("truncated_normal", standard_deviation)


def uniform(limit: float) -> Initializer:
    """Returns the initialiser drawing from [-limit, limit)."""
    return Initializer("uniform", limit)


def ones() -> Initializer:
    """Returns the initialiser of norm scales."""
    return Initializer("ones")


@functools.lru_cache(maxsize=1024)
def _program(
    distribution: str, shape: tuple[int, ...], sharding: jax.sharding.Sharding | None
) -> jax.stages.Wrapped:
    def draw(key: Array, name: Array, scale: Array) -> Array:
        key = jax.random.fold_in(key, name)
        if distribution == "normal":
            values = jax.random.normal(key, shape, jnp.float32)
        elif distribution == "truncated_normal":
            values = jax.random.truncated_normal(key, -2.0, 2.0, shape, jnp.float32)
            values /= jnp.float32(_TRUNCATED_DEVIATION)
        else:
            assert distribution == "uniform", distribution
            values = jax.random.uniform(key, shape, jnp.float32, -1.0, 1.0)
        return scale * values

    return jax.jit(draw, out_shardings=sharding)
