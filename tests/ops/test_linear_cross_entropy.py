"""The chunked vocabulary loss against the one with the logits: sums, gradients, memory, mesh."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from chatyuan.ops.linear_cross_entropy import (
    linear_cross_entropy,
    token_log_probs,
    token_log_probs_and_entropies,
    token_loss_sum,
)
from chatyuan.ops.losses import cross_entropy
from chatyuan.sharding import make_mesh

ALL = {"z_loss": 1e-2, "max_z_loss": 2e-2, "label_smoothing": 0.1}
# Three chunks of 16 tokens, the last of which overlaps; two; one.
TOKENS, EMBED, VOCAB = (37,), 16, 61


def problem(shape=TOKENS, embed=EMBED, vocab=VOCAB, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(*shape, embed)), dtype)
    head = jnp.asarray(rng.normal(size=(embed, vocab)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, vocab, shape), jnp.int32)
    weights = jnp.asarray(rng.choice([0.0, 0.5, 1.0], shape), jnp.float32)
    return hidden, head, targets, weights


def naive_logits(hidden, head, soft_cap=None, norm_head=False):
    if norm_head:
        head = head / jnp.sqrt(jnp.sum(jnp.square(head), axis=0, keepdims=True))
    logits = jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32)
    return logits if soft_cap is None else soft_cap * jnp.tanh(logits / soft_cap)


def naive(hidden, head, targets, weights, *, soft_cap=None, norm_head=False, **terms):
    logits = naive_logits(hidden, head, soft_cap, norm_head)
    return cross_entropy(logits, targets, weights, **terms)


def with_gradients(loss, targets, hidden, head, weights):
    """All sums, and the gradients of `total` with a cotangent that is not 1."""

    def scaled(hidden, head, weights):
        sums = loss(hidden, head, targets, weights)
        return jnp.float32(0.7) * sums.total, sums

    return jax.value_and_grad(scaled, argnums=(0, 1, 2), has_aux=True)(hidden, head, weights)


@functools.cache
def compiled(function, **options):
    loss = functools.partial(function, **options)
    return jax.jit(functools.partial(with_gradients, loss))


def assert_close(found, expected, tolerance):
    """Every leaf, relative to its largest entry."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(np.abs(b).max(), 1e-6))


def compare(options, problem, tolerance=2e-6, chunk=16, mesh=None):
    hidden, head, targets, weights = problem
    arguments = targets, hidden, head, weights
    (_, sums), gradients = compiled(linear_cross_entropy, chunk_tokens=chunk, mesh=mesh, **options)(
        *arguments
    )
    (_, wanted_sums), wanted = compiled(naive, **options)(*arguments)
    assert_close(sums, wanted_sums, tolerance)
    assert_close(gradients, wanted, tolerance)


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    shape=st.sampled_from([(37,), (2, 16)]),
    options=st.sampled_from(
        [{}, {"z_loss": 1e-2}, {"max_z_loss": 2e-2, "label_smoothing": 0.2}, ALL]
    ),
    scale=st.sampled_from([0.1, 1.0, 5.0]),
    seed=st.integers(0, 2**16),
)
def test_sums_and_gradients_equal_those_with_logits(shape, options, scale, seed):
    hidden, *rest = problem(shape, seed=seed)
    compare(options, (hidden * scale, *rest))


@pytest.mark.parametrize("options", [{"soft_cap": 3.0}, {"norm_head": True}, None], ids=str)
def test_soft_cap_and_norm_head(options):
    options = options or {**ALL, "soft_cap": 2.0, "norm_head": True}
    for seed in range(3):
        compare(options, problem(seed=seed))


@pytest.mark.parametrize("chunk", [1, 36, None])
def test_any_chunk_gives_the_same(chunk):
    compare(ALL, problem(), chunk=chunk)


def test_a_vocabulary_of_several_blocks_of_columns():
    compare(ALL, problem((9,), embed=4, vocab=9001), chunk=8)


