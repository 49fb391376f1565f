"""Every implementation against the reference over drawn masks; memory of the blocked one.

Masks are run-time data, so hundreds of them run on the few programs that CASES compiles.
"""

import dataclasses
import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from chatyuan.errors import UserError
from chatyuan.kernels import (
    AlibiBias,
    AttentionMask,
    BlockSizes,
    DenseBias,
    RelativePositionBias,
    dot_product_attention,
    prepare,
    select_implementation,
)
from chatyuan.kernels.block_sizes import block_sizes_for

B, N, H, BUCKETS = 2, 4, 8, 8


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled program: lengths, key heads, kind of bias and blocks."""

    q_len: int
    kv_len: int
    kv_heads: int
    bias: str
    blocks: BlockSizes


CASES = {
    "t5_two_sided": Case(48, 48, 4, "two_sided", BlockSizes(16, 16)),
    "t5_one_sided_grouped": Case(40, 40, 2, "one_sided", BlockSizes(32, 32)),
    "t5_together": Case(24, 56, 2, "two_sided", BlockSizes(32, 16, together=True)),
    "alibi_multi_query": Case(24, 56, 1, "alibi", BlockSizes(64, 16)),
    "array_together": Case(20, 40, 2, "array", BlockSizes(32, 16, together=True)),
    "array": Case(20, 40, 4, "array", BlockSizes(16, 32)),
    "none": Case(33, 65, 4, "none", BlockSizes(16, 16)),
}


def make_bias(kind, table, array):
    return {
        "two_sided": lambda: RelativePositionBias(table, True, max_distance=24),
        "one_sided": lambda: RelativePositionBias(table, False, max_distance=24),
        "alibi": lambda: AlibiBias(jnp.abs(table[:, 0])),
        "array": lambda: DenseBias(array),
        "none": lambda: None,
    }[kind]()


@functools.cache
def compiled(name, implementation, dtype="float32"):
    """(start, end, seed) -> the output and the gradients of query, key, value, table, array."""
    case = CASES[name]
    blocks = case.blocks if implementation == "xla" else None

    def loss(operands, start, end, weight):
        query, key, value, table, array = operands
        out = dot_product_attention(
            query,
            key,
            value,
            mask=AttentionMask(key_start=start, key_end=end),
            bias=make_bias(case.bias, table, array),
            scale=0.7,
            implementation=implementation,
            block_sizes=blocks,
        )
        assert out.dtype == value.dtype
        return jnp.sum(out.astype(jnp.float32) * weight), out

    function = jax.jit(jax.grad(loss, has_aux=True))

    def call(start, end, seed, shift=0.0):
        rng = np.random.default_rng(seed)
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
        query = draw(B, case.q_len, N, H).astype(dtype)
        key, value = (draw(B, case.kv_len, case.kv_heads, H).astype(dtype) for _ in range(2))
        table = draw(N, BUCKETS) + np.float32(shift)
        operands = (query, key, value, table, draw(N, case.q_len, case.kv_len))
        gradients, out = function(operands, start, end, draw(B, case.q_len, N, H))
        return [np.asarray(x, np.float32) for x in (out, *gradients)]

    return call


@st.composite
def intervals(draw, case):
    """key_start, key_end of one of the kinds of mask, and of none at all."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q_len, kv_len = case.q_len, case.kv_len
    kinds = ["free", "packed", "cross", "window", "prefix_lengths", "empty", "full"]
    kind = draw(st.sampled_from(kinds + ["prefix_tokens"] * (q_len == kv_len)))

    def segments(length):
        ids = np.sort(rng.integers(1, 5, (B, length)), axis=1)
        padding = np.arange(length) >= rng.integers(0, length + 1, (B, 1))
        return np.where(padding, 0, ids).astype(np.int32)

    if kind == "free":
        start = rng.integers(0, kv_len, (B, q_len))
        end = np.clip(start + rng.integers(-4, kv_len, (B, q_len)), 0, kv_len)
        return start.astype(np.int32), end.astype(np.int32)
    if kind in ("packed", "cross", "prefix_tokens"):
        queries = segments(q_len)
        keys = queries if q_len == kv_len else segments(kv_len)
        options = {"query_segment_ids": queries, "key_segment_ids": keys}
        if kind == "packed":
            options["causal"] = True
        elif kind == "prefix_tokens":
            rank = np.stack([np.arange(q_len) - np.searchsorted(row, row) for row in queries])
            kinds = (rank < rng.integers(0, 12)).astype(np.int32)
            kinds[rng.integers(0, B)] = rng.choice([1, 2])
            options["prefix_tokens"] = kinds
        mask = AttentionMask(**options)
    elif kind == "window":
        mask = AttentionMask(causal=bool(rng.integers(2)), window=int(rng.integers(0, 20)))
    elif kind == "prefix_lengths":
        lengths = rng.integers(0, kv_len + 1, B).astype(np.int32)
        mask = AttentionMask(causal=True, prefix_lengths=lengths)
    else:
        value = 0 if kind == "empty" else kv_len
        mask = AttentionMask(key_end=np.full((B, q_len), value, np.int32))
    return tuple(np.asarray(x) for x in mask.intervals(B, q_len, kv_len))


