"""Every gin file is read, checked and, where a stage can run it, built: none can rot unseen."""

import dataclasses
import pathlib
import re
import typing

import pytest

import gin
from chatyuan import configs, gin_files, main

ROOT = pathlib.Path(__file__).resolve().parents[2]
GIN = ROOT / "gin"
STAGES = sorted(GIN.glob("stages/*.gin"))
RECIPES = sorted(GIN.glob("recipes/**/*.gin"))
LEAVES = sorted(set(GIN.rglob("*.gin")) - set(STAGES) - set(RECIPES))
RECIPE_LINES = 30
INCLUDE_DEPTH = 2
PUBLIC_MACROS = {
    *("MODEL_DIR", "INIT_FROM", "MIXTURE", "VOCABULARY", "CACHE_DIR", "TRAIN_STEPS", "BATCH_SIZE"),
    *("MICROBATCHES", "INPUT_LENGTH", "TARGET_LENGTH", "SEED", "LEARNING_RATE", "WARMUP_STEPS"),
    *("EVAL_PERIOD", "CHECKPOINT_PERIOD", "LOG_PERIOD", "MESH", "DROPOUT_RATE", "DTYPE"),
    "REWARD_FROM",
}


def name_of(path: pathlib.Path) -> str:
    return str(path.relative_to(ROOT))


def stage_of(recipe: pathlib.Path) -> str:
    """The stage of a recipe: that of the command in its comment, or the start of its name."""
    known = main.stages()
    told = re.search(r"run\.py (\w+)", recipe.read_text(encoding="utf-8"))
    starts = [stage for stage in known if recipe.stem.startswith(f"{stage}_")]
    stage = told.group(1) if told else max(starts, key=len, default="")
    assert stage in known, f"{recipe}: say `python run.py STAGE --gin_file=...` in its first lines"
    return stage


def required(stage: str) -> set[str]:
    """The macros that the stage leaves to the user."""
    return left_open(GIN / "stages" / f"{stage}.gin")


def left_open(path: pathlib.Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    return set(re.findall(r"^(\w+) *= *%gin\.REQUIRED", text, re.MULTILINE))


def dummies(stage: str, recipe: str | None = None) -> dict[str, object]:
    """A value of the right type for every required macro that the recipe does not set."""
    reader = gin_files.Reader(ROOT)
    source = reader.read(recipe, recipe) if recipe else None
    given = {b.parameter for file in source.walk() for b in file.bindings} if source else set()
    values = {}
    config = configs.stage_module(stage).Config
    hints = typing.get_type_hints(config)
    asked = left_open(ROOT / recipe) if recipe else set()
    for macro in (required(stage) - given) | asked:
        kind = hints.get(macro.lower(), int if macro.endswith(("STEPS", "SIZE", "LENGTH")) else str)
        values[macro] = 128 if kind is int else (128.0 if kind is float else "somewhere")
    return values


def built(stage: str, files: list[str]) -> object:
    values = dummies(stage, files[0] if files else None)
    return configs.load(stage, files, values)


@pytest.mark.parametrize("path", STAGES, ids=name_of)
def test_a_stages_defaults_build(path):
    assert path.stem in main.stages(), f"{path} has no module in chatyuan/stages"
    config = built(path.stem, [])
    assert dataclasses.is_dataclass(config)
    assert configs.explain(config)
    text = configs.stage_help(path.stem, main.stage_flags(path.stem))
    for macro in required(path.stem):
        assert f"  {macro} " in text
    fields = {field.name for field in dataclasses.fields(config)}
    assert set(main.stage_flags(path.stem)) <= fields, "a stage's flag sets the field of its name"


@pytest.mark.parametrize("path", STAGES, ids=name_of)
def test_a_stage_names_its_macros_as_the_others_do(path):
    source = gin_files.Reader(ROOT).read(name_of(path), "test")
    macros = {b.parameter for b in source.bindings if not b.selector}
    assert macros <= PUBLIC_MACROS, "not public; bind the field itself"


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_a_recipe_builds_and_is_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= RECIPE_LINES
    assert dataclasses.is_dataclass(built(stage_of(path), [name_of(path)]))


@pytest.mark.parametrize("path", LEAVES, ids=name_of)
def test_a_leaf_names_what_exists(path):
    assert configs.check_file(name_of(path)) == []


@pytest.mark.parametrize("path", [*STAGES, *RECIPES, *LEAVES], ids=name_of)
def test_includes_are_shallow(path):
    def depth(file: gin_files.GinFile) -> int:
        return max((1 + depth(included) for included in file.includes), default=0)

    reader = gin_files.Reader(ROOT)
    source = reader.read(name_of(path), "test")
    assert reader.problems == []
    assert depth(source) <= INCLUDE_DEPTH


@pytest.mark.parametrize("path", RECIPES, ids=name_of)
def test_gin_itself_builds_the_same(path, tmp_path):
    """The saved configuration means to gin what it means to us."""
    stage = stage_of(path)
    config = built(stage, [name_of(path)])
    configs.save_run(config, tmp_path)
    gin.clear_config()
    try:
        gin.parse_config_file(str(tmp_path / "config.gin"))
        assert configs.to_json(gin.get_configurable(type(config))()) == configs.to_json(config)
    finally:
        gin.clear_config()
    assert configs.load(stage, [str(tmp_path / "config.gin")]) == config