def test_bfloat16_is_as_close_to_float32_as_with_logits():
    hidden, head, targets, weights = problem(dtype=jnp.bfloat16)
    arguments = targets, hidden, head, weights
    exact = compiled(naive, **ALL)(targets, hidden.astype(jnp.float32), head, weights)
    ours = compiled(linear_cross_entropy, chunk_tokens=16, **ALL)(*arguments)
    theirs = compiled(naive, **ALL)(*arguments)
    for a, b, c in zip(*(jax.tree.leaves(x) for x in (ours, theirs, exact)), strict=True):
        assert a.dtype == b.dtype
        a, b, c = (np.asarray(x, np.float32) for x in (a, b, c))
        assert np.abs(a - c).max() <= 2 * np.abs(b - c).max() + 1e-5 * np.abs(c).max()
    assert ours[1][0].dtype == jnp.bfloat16 and ours[1][1].dtype == jnp.float32


def test_ties_count_as_correct_and_share_the_gradient_of_the_maximum():
    _, _, targets, weights = problem()
    hidden, head = jnp.ones((*TOKENS, EMBED)), jnp.ones((EMBED, VOCAB))
    compare(ALL, (hidden, head, targets, weights))
    sums = linear_cross_entropy(hidden, head, targets, weights, chunk_tokens=16)
    assert sums.correct == sums.weight == jnp.sum(weights)


def test_zero_weights_add_nothing():
    hidden, head, targets, _ = problem()
    zeros = jnp.zeros(TOKENS)
    (_, sums), (d_hidden, d_head, _) = compiled(linear_cross_entropy, chunk_tokens=16, **ALL)(
        targets, hidden, head, zeros
    )
    assert all(value == 0 for value in sums)
    assert not d_hidden.any() and not d_head.any()


def test_a_column_of_zeros_has_a_finite_gradient():
    hidden, head, targets, weights = problem()
    (_, sums), gradients = compiled(linear_cross_entropy, chunk_tokens=16, norm_head=True)(
        targets, hidden, head.at[:, 3].set(0.0), weights
    )
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((sums, gradients)))


@pytest.mark.parametrize("target", [-1, VOCAB])
def test_a_target_outside_the_vocabulary_is_loud(target):
    hidden, head, targets, weights = problem()
    targets = targets.at[5].set(target)
    assert np.isnan(linear_cross_entropy(hidden, head, targets, weights, chunk_tokens=16).total)
    log_probs = token_log_probs(hidden, head, targets, chunk_tokens=16)
    np.testing.assert_array_equal(np.isnan(log_probs), np.arange(len(targets)) == 5)


def test_only_the_total_carries_a_gradient():
    hidden, head, targets, weights = problem()

    def metrics(hidden, head):
        sums = linear_cross_entropy(hidden, head, targets, weights, chunk_tokens=16, **ALL)
        return sums.nll + sums.z_loss + sums.max_z_loss + sums.correct

    assert not any(x.any() for x in jax.grad(metrics, argnums=(0, 1))(hidden, head))


# ------------------------------------------------------------------------------ log-probabilities


def naive_log_probs(hidden, head, targets, **options):
    log_p = jax.nn.log_softmax(naive_logits(hidden, head, **options))
    return jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


@functools.cache
def compiled_log_probs(function, **options):
    def both(targets, cotangent, hidden, head):
        value, pullback = jax.vjp(lambda x, w: function(x, w, targets, **options), hidden, head)
        return value, pullback(cotangent)

    return jax.jit(both)


@pytest.mark.parametrize("options", [{}, {"soft_cap": 3.0, "norm_head": True}], ids=str)
@pytest.mark.parametrize("shape", [(37,), (2, 16)], ids=str)
def test_log_probs_and_their_gradients_with_any_cotangent(options, shape):
    for seed in range(4):
        hidden, head, targets, _ = problem(shape, seed=seed)
        cotangent = jax.random.normal(jax.random.key(seed), shape)
        arguments = targets, cotangent, hidden, head
        ours = compiled_log_probs(token_log_probs, chunk_tokens=16, **options)(*arguments)
        assert_close(ours, compiled_log_probs(naive_log_probs, **options)(*arguments), 2e-6)


