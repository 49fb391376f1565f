"""`linear` has the values and gradients of a plain product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from chatyuan.ops.matmul import linear


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 5, 3)])
def test_linear_equals_matmul(shape):
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, (3, 6)))
    target = jnp.asarray(rng.normal(size=(*shape[:-1], 6)), jnp.float32)

    def loss(product):
        return lambda x, w: jnp.sum(jnp.sin(product(x, w)) * target)

    got = jax.jit(jax.value_and_grad(loss(linear), argnums=(0, 1)))(x, w)
    want = jax.jit(jax.value_and_grad(loss(jnp.matmul), argnums=(0, 1)))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


def test_linear_can_sum_bfloat16_into_float32():
    x, w = jnp.ones((2, 300), jnp.bfloat16), jnp.ones((300, 2), jnp.bfloat16)
    out = linear(x, w, "float32")
    assert out.dtype == jnp.float32
    np.testing.assert_array_equal(out, 300.0)  # bfloat16 cannot hold 257
    dx, dw = jax.grad(lambda x, w: jnp.sum(linear(x, w, "float32")), argnums=(0, 1))(x, w)
    assert dx.dtype == dw.dtype == jnp.bfloat16