def close(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * max(1.0, np.abs(want).max()))


@pytest.mark.parametrize("implementation", ["dense", "xla"])
@pytest.mark.parametrize("name", list(CASES))
def test_outputs_and_gradients_are_the_references(name, implementation):
    case = CASES[name]

    @hypothesis.settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @hypothesis.given(interval=intervals(case), seed=st.integers(0, 1000))
    def check(interval, seed):
        got = compiled(name, implementation)(*interval, seed)
        want = compiled(name, "reference")(*interval, seed)
        for ours, theirs in zip(got, want, strict=True):
            assert np.isfinite(ours).all()
            close(ours, theirs, 1e-5)
        sees = interval[1] > interval[0]
        np.testing.assert_array_equal(got[0][~sees], 0.0)
        np.testing.assert_array_equal(got[1][~sees], 0.0)
        if case.bias in ("two_sided", "one_sided"):
            np.testing.assert_allclose(got[4].sum(axis=1), 0.0, atol=1e-5 * (1 + abs(got[4]).max()))
            shifted = compiled(name, implementation)(*interval, seed, shift=3.0)
            close(shifted[0], got[0], 1e-5)
            close(shifted[4], got[4], 2e-5)

    check()


@pytest.mark.parametrize("name", ["t5_two_sided", "array_together"])
def test_two_runs_are_bitwise_equal(name):
    case = CASES[name]
    mask = AttentionMask(causal=True, window=30)
    interval = mask.intervals(B, case.q_len, case.kv_len)
    once, again = (compiled(name, "xla")(*interval, 3) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("name", ["t5_two_sided", "none"])
def test_bfloat16_errs_at_most_twice_as_much_as_the_reference(name):
    """The rule of the flash-attention papers; both are compared with the float32 reference.

    1e-3 of the largest value is added: where the reference happens to round well, nothing is wrong.
    """
    case = CASES[name]
    interval = AttentionMask(causal=True).intervals(B, case.q_len, case.kv_len)
    exact = compiled(name, "reference")(*interval, 5)
    theirs = compiled(name, "reference", "bfloat16")(*interval, 5)
    ours = compiled(name, "xla", "bfloat16")(*interval, 5)
    for got, rounded, want in zip(ours, theirs, exact, strict=True):
        bound = 2 * np.abs(rounded - want).max() + 1e-3 * np.abs(want).max()
        assert np.abs(got - want).max() <= bound


# ----------------------------------------------------------------------------------------- memory


def long_call(implementation, length):
    """Gradients of packed causal self-attention with T5's bias at one row and two heads."""
    spec = jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)
    table = jax.ShapeDtypeStruct((2, 32), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(query, key, value, table, segments):
        mask = AttentionMask(causal=True, query_segment_ids=segments, key_segment_ids=segments)
        bias = RelativePositionBias(table, True)
        mask, bias = prepare(
            mask, bias, batch=1, q_len=length, kv_len=length, implementation=implementation
        )
        out = dot_product_attention(
            query, key, value, mask=mask, bias=bias, scale=1.0, implementation=implementation
        )
        return jnp.sum(out**2)

    gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3))
    return gradient, (spec, spec, spec, table, segments)