def clipped(log_probs, old, gained):
    """A loss of tokens whose slope is 0 for some, as PPO's."""
    ratio = jnp.exp(log_probs - old)
    return jnp.maximum(-gained * ratio, -gained * jnp.clip(ratio, 0.8, 1.2))


@functools.cache
def compiled_token_loss(ours, **options):
    def loss(hidden, head, targets, old, gained):
        if ours:
            total, log_probs = token_loss_sum(
                clipped, hidden, head, targets, (old, gained), chunk_tokens=16, **options
            )
        else:
            log_probs = naive_log_probs(hidden, head, targets, **options)
            total = jnp.sum(clipped(log_probs, old, gained))
        return jnp.float32(0.7) * total, log_probs

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


def token_loss_problem(shape, seed, vocab=VOCAB):
    hidden, head, targets, _ = problem(shape, vocab=vocab, seed=seed)
    rng = np.random.default_rng(seed)
    old = naive_log_probs(hidden, head, targets)
    old += jnp.asarray(rng.normal(size=shape, scale=0.2), jnp.float32)
    return hidden, head, targets, old, jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("options", [{}, {"norm_head": True}], ids=str)
@pytest.mark.parametrize("shape", [(37,), (2, 16), (5,)], ids=str)
def test_a_function_of_the_log_probs_and_its_gradients(options, shape):
    for seed in range(3):
        arguments = token_loss_problem(shape, seed)
        ours = compiled_token_loss(True, **options)(*arguments)
        # Losses of both signs: their sum is smaller than what was rounded.
        assert_close(ours, compiled_token_loss(False, **options)(*arguments), 1e-5)


def test_the_log_probs_beside_a_token_loss_are_constants():
    hidden, head, targets, old, gained = token_loss_problem((37,), 0)

    def log_probs(hidden, head):
        return jnp.sum(token_loss_sum(clipped, hidden, head, targets, (old, gained))[1])

    assert not any(x.any() for x in jax.grad(log_probs, argnums=(0, 1))(hidden, head))


def test_a_token_loss_computes_no_logits_twice():
    hidden, head, targets, old, gained = token_loss_problem((64,), 0, vocab=500)

    def products(of_tokens):
        gradient = jax.grad(of_tokens, argnums=(0, 1))
        return str(jax.make_jaxpr(gradient)(hidden, head)).count("dot_general")

    def again(hidden, head):
        log_probs = token_log_probs(hidden, head, targets, chunk_tokens=16)
        return jnp.sum(clipped(log_probs, old, gained))

    def once(hidden, head):
        constants = (old, gained)
        return token_loss_sum(clipped, hidden, head, targets, constants, chunk_tokens=16)[0]

    assert products(once) == products(again) - 1


def naive_entropies(hidden, head, **options):
    log_p = jax.nn.log_softmax(naive_logits(hidden, head, **options))
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)


@pytest.mark.parametrize("options", [{}, {"norm_head": True}], ids=str)
@pytest.mark.parametrize("shape", [(37,), (2, 16), (5,)], ids=str)
def test_entropies_beside_log_probs(options, shape):
    hidden, head, targets, _ = problem(shape)
    ours = token_log_probs_and_entropies(hidden, head, targets, chunk_tokens=16, **options)
    wanted = (
        naive_log_probs(hidden, head, targets, **options),
        naive_entropies(hidden, head, **options),
    )
    assert_close(ours, wanted, 2e-6)


# ----------------------------------------------------------------------------------------- memory


