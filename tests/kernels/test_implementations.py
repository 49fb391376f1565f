"""Every implementation against the reference over drawn masks; memory of those in blocks; choice.

Masks are run-time data, so hundreds of them run on the few programs that CASES compiles.
"""

import dataclasses
import functools
import re

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
from chatyuan.kernels.block_sizes import BLOCK_SIZES, block_sizes_for
from chatyuan.kernels.cudnn import cudnn_attention
from chatyuan.kernels.pallas_gpu import pallas_gpu_attention
from chatyuan.kernels.reference import reference_attention

B, N, H, BUCKETS = 2, 4, 8, 8
# Those that a CPU runs, Pallas kernels as ordinary operations.
IN_BLOCKS = ["xla", "pallas_gpu", "pallas_tpu"]
TESTED = ["dense", *IN_BLOCKS]


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


def how(implementation, blocks=None):
    """Options of a call."""
    return {
        "implementation": implementation,
        "interpret": implementation.startswith("pallas"),
        "block_sizes": blocks if implementation in IN_BLOCKS else None,
    }


def expressible(names, implementations):
    """Pairs of a case and an implementation: Pallas kernels refuse arrays."""
    return [
        (name, implementation)
        for implementation in implementations
        for name in names
        if not (implementation.startswith("pallas") and CASES[name].bias == "array")
    ]


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

    def loss(operands, start, end, weight):
        query, key, value, table, array = operands
        out = dot_product_attention(
            query,
            key,
            value,
            mask=AttentionMask(key_start=start, key_end=end),
            bias=make_bias(case.bias, table, array),
            scale=0.7,
            **how(implementation, case.blocks),
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


@pytest.mark.parametrize(("name", "implementation"), expressible(CASES, TESTED))
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


@pytest.mark.parametrize(
    ("name", "implementation"), expressible(["t5_two_sided", "array_together"], IN_BLOCKS)
)
def test_two_runs_are_bitwise_equal(name, implementation):
    case = CASES[name]
    mask = AttentionMask(causal=True, window=30)
    interval = mask.intervals(B, case.q_len, case.kv_len)
    once, again = (compiled(name, implementation)(*interval, 3) for _ in range(2))
    for first, second in zip(once, again, strict=True):
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("name", "implementation"), expressible(["t5_two_sided", "none"], IN_BLOCKS)
)
def test_bfloat16_errs_at_most_twice_as_much_as_the_reference(name, implementation):
    """The rule of the flash-attention papers; both are compared with the float32 reference.

    1e-3 of the largest value is added: where the reference happens to round well, nothing is wrong.
    """
    case = CASES[name]
    interval = AttentionMask(causal=True).intervals(B, case.q_len, case.kv_len)
    exact = compiled(name, "reference")(*interval, 5)
    theirs = compiled(name, "reference", "bfloat16")(*interval, 5)
    ours = compiled(name, implementation, "bfloat16")(*interval, 5)
    for got, rounded, want in zip(ours, theirs, exact, strict=True):
        bound = 2 * np.abs(rounded - want).max() + 1e-3 * np.abs(want).max()
        assert np.abs(got - want).max() <= bound


# ----------------------------------------------------------------------------------------- memory