def largest_value(jaxpr):
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [variable.aval.size for variable in equation.outvars]
        sizes += [largest_value(inner) for inner in jaxprs_in_params(equation.params)]
    return max(sizes)


def test_no_value_has_as_many_elements_as_there_are_scores():
    length = 4096
    largest = {}
    for name in ("xla", "dense"):
        function, arguments = long_call(name, length)
        largest[name] = largest_value(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert largest["dense"] >= length**2, "the walk sees inside the custom derivative"
    assert largest["xla"] <= length**2 // 16


def test_long_segments_compared_in_pieces_give_the_same_intervals():
    rng = np.random.default_rng(0)
    ids = np.sort(rng.integers(1, 6, (2, 1500)), axis=1)
    ids = np.where(np.arange(1500) >= np.array([[1400], [1500]]), 0, ids).astype(np.int32)
    queries = ids[:, ::7]
    mask = AttentionMask(query_segment_ids=queries, key_segment_ids=ids)
    start, end = (np.asarray(x) for x in mask.intervals(2, queries.shape[1], 1500))
    key = np.arange(1500)
    seen = (key >= start[..., None]) & (key < end[..., None])
    same = (queries[:, :, None] == ids[:, None, :]) & (queries[:, :, None] > 0)
    np.testing.assert_array_equal(seen, same)


def temporary_bytes(implementation, length):
    function, arguments = long_call(implementation, length)
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


def test_temporary_memory_grows_linearly():
    medium, long = temporary_bytes("xla", 2048), temporary_bytes("xla", 8192)
    assert long <= 4.2 * medium
    assert temporary_bytes("xla", 4096) <= temporary_bytes("dense", 4096) / 20


# ------------------------------------------------------------------------------------------- door


def test_choice_follows_the_call():
    choose = select_implementation
    assert choose(platform="cpu", q_len=512, kv_len=512)[0] == "dense"
    assert choose(platform="cpu", q_len=1, kv_len=16384)[0] == "dense"
    assert choose(platform="cpu", q_len=4096, kv_len=4096)[0] == "xla"
    assert choose(platform="gpu", q_len=8192, kv_len=8192)[0] == "xla"
    name, reason = choose(platform="cpu", q_len=4096, kv_len=2048)
    assert name == "xla" and "4096 queries x 2048 keys on cpu" in reason
    assert choose("dense", platform="cpu", q_len=4096, kv_len=4096)[0] == "dense"


def test_prepare_keeps_the_table_for_xla():
    bias = RelativePositionBias(jnp.zeros((N, BUCKETS), jnp.float32), True)
    for name, kind in (("xla", RelativePositionBias), ("dense", DenseBias)):
        got = prepare(None, bias, batch=B, q_len=4, kv_len=4, implementation=name)[1]
        assert isinstance(got, kind)


def test_blocks_belong_to_xla():
    x = jnp.zeros((1, 4, 1, 8), jnp.float32)
    with pytest.raises(UserError, match="'dense'.*has no blocks.*implementation='xla'"):
        dot_product_attention(
            x, x, x, scale=1.0, implementation="dense", block_sizes=BlockSizes(16, 16)
        )
    sizes = functools.partial(block_sizes_for, "xla", head_dim=64, dtype="float32")
    assert not sizes(device_kind="cpu").together
    assert sizes(device_kind="NVIDIA H100 80GB HBM3").together
