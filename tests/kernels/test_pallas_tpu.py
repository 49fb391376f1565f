"""What only the TPU kernels have to show: no races, and that they lower and compile.

Lowering for a TPU needs no TPU; compiling needs libtpu, which compiles for a described one.
"""

import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from chatyuan.errors import UserError
from chatyuan.kernels import (
    AlibiBias,
    AttentionMask,
    BlockSizes,
    DenseBias,
    RelativePositionBias,
    dot_product_attention,
    select_implementation,
)
from chatyuan.kernels.pallas_tpu import pallas_tpu_attention

ROOT = pathlib.Path(__file__).resolve().parents[2]
def gradients(attention, *, length, heads=2, kv_heads=2, head_dim=16, dtype="float32", bias="t5"):
    """Returns (loss and its gradients, specifications of their arguments)."""

    def loss(query, key, value, table, end):
        made = {
            "t5": lambda: RelativePositionBias(table, True),
            "alibi": lambda: AlibiBias(table[:, 0]),
            "none": lambda: None,
        }[bias]()
        out = attention(
            query, key, value, mask=AttentionMask(causal=True, key_end=end), bias=made, scale=1.0
        )
        return jnp.sum(out.astype(jnp.float32) ** 2)

    query = jax.ShapeDtypeStruct((1, length, heads, head_dim), dtype)
    key = jax.ShapeDtypeStruct((1, length, kv_heads, head_dim), dtype)
    table = jax.ShapeDtypeStruct((heads, 32), jnp.float32)
    end = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return jax.value_and_grad(loss, argnums=(0, 1, 2, 3)), (query, key, key, table, end)


@pytest.mark.parametrize("bias", ["t5", "alibi", "none"])
def test_kernels_lower_for_a_tpu(bias):
    calls = (("float32", 4, 128), ("float32", 2, 64), ("bfloat16", 4, 64), ("bfloat16", 1, 128))
    for dtype, kv_heads, head_dim in calls:
        function, arguments = gradients(
            pallas_tpu_attention, length=640, heads=4, kv_heads=kv_heads, head_dim=head_dim,
            dtype=dtype, bias=bias,
        )  # fmt: skip
        text = jax.jit(function).trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
        assert text.count("tpu_custom_call") == 3, "the output, the query side and the key side"


def test_memory_is_written_before_it_is_read_and_by_one_step_at_a_time():
    rng = np.random.default_rng(0)
    checking = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    operands = (draw(1, 20, 2, 8), draw(1, 24, 1, 8), draw(1, 24, 1, 8), draw(2, 8))
    mask = AttentionMask(key_start=np.arange(20)[None] - 2, key_end=np.arange(20)[None] * 2)

    def loss(query, key, value, table, **arguments):
        bias = RelativePositionBias(table, True, max_distance=8)
        sizes = BlockSizes(16, 16)
        out = pallas_tpu_attention(
            query, key, value, mask=mask, bias=bias, scale=0.5, block_sizes=sizes, **arguments
        )
        return jnp.sum(out**2)

    ours, theirs = (
        jax.grad(lambda *xs, how=how: loss(*xs, interpret=how), argnums=(0, 1, 2, 3))(*operands)
        for how in (checking, True)
    )
    for got, want in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6 * max(1.0, float(jnp.abs(want).max())))


def test_what_kernels_cannot_do_is_refused():
    def call(length, **more):
        x = jnp.zeros((1, length, 1, 8), jnp.float32)
        return dot_product_attention(
            x, x, x, scale=1.0, implementation="pallas_tpu", interpret=True, **more
        )

    with pytest.raises(UserError, match="a DenseBias is an array"):
        call(256, bias=DenseBias(jnp.zeros((1, 256, 256))))
    with pytest.raises(UserError, match="block of 192 .* multiple of 128"):
        call(256, block_sizes=BlockSizes(192, 128))
    far = RelativePositionBias(jnp.zeros((1, 32)), True, max_distance=8192)
    with pytest.raises(UserError, match="32 tiles.*needs 127: its max_distance"):
        call(8192, bias=far)
    name, reason = select_implementation(platform="tpu", q_len=8192, kv_len=8192, bias=far)
    assert name == "xla" and "not pallas_tpu: it holds 32 tiles" in reason


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_compiles_the_kernels():
    """In a process of its own: libtpu reads its settings when jax starts."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tpu_compile.py"), "--json", "--no_record"]
    command += ["--lengths", "512", "--head_dims", "64", "--kinds", "t5_grouped"]
    answer = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    assert len(answer) == 4 and all(case["error"] is None for case in answer), answer
    assert all(0 < size < 2**24 for case in answer for size in case["vmem"].values()), answer