def largest(jaxpr):
    """The number of entries of the largest value made anywhere inside a jaxpr."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [np.prod(v.aval.shape, dtype=int) for v in equation.outvars]
        sizes += [largest(inner) for inner in jaxprs_in_params(equation.params)]
    return max(sizes)


def test_no_value_has_the_size_of_the_logits():
    tokens, embed, vocab, chunk = 4096, 8, 1000, 64
    hidden, head, targets, weights = problem((tokens,), embed, vocab)

    def loss(hidden, head):
        sums = linear_cross_entropy(hidden, head, targets, weights, chunk_tokens=chunk, **ALL)
        return sums.total + token_log_probs(hidden, head, targets, chunk_tokens=chunk).sum()

    jaxpr = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(hidden, head)
    assert largest(jaxpr.jaxpr) <= chunk * vocab
    assert largest(jax.make_jaxpr(jax.grad(lambda x: naive(
        x, head, targets, weights, **ALL).total))(hidden).jaxpr) >= tokens * vocab  # fmt: skip


def test_the_compiled_program_needs_one_chunk_of_logits():
    tokens, vocab, chunk = 4096, 9000, 64
    arguments = problem((tokens,), 8, vocab)
    step = jax.jit(
        jax.grad(lambda *a: linear_cross_entropy(*a, chunk_tokens=chunk, z_loss=1e-4).total, (0, 1))
    )
    memory = step.lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2.5 * chunk * vocab * 4 < tokens * vocab * 4 / 20


def test_without_a_gradient_none_is_computed():
    hidden, head, targets, weights = problem((64,), 8, 500)

    def products(function):
        return str(jax.make_jaxpr(function)(hidden, head)).count("dot_general")

    def loss(hidden, head):
        return linear_cross_entropy(hidden, head, targets, weights, chunk_tokens=16).total

    assert products(loss) == 1
    assert products(jax.grad(loss, argnums=(0, 1))) >= 3


# ------------------------------------------------------------------------------------------- mesh

MESHES = [{"tensor": 8}, {"data": 2, "tensor": 2, "sequence": 2}, {"fsdp": 4, "tensor": 2}]


@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_eight_devices_equal_one(shape):
    mesh = make_mesh(shape)
    options = {**ALL, "soft_cap": 5.0, "norm_head": True}
    arrays = problem((4, 10), vocab=96)
    compare(options, arrays, mesh=mesh)
    hidden, head, targets, weights = arrays
    arguments = targets, weights, hidden, head
    ours = compiled_log_probs(token_log_probs, chunk_tokens=16, mesh=mesh)(*arguments)
    assert_close(ours, compiled_log_probs(naive_log_probs)(*arguments), 2e-6)
    arguments = token_loss_problem((4, 10), 0, vocab=96)
    ours = compiled_token_loss(True, mesh=mesh)(*arguments)
    assert_close(ours, compiled_token_loss(False)(*arguments), 1e-5)
    both = jax.jit(functools.partial(token_log_probs_and_entropies, chunk_tokens=16, mesh=mesh))
    wanted = naive_log_probs(*arguments[:3]), naive_entropies(*arguments[:2])
    assert_close(both(*arguments[:3]), wanted, 2e-6)


def test_no_device_gathers_the_head_or_logits():
    mesh = make_mesh({"data": 2, "tensor": 4})
    place = functools.partial(jax.sharding.NamedSharding, mesh)
    spec = jax.sharding.PartitionSpec
    specs = (spec("data"), spec(None, "tensor"), spec("data"), spec("data"))
    hidden, head, targets, weights = (
        jax.device_put(x, place(s))
        for x, s in zip(problem((4, 40), 8, 400), specs, strict=True)
    )  # fmt: skip
    loss = functools.partial(linear_cross_entropy, z_loss=1e-2, chunk_tokens=16, mesh=mesh)
    step = jax.jit(jax.value_and_grad(lambda *a: loss(*a).total, argnums=(0, 1)))
    _, (d_hidden, d_head) = step(hidden, head, targets, weights)
    assert d_hidden.sharding.spec[0] == "data" and d_head.sharding.spec[1] == "tensor"
    text = step.lower(hidden, head, targets, weights).compile().as_text()
    assert "all-reduce" in text
    assert "all-gather" not in text and "all-to-all" not in text
    # Nowhere a row of the whole vocabulary.
    assert ",400]" not in text