def long_call(implementation, length, heads):
    """Gradients of packed causal self-attention with T5's bias at one row."""
    spec = jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32)
    table = jax.ShapeDtypeStruct((heads, 32), jnp.float32)
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(query, key, value, table, segments):
        mask = AttentionMask(causal=True, query_segment_ids=segments, key_segment_ids=segments)
        bias = RelativePositionBias(table, True)
        mask, bias = prepare(
            mask, bias, batch=1, q_len=length, kv_len=length, implementation=implementation
        )
        out = dot_product_attention(
            query, key, value, mask=mask, bias=bias, scale=1.0, **how(implementation)
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


@pytest.mark.parametrize("implementation", IN_BLOCKS)
def test_no_value_has_as_many_elements_as_there_are_scores(implementation):
    length = 4096
    largest = {}
    for name in (implementation, "dense"):
        function, arguments = long_call(name, length, heads=2)
        largest[name] = largest_value(jax.make_jaxpr(function)(*arguments).jaxpr)
    assert largest["dense"] >= length**2, "the walk sees inside the custom derivative"
    assert largest[implementation] <= length**2 // 16


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


@functools.cache
def temporary_bytes(implementation, length):
    function, arguments = long_call(implementation, length, heads=8)
    memory = jax.jit(function).lower(*arguments).compile().memory_analysis()
    return memory.temp_size_in_bytes


@pytest.mark.parametrize("implementation", IN_BLOCKS)
def test_temporary_memory_grows_linearly(implementation):
    medium, long = (temporary_bytes(implementation, length) for length in (2048, 8192))
    assert long <= 4.2 * medium
    assert temporary_bytes(implementation, 4096) <= temporary_bytes("dense", 4096) / 20


# --------------------------------------------------------------------------------------- lowering


@pytest.mark.parametrize(
    ("dtype", "bias", "kv_heads", "head_dim"),
    [
        ("float32", "two_sided", 2, 64),
        ("bfloat16", "one_sided", 4, 64),
        ("bfloat16", "alibi", 1, 128),
        ("float16", "none", 2, 80),
        ("float32", "none", 4, 256),
    ],
)
def test_gpu_kernels_lower_for_cuda(dtype, bias, kv_heads, head_dim):
    """Lowered, not compiled: Triton sees them only where a GPU is."""
    length = 1000
    query = jax.ShapeDtypeStruct((B, length, N, head_dim), dtype)
    key = jax.ShapeDtypeStruct((B, length, kv_heads, head_dim), dtype)
    table = jax.ShapeDtypeStruct((N, 32), jnp.float32)
    blocks = block_sizes_for(
        "pallas_gpu", device_kind="NVIDIA H100 80GB HBM3", head_dim=head_dim, dtype=dtype
    )

    def forward(query, key, value, table):
        mask = AttentionMask(causal=True, window=500)
        options = {"mask": mask, "bias": make_bias(bias, table, None), "scale": 1.0}
        return pallas_gpu_attention(query, key, value, **options, block_sizes=blocks)

    def loss(*operands):
        return jnp.sum(forward(*operands).astype(jnp.float32) ** 2)

    backward = jax.grad(loss, argnums=(0, 1, 2, 3))
    for function, kernels in ((forward, 1), (backward, 3 if bias == "none" else 4)):
        lowered = jax.jit(function).trace(query, key, key, table)
        text = lowered.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("xla.gpu.triton") == kernels
        assert f"{length}x{length}x" not in text and "1024x1024x" not in text


# ------------------------------------------------------------------------------------------- door


BIAS = RelativePositionBias(np.zeros((N, 32), np.float32), True)
SEGMENTS = np.ones((1, 512), np.int32)
PACKED = AttentionMask(query_segment_ids=SEGMENTS, key_segment_ids=SEGMENTS)
LONG = {"q_len": 512, "kv_len": 512, "dtype": "bfloat16"}


@pytest.mark.parametrize(
    ("call", "name", "reason"),
    [
        (
            {"platform": "cpu", "q_len": 512, "kv_len": 512},
            "dense",
            "512 queries x 512 keys on cpu",
        ),
        ({"platform": "cpu", "q_len": 1, "kv_len": 16384}, "dense", "fit in memory"),
        ({"platform": "cpu", "q_len": 4096, "kv_len": 2048}, "xla", "computed in blocks"),
        ({"platform": "gpu", **LONG}, "cudnn", "512 queries x 512 keys on gpu"),
        ({"platform": "gpu", **LONG, "mask": AttentionMask(causal=True)}, "cudnn", ""),
        ({"platform": "gpu", **LONG, "mask": PACKED}, "pallas_gpu", "not cudnn.*query_segment_ids"),
        ({"platform": "gpu", **LONG, "dtype": "float32"}, "pallas_gpu", "not cudnn.*float32"),
        ({"platform": "gpu", **LONG, "head_dim": 256}, "pallas_gpu", "head_dim.*256"),
        ({"platform": "gpu", **LONG, "bias": BIAS}, "pallas_gpu", "RelativePositionBias.*array"),
        ({"platform": "gpu", **LONG, "dtype": "float64"}, "dense", "not pallas_gpu.*float64"),
        ({"platform": "gpu", **LONG, "bias": DenseBias(np.zeros(0))}, "dense", "DenseBias"),
        ({"platform": "gpu", "q_len": 1, "kv_len": 4096, "bias": BIAS}, "dense", ""),
        ({"platform": "gpu", "q_len": 64, "kv_len": 64}, "dense", ""),
        (
            {"platform": "gpu", "q_len": 4096, "kv_len": 4096, "bias": DenseBias(np.zeros(0))},
            "xla",
            "DenseBias",
        ),
        ({"platform": "tpu", **LONG, "bias": BIAS, "mask": PACKED}, "pallas_tpu", "on tpu"),
        ({"platform": "tpu", **LONG, "bias": DenseBias(np.zeros(0))}, "dense", "not pallas_tpu"),
        ({"platform": "tpu", "q_len": 1, "kv_len": 4096}, "dense", ""),
        ({"platform": "METAL", "q_len": 4096, "kv_len": 4096}, "xla", "on METAL"),
    ],
)
def test_choice_follows_the_call(call, name, reason):
    got, why = select_implementation(**call)
    assert got == name
    assert re.search(reason, why), why
    assert select_implementation("dense", **call) == ("dense", "named by the caller")


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_prepare_keeps_the_table_where_no_array_is_needed(platform, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    bias = RelativePositionBias(jnp.zeros((N, BUCKETS), jnp.float32), True)
    lengths = {"batch": B, "q_len": 200, "kv_len": 200}
    chosen = RelativePositionBias if platform == "gpu" else DenseBias
    for name, kind in (
        (None, chosen),
        ("dense", DenseBias),
        ("xla", RelativePositionBias),
        ("pallas_gpu", RelativePositionBias),
        ("pallas_tpu", RelativePositionBias),
    ):
        mask = AttentionMask(causal=True, window=3)
        mask, got = prepare(mask, bias, **lengths, implementation=name)
        assert isinstance(got, kind)
        assert mask.key_start.shape == mask.key_end.shape == (B, 200)
    # Decoding: the bias of one query is a row.
    assert isinstance(prepare(None, bias, batch=B, q_len=1, kv_len=200)[1], DenseBias)
    # cuDNN knows these by name only.
    plain = AttentionMask(causal=True, key_lengths=jnp.full((B,), 7))
    assert prepare(plain, None, **lengths)[0] is plain


def refused(match, dtype="float32", **call):
    x = jnp.zeros((1, 4, 1, 8), dtype)
    with pytest.raises(UserError, match=match):
        dot_product_attention(x, x, x, scale=1.0, **call)


def test_a_named_implementation_never_falls_back(monkeypatch):
    refused("'pallas_gpu' cannot.*needs a gpu, this is a cpu.*'xla'", implementation="pallas_gpu")
    refused("'pallas_tpu' cannot.*needs a tpu, this is a cpu", implementation="pallas_tpu")
    refused("'cudnn' cannot.*needs a gpu, this is a cpu", implementation="cudnn")
    kernel = {"implementation": "pallas_gpu", "interpret": True}
    refused("by distance.*DenseBias is an array", bias=DenseBias(jnp.zeros((1, 4, 4))), **kernel)
    refused("power of two from 16", block_sizes=BlockSizes(48, 16), **kernel)
    refused("power of two from 16", block_sizes=BlockSizes(16, 8), **kernel)
    refused("'xla'.*no Pallas kernel", implementation="xla", interpret=True)
    refused("all be float32, bfloat16, float16, not int8", dtype="int8", **kernel)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    half = {"dtype": "bfloat16", "implementation": "cudnn"}
    refused("'pallas_tpu' cannot.*needs a tpu, this is a gpu", implementation="pallas_tpu")
    refused("bfloat16 or float16, not float32", implementation="cudnn")
    refused("RelativePositionBias as an array", bias=BIAS, **half)
    for name in ("key_start", "key_end"):
        refused(f"the mask sets {name}", mask=AttentionMask(**{name: jnp.zeros((1, 4))}), **half)
    refused("the mask sets window", mask=AttentionMask(causal=True, window=2), **half)
    wide = {"platform": "gpu", "q_len": 512, "kv_len": 512, "head_dim": 288}
    assert "head_dim must be at most 256, not 288" in select_implementation(**wide)[1]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [None, [0, 11]])
def test_cudnn_is_asked_for_the_same_attention(causal, lengths, monkeypatch):
    """jax.nn's XLA form takes the same arguments, and cuDNN's place here."""
    asked = jax.nn.dot_product_attention

    def in_its_place(*operands, implementation, **options):
        assert implementation == "cudnn"
        return asked(*operands, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", in_its_place)
    lengths = None if lengths is None else jnp.asarray(lengths)
    mask = AttentionMask(causal=causal, key_lengths=lengths)
    rng = np.random.default_rng(0)
    operands = [jnp.asarray(rng.normal(size=(2, 16, heads, H)), jnp.float32) for heads in (4, 2, 2)]

    def call(function, *operands):
        out = function(*operands, mask=mask, bias=None, scale=0.3)
        return jnp.sum(out**3), out

    ours, theirs = (
        jax.grad(functools.partial(call, function), argnums=(0, 1, 2), has_aux=True)(*operands)
        for function in (cudnn_attention, reference_attention)
    )
    jax.tree.map(lambda a, b: close(np.asarray(a), np.asarray(b), 1e-5), ours, theirs)


# ------------------------------------------------------------------------------------ block sizes


def test_blocks_belong_to_those_that_have_them():
    refused(
        "'dense'.*has no blocks.*xla, pallas_gpu",
        implementation="dense",
        block_sizes=BlockSizes(16, 16),
    )


def test_every_call_finds_its_block_sizes():
    find = functools.partial(block_sizes_for, head_dim=64, dtype="float32")
    assert not find("xla", device_kind="cpu").together
    assert find("xla", device_kind="NVIDIA H100 80GB HBM3").together
    single = BLOCK_SIZES["pallas_gpu", None, 64, "float32"]
    assert find("pallas_gpu", device_kind="NVIDIA A100") is single
    large = block_sizes_for(
        "pallas_gpu", device_kind="NVIDIA H100 80GB HBM3", head_dim=128, dtype="bfloat16"
    )
    assert large is BLOCK_SIZES["pallas_gpu", "NVIDIA H", 128, None]
    with pytest.raises(KeyError, match="no block sizes of 'dense'"):
        find("dense", device_kind="cpu")
    for name, *entry in BLOCK_SIZES:
        assert find(name, device_kind="another"), entry
