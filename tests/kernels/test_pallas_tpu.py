"""The TPU kernels, interpreted: against the reference, for races, in memory; lowered and compiled.

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
import test_blocked as shared
from jax.experimental.pallas import tpu as pltpu

from chatyuan.errors import UserError
from chatyuan.kernels import (
    AlibiBias,
    AttentionMask,
    BlockSizes,
    DenseBias,
    RelativePositionBias,
    dot_product_attention,
)
from chatyuan.kernels.pallas_tpu import pallas_tpu_attention

ROOT = pathlib.Path(__file__).resolve().parents[2]
BLOCKS = {
    "t5_two_sided": "16x16",
    "t5_one_sided_grouped": "32x16",
    "t5_together": "16x32",
    "alibi_multi_query": "16x64",
    "none": "32x16",
}


@pytest.fixture
def door(monkeypatch):
    """Lets the shared tests name "pallas_tpu:QUERIESxKEYS"."""

    def attention(query, key, value, *, implementation, block_sizes, **arguments):
        name, _, blocks = implementation.partition(":")
        if name != "pallas_tpu":
            arguments |= {"implementation": name, "block_sizes": block_sizes}
            return dot_product_attention(query, key, value, **arguments)
        sizes = BlockSizes(*map(int, blocks.split("x")))
        return pallas_tpu_attention(
            query, key, value, block_sizes=sizes, interpret=True, **arguments
        )

    monkeypatch.setattr(shared, "dot_product_attention", attention)


@pytest.mark.parametrize("name", list(BLOCKS))
def test_outputs_and_gradients_are_the_references(name, door):
    shared.test_outputs_and_gradients_are_the_references(name, f"pallas_tpu:{BLOCKS[name]}")


@pytest.mark.parametrize("name", ["t5_two_sided", "none"])
def test_bfloat16_errs_at_most_twice_as_much_as_the_reference(name, door):
    case = shared.CASES[name]
    interval = AttentionMask(causal=True).intervals(shared.B, case.q_len, case.kv_len)
    exact = shared.compiled(name, "reference")(*interval, 5)
    theirs = shared.compiled(name, "reference", "bfloat16")(*interval, 5)
    ours = shared.compiled(name, f"pallas_tpu:{BLOCKS[name]}", "bfloat16")(*interval, 5)
    for got, rounded, want in zip(ours, theirs, exact, strict=True):
        bound = 2 * np.abs(rounded - want).max() + 1e-3 * np.abs(want).max()
        assert np.abs(got - want).max() <= bound


def test_two_runs_are_bitwise_equal(door):
    case = shared.CASES["t5_two_sided"]
    interval = AttentionMask(causal=True).intervals(shared.B, case.q_len, case.kv_len)
    call = shared.compiled("t5_two_sided", f"pallas_tpu:{BLOCKS['t5_two_sided']}")
    for first, second in zip(call(*interval, 3), call(*interval, 3), strict=True):
        np.testing.assert_array_equal(first, second)


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


def interpreted(*operands, **arguments):
    return pallas_tpu_attention(*operands, interpret=True, **arguments)


def test_no_value_has_as_many_elements_as_there_are_scores():
    length = 4096
    function, arguments = gradients(pallas_tpu_attention, length=length)
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    assert shared.largest_value(jaxpr) <= length**2 // 16


def test_temporary_memory_grows_linearly():
    def temporary(attention, length):
        function, arguments = gradients(attention, length=length, bias="t5")
        memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
        return memory.temp_size_in_bytes

    assert temporary(interpreted, 8192) <= 4.2 * temporary(interpreted, 2048)


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
        shared.close(np.asarray(got), np.asarray(want), 1e-6)


def test_what_kernels_cannot_do_is_refused():
    x = jnp.zeros((1, 256, 1, 8), jnp.float32)
    table = jnp.zeros((1, 32), jnp.float32)
    call = lambda **more: pallas_tpu_attention(  # noqa: E731
        x, x, x, **({"mask": None, "bias": None, "scale": 1.0} | more)
    )
    with pytest.raises(UserError, match=r"array of shape \(1, 256, 256\).*implementation='xla'"):
        call(bias=DenseBias(jnp.zeros((1, 256, 256))))
    with pytest.raises(UserError, match="block of 64 .* multiple of 128"):
        call(block_sizes=BlockSizes(64, 128))
    long = jnp.zeros((1, 8192, 1, 8), jnp.float32)
    with pytest.raises(UserError, match="127 tiles.*smaller max_distance"):
        pallas_tpu_attention(
            long, long, long, mask=None, scale=1.0,
            bias=RelativePositionBias(table, True, max_distance=8192),
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
def test_libtpu_compiles_the_kernels():
    """In a process of its own: libtpu reads its settings when jax starts."""
    command = [sys.executable, str(ROOT / "benchmarks" / "tpu_compile.py"), "--json", "--no_record"]
    command += ["--lengths", "512", "--head_dims", "64", "--kinds", "t5_grouped"]
    answer = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    assert len(answer) == 4 and all(case["error"] is None for case in answer), answer
    assert all(0 < size < 2**24 for case in answer for size in case["vmem"].values()), answer
