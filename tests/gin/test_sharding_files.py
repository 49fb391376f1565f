"""Meshes fit the machines that they are named after; strategies say what they split and cost."""

import pathlib
import re

import pytest

from chatyuan import configs, gin_files, sharding
from chatyuan.models import ModelConfig, build

ROOT = pathlib.Path(__file__).resolve().parents[2]
MESHES = sorted((ROOT / "gin/meshes").glob("*.gin"))
STRATEGIES = sorted((ROOT / "gin/sharding").glob("*.gin"))
RECIPE = "gin/recipes/pretrain_quickstart.gin"
GIVEN = {"MODEL_DIR": "run", "VOCABULARY": "zh.model", "CACHE_DIR": "cache"}


def named(path):
    return path.stem


def mesh_of(path):
    source = gin_files.Reader(ROOT).read(str(path.relative_to(ROOT)), "test")
    [mesh] = [b.value for b in source.bindings if b.parameter == "MESH"]
    return mesh


def devices_of(name):
    """As in the name; v5p counts cores, of which a chip (a device) has two."""
    kind, count, _, slices = re.fullmatch(r"(cpu|gpu_|v\w+_)(\d+)(_x(\d+))?", name).groups()
    return int(count) * int(slices or 1) // (2 if kind == "v5p_" else 1), int(slices or 1)


@pytest.mark.parametrize("path", MESHES, ids=named)
def test_a_mesh_fits_its_machine(path):
    mesh = mesh_of(path)
    if path.stem == "data":
        assert mesh == {"data": -1}
        return
    count, slices = devices_of(path.stem)
    fitted = sharding.abstract_mesh(mesh, count)
    assert fitted.size == count
    if slices > 1:
        _, across = sharding.mesh_sizes(mesh, count, slices)
        assert across["data"] == slices
    assert path.read_text(encoding="utf-8").startswith("# "), "say why these axes"


@pytest.mark.parametrize("path", MESHES, ids=named)
def test_a_large_model_divides_over_it(path):
    config = ModelConfig(embed_dim=4096, mlp_dim=10240, num_heads=64, num_kv_heads=8)
    model, mesh = build(config), mesh_of(path)
    count = 8 if path.stem == "data" else devices_of(path.stem)[0]
    fitted = sharding.abstract_mesh(mesh, count)
    params = model.abstract_params()
    places = sharding.shardings(params, model.logical_axes(), fitted)
    whole = 4 * model.num_params
    split = fitted.shape["fsdp"] * fitted.shape["tensor"]
    assert sharding.bytes_per_device(params, places) == pytest.approx(whole / split, rel=0.02)


@pytest.mark.parametrize("path", STRATEGIES, ids=named)
def test_a_strategy_says_what_it_does(path):
    text = path.read_text(encoding="utf-8")
    for part in ("Splits: ", "Memory: ", "Sends", "Use it: "):
        assert f"\n# {part}" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("path", STRATEGIES, ids=named)
def test_a_strategy_goes_beside_a_recipe(path):
    files = [RECIPE, str(path.relative_to(ROOT))]
    plain = configs.load("pretrain", [RECIPE], GIVEN)
    config = configs.load("pretrain", files, GIVEN)
    differs = (config.mesh, config.sharding, config.model) != (
        plain.mesh, plain.sharding, plain.model,
    )  # fmt: skip
    assert differs or path.stem == "data_parallel"


@pytest.mark.parametrize("readme", ["README.md", "README.zh.md"])
def test_every_strategy_is_in_the_readme(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    missing = [path.stem for path in STRATEGIES if f"`{path.stem}`" not in text]
    assert not missing
