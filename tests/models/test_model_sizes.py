"""Parameter counts of the published sizes, golden parameter trees, FLOPs against the compiler."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_kinds import KINDS, batch_for, random_params

from chatyuan import gin_files
from chatyuan.errors import UserError
from chatyuan.models import ModelConfig, build, flops_per_example, swiglu_mlp_dim
from chatyuan.models.loss import supervised_loss

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = pathlib.Path(__file__).with_name("golden_parameters.txt")
# Published counts (in millions where rounded), see the papers and the files on the hub.
PUBLISHED = {
    "t5_1_0": {
        "tiny": 15.6,
        "small": 60_506_624,
        "base": 222.9,
        "large": 737.7,
        "xl": 2852,
        "xxl": 11307,
    },
    "t5_1_1": {"nano": 3.3, "tiny": 22.7, "small": 77.0, "base": 247.6, "large": 783_150_080}
    | {"xl": 2850, "xxl": 11135},
    "mt5": {"small": 300.2, "base": 582.4, "large": 1230, "xl": 3743, "xxl": 12921},
    "umt5": {"small": 306.6, "base": 592.0, "large": 1242, "xl": 3768, "xxl": 12973},
    "chatyuan": {"base": 247.6, "large": 783_150_080, "tiny": 11.7}
    | {"small": 77.0, "xl": 2850, "xxl": 11135},
    "llama": {"7b": 6_738_415_616, "baichuan2_7b": 7_505_973_248, "baichuan2_13b": 13_896_668_160}
    | {"tiny": 7.6, "small": 58.6, "base": 134.3, "large": 1101},
    "unilm": {"tiny": 5.2, "small": 35.3, "base": 109.6, "large": 334.9},
}
LEAVES = [f"{arch}/{size}" for arch, sizes in PUBLISHED.items() for size in sizes]


def config_of(leaf):
    """The configuration that a gin leaf describes: an include is overridden by its includer."""
    path = str(ROOT / "gin" / "models" / f"{leaf}.gin")
    files = list(gin_files.Reader(ROOT).read(path, path).walk())
    values = {}
    for file in reversed(files):
        values |= {binding.parameter: binding.value for binding in file.bindings}
    return ModelConfig(**values)


def test_every_leaf_is_counted():
    there = {f"{p.parent.name}/{p.stem}" for p in (ROOT / "gin" / "models").rglob("*.gin")}
    assert there == set(LEAVES)


@pytest.mark.parametrize("leaf", LEAVES)
def test_published_parameter_counts(leaf):
    arch, size = leaf.split("/")
    published = PUBLISHED[arch][size]
    count = build(config_of(leaf)).num_params
    if isinstance(published, int) and published > 1e6:
        assert count == published
    else:
        assert abs(count / 1e6 - published) <= (0.05 if isinstance(published, float) else 0.5)


@pytest.mark.parametrize("size", ["tiny", "small", "base", "7b", "baichuan2_13b"])
def test_gated_widths_follow_the_rule(size):
    config = config_of(f"llama/{size}")
    assert config.mlp_dim == swiglu_mlp_dim(config.embed_dim)


def test_flops_of_the_published_sizes():
    """GFLOP per training sequence at 512/128."""
    expected = {"small": 109.9, "base": 437.5, "large": 1503.8, "xl": 5471.9}
    for size, gflop in expected.items():
        got = flops_per_example(config_of(f"t5_1_1/{size}"), 512, 128) / 1e9
        assert abs(got - gflop) < 0.06, (size, got)


@pytest.mark.parametrize("architecture", ["encoder_decoder", "prefix_lm"])
def test_flops_equal_the_compilers(architecture):
    """Unrolled layers and an unchunked loss: XLA counts the body of a loop once."""
    config = ModelConfig(
        architecture=architecture,
        vocab_size=4096,
        embed_dim=256,
        mlp_dim=1024,
        num_heads=4,
        head_dim=64,
        num_encoder_layers=1,
        num_decoder_layers=1,
    )
    sizes = dict(inputs=128, targets=64) if architecture == "encoder_decoder" else dict(length=192)
    batch = batch_for(config, rows=4, **sizes)
    loss_fn = supervised_loss(build(config))
    step = jax.jit(jax.grad(lambda p, b: loss_fn(p, b, None)[0]))
    compiled = step.lower(build(config).abstract_params(), batch).compile()
    counted = compiled.cost_analysis()["flops"]
    analytic = 4 * flops_per_example(config, 128, 64)
    assert 0.97 <= counted / analytic <= 1.03, counted / analytic


def described(kind):
    model = build(KINDS[kind])
    lines = [f"== {kind}"]
    axes = model.logical_axes()
    for path, leaf in jax.tree_util.tree_flatten_with_path(model.abstract_params())[0]:
        names = axes
        for key in path:
            names = names[key.key]
        assert len(names) == len(leaf.shape)
        name = "/".join(key.key for key in path)
        shape = "x".join(map(str, leaf.shape))
        lines.append(f"{name} {leaf.dtype} {shape} {','.join(names)}")
    return lines


def test_parameter_trees_are_golden():
    """A change breaks checkpoints: if it is wanted, write the new text and tell CHANGELOG."""
    text = "\n".join(line for kind in KINDS for line in described(kind)) + "\n"
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_init_makes_what_abstract_params_promise():
    config = KINDS["rope_gqa_encoder_decoder"]
    model = build(config)
    params, again = model.init(jax.random.key(0)), model.init(jax.random.key(0))
    promised = model.abstract_params()
    assert jax.tree.structure(params) == jax.tree.structure(promised)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or 1 / 0, params, promised)
    jax.tree.map(np.testing.assert_array_equal, params, again)
    layers = params["decoder"]["layers"]["mlp"]["wo"]["kernel"]
    assert not np.array_equal(layers[0], layers[1]), "every layer has its own key"
    assert hash(model) == hash(build(config)) and model == build(config)


def test_initial_scales_are_t5s():
    config = dataclasses.replace(
        KINDS["t5_1_1"], embed_dim=64, mlp_dim=128, num_heads=8, head_dim=16, vocab_size=512
    )
    params = build(config).init(jax.random.key(0))
    block = params["encoder"]["layers"]
    attention = block["self_attention"]

    def deviation(weights):
        return float(jnp.std(weights["kernel"] if isinstance(weights, dict) else weights))

    expected = [
        (params["token_embedder"]["embedding"], 1.0),
        (attention["query"], (64 * 16) ** -0.5),
        (attention["key"], 64**-0.5),
        (attention["value"], 64**-0.5),
        (attention["out"], (8 * 16) ** -0.5),
        (block["mlp"]["wi_0"], 64**-0.5),
        (block["mlp"]["wo"], 128**-0.5),
        (params["logits_dense"], 64**-0.5),
    ]
    for weights, value in expected:
        assert abs(deviation(weights) / value - 1) < 0.04


def test_norm_head_has_unit_columns():
    config = KINDS["llama"]
    module = build(config).bind(random_params(config))
    np.testing.assert_allclose(jnp.linalg.norm(module.head_weight(), axis=0), 1.0, rtol=1e-5)


def test_head_weight_gives_the_logits():
    for kind in ("t5_1_0", "t5_1_1", "llama"):
        config = KINDS[kind]
        module = build(config).bind(random_params(config))
        hidden = jax.random.normal(jax.random.key(0), (2, 3, config.embed_dim))
        expected = jnp.matmul(hidden, module.head_weight())
        np.testing.assert_allclose(module.logits(hidden), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(architecture="encoder-decoder"), "Did you mean encoder_decoder"),
        (dict(position="ropes"), "position = 'ropes' must be one of"),
        (dict(mlp_activations=("gelu_new",)), "mlp_activations = 'gelu_new'"),
        (dict(mlp_activations=()), "mlp_activations is empty"),
        (dict(num_kv_heads=4), "num_kv_heads = 4 must divide num_heads = 6"),
        (dict(position="rope", head_dim=7), "head_dim = 7 must be even"),
        (dict(dropout_rate=1.0), r"dropout_rate = 1.0 must be in \[0, 1\)"),
        (dict(embed_dim=0), "embed_dim = 0 must be at least 1"),
        (dict(relative_attention_num_buckets=6), "multiple of 4"),
        (dict(causal_only=True), "causal_only = True needs"),
        (dict(dtype="float16"), "dtype = 'float16' must be one of"),
    ],
)
def test_mistakes_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        ModelConfig(**changes)
