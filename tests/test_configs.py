"""Every mistake that gin would miss, by the words the user reads; and what good input gives."""

import dataclasses
import json
import math

import pytest

import gin
from chatyuan import configs, gin_files
from chatyuan.errors import UserError
from chatyuan.gin_files import Macro, Reference, parse_word

pytest_plugins = ["fake_stage"]

GOOD = ["MODEL_DIR=/data/run1", "TRAIN_STEPS=10"]


def load(*bindings, files=(), **more):
    return configs.load("fake", files, [*GOOD, *bindings], **more)


def mistakes(*bindings, files=(), good=True, **more) -> str:
    """The whole report of a configuration that must be refused."""
    with pytest.raises(UserError) as error:
        configs.load("fake", files, [*(GOOD if good else ()), *bindings], **more)
    text = str(error.value)
    assert text.startswith("Bad gin config:\n  - ")
    return text


# What is built.


def test_builds_nested_frozen_dataclasses_with_scopes(repository):
    config = load("LEARNING_RATE=1", files=["gin/models/small.gin"])
    assert config.model_dir == "/data/run1"
    assert (config.model.embed_dim, config.model.num_heads) == (64, 4)
    assert (config.train.length, config.evaluate.length) == (16, 16)
    assert load("INPUT_LENGTH=8").train.length == 8
    assert load("fake.DataConfig.length=32").train.length == 16  # the scoped binding is nearer
    assert load("fake.DataConfig.length=32").evaluate.length == 32
    assert config.mesh == {"data": 3}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train_steps = 3


def test_a_function_is_passed_or_called_and_a_mapping_binds_python_values(repository):
    recipe = repository.recipe(
        "fake.Config.name = @fake.make_name()\n"
        "fake.make_name.prefix = 'big'\n"
        "fake.ModelConfig.activation = @fake.gelu\n"
        "fake.gelu.slope = 3.0\n"
    )
    values = {"MODEL_DIR": "a b", "TRAIN_STEPS": 2, "fake.ModelConfig.activations": ("a", "b")}
    config = configs.load("fake", [recipe], values)
    assert config.name == "big-name"
    assert config.model.activation(2.0) == 6.0
    assert config.model.activations == ("a", "b")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("/data/run1", "/data/run1"),
        ("gs://bucket/run", "gs://bucket/run"),
        ("2024-01-01", "2024-01-01"),
        ("bfloat16", "bfloat16"),
        ("a#b", "a#b"),
        ("5#b", "5#b"),
        ("two words", "two words"),
        ("小元", "小元"),
        ("", ""),
        ("'quoted'", "quoted"),
        ('"x"', "x"),
        ("12", 12),
        ("-3", -3),
        ("1e-3", 1e-3),
        ("True", True),
        ("None", None),
        ("('gelu', 'linear')", ("gelu", "linear")),
        ("{'data': -1}", {"data": -1}),
        ("%SEED", Macro("SEED")),
        ("@a/b.C()", Reference("a", "b.C", True)),
    ],
)
def test_flags_are_gin_or_bare_words(text, value):
    assert parse_word(text) == value
    assert type(parse_word(text)) is type(value)


def test_a_tilde_is_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/yuan")
    assert parse_word("~/runs") == "/home/yuan/runs"


def test_precedence(repository):
    text = "fake.ModelConfig.embed_dim = 16\nLEARNING_RATE = 1.0\n"
    base = repository.recipe(text, "gin/base.gin")
    middle = repository.recipe(  # the file that includes wins, wherever its include stands
        f"fake.ModelConfig.embed_dim = 32\ninclude '{base}'\n", "gin/middle.gin"
    )
    later = repository.recipe("fake.ModelConfig.embed_dim = 64\n", "gin/later.gin")
    assert load(files=[base]).model.embed_dim == 16
    assert load(files=[base]).learning_rate == 1.0
    assert load(files=[middle]).model.embed_dim == 32
    assert load(files=[middle, later]).model.embed_dim == 64
    assert load(files=[later, middle]).model.embed_dim == 32
    assert load("fake.ModelConfig.embed_dim=128", files=[middle]).model.embed_dim == 128
    assert load("ModelConfig.embed_dim=128", files=[middle]).model.embed_dim == 128


def test_files_are_found_from_the_current_directory_the_repository_and_search_paths(
    repository, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "mine").mkdir(parents=True)
    (elsewhere / "mine" / "a.gin").write_text("LEARNING_RATE = 2.0\n")
    monkeypatch.chdir(elsewhere)
    try:
        assert load(files=["mine/a.gin", "gin/models/small.gin"]).learning_rate == 2.0
        assert load(files=["a.gin"], search_paths=["mine"]).learning_rate == 2.0
        assert "file a.gin not found" in mistakes(files=["a.gin"])
    finally:
        monkeypatch.chdir(repository.root)


def test_the_stages_own_file_may_be_included(repository):
    recipe = repository.recipe("include 'gin/stages/fake.gin'\nLEARNING_RATE = 5.0\n")
    assert load(files=[recipe]).learning_rate == 5.0


# Mistakes, one at a time.

MISTAKES = {
    "a mistyped macro": (
        "TRAIN_STPES = 8",
        ["recipes/mine.gin:3  TRAIN_STPES is set but nothing uses it. Did you mean TRAIN_STEPS?"],
    ),
    "a macro in lower case": ("input_length = 8", ["Did you mean INPUT_LENGTH?"]),
    "a macro that is a field": (
        "EMBED_DIM = 8",
        ["EMBED_DIM is set but nothing uses it. Did you mean fake.ModelConfig.embed_dim?"],
    ),
    "a macro whose use is overridden": (
        "INPUT_LENGTH = 8\ntrain/fake.DataConfig.length = 4",
        ["INPUT_LENGTH is set but nothing uses it. train/fake.DataConfig.length would, but "],
    ),
    "an undefined macro": (
        "fake.Config.train_steps = %TRAIN_STEP",
        ["mine.gin:3  %TRAIN_STEP is used but never set. Did you mean TRAIN_STEPS?"],
    ),
    "a macro of itself": ("MIXTURE = %OTHER\nOTHER = %MIXTURE", ["is set to itself"]),
    "a string for an int": (
        "fake.ModelConfig.embed_dim = '512'",
        ["chatyuan.stages.fake.ModelConfig.embed_dim = '512' should be int, got str. Write 512."],
    ),
    "a bool for an int": ("fake.ModelConfig.embed_dim = True", ["= True should be int, got bool."]),
    "a float for an int": (
        "fake.ModelConfig.window = 1e6",
        ["= 1000000.0 should be int or None, got float. Write 1000000."],
    ),
    "a string for a bool": ("fake.ModelConfig.tied = 'true'", ["be bool, got str. Write True."]),
    "a list for a tuple": (
        "fake.ModelConfig.activations = ['gelu']",
        ["should be tuple[str, ...], got list. Write ('gelu',)."],
    ),
    "a tuple without its comma": (
        "fake.ModelConfig.activations = ('gelu')",
        ["= 'gelu' should be tuple[str, ...], got str. Write ('gelu',)."],
    ),
    "a word that is no choice": (
        "fake.ModelConfig.kind = 'prefixlm'",
        ["should be one of 'encoder_decoder', 'prefix_lm'. Did you mean prefix_lm?"],
    ),
    "a wrong value in a dict": (
        "fake.Config.mesh = {'data': 'all'}",
        ["= {'data': 'all'} should be dict[str, int], got dict."],
    ),
    "a macro of the wrong type": (
        "TRAIN_LENGTH = 'long'\ntrain/fake.DataConfig.length = %TRAIN_LENGTH",
        [
            "mine.gin:3  TRAIN_LENGTH = 'long' should be int, got str. "
            "(It sets chatyuan.stages.fake.DataConfig.length.)"
        ],
    ),
    "forgotten parentheses": (
        "fake.Config.model = @fake.ModelConfig",
        ["should be ModelConfig, got the class itself. Write @fake.ModelConfig()."],
    ),
    "parentheses too many": (
        "fake.ModelConfig.activation = @fake.gelu()",
        ["should be a function or None, got its result. Write @fake.gelu."],
    ),
    "another class": (
        "fake.Config.model = @fake.DataConfig()",
        ["@fake.DataConfig() should be ModelConfig, got a chatyuan.stages.fake.DataConfig."],
    ),
    "a reference for a number": ("fake.Config.train_steps = @fake.ModelConfig()", ["be int"]),
    "an unknown parameter": (
        "fake.ModelConfig.embed_dmi = 3",
        ["chatyuan.stages.fake.ModelConfig has no parameter embed_dmi. Did you mean embed_dim?"],
    ),
    "an unknown parameter of a function": ("fake.gelu.slop = 3", ["gelu has no parameter slop."]),
    "an unknown class": (
        "fake.ModelConfg.embed_dim = 3",
        ["fake.ModelConfg is unknown: chatyuan.stages.fake has no ModelConfg. Did you mean Mod"],
    ),
    "an unknown class in a reference": ("fake.Config.model = @fake.Modle()", ["fake.Modle is unk"]),
    "not a class": ("fake.FLAGS.x = 3", ["fake.FLAGS is neither a class nor a function."]),
    "a module that is not imported": (
        "model.ModelConfig.embed_dim = 3",
        ["model is not imported here. Add `from ... import model` at the top of the file."],
    ),
    "a module that does not exist": (
        "from chatyuan.stages import fakee",
        ["mine.gin:3  module chatyuan.stages.fakee does not exist. Did you mean fake?"],
    ),
    "a package that is not installed": (
        "import nowhere_to_be_found",
        ["module nowhere_to_be_found does not exist."],
    ),
    "a T5X module": ("from t5x import models", ["t5x.models is not installed; README's table"]),
    "one thing twice in one file": (
        "fake.ModelConfig.embed_dim = 8\nfake.ModelConfig.embed_dim = 16",
        ["is set twice: at gin/recipes/mine.gin:3 (= 8) and gin/recipes/mine.gin:4 (= 16)"],
    ),
    "one macro twice in one file": ("SEED_DATA = 8\nSEED_DATA = 8", ["SEED_DATA is set twice: at"]),
    "a missing include": (
        "include 'gin/models/smal.gin'",
        ["mine.gin:3  file gin/models/smal.gin not found", "Did you mean gin/models/small.gin?"],
    ),
    "an include of itself": ("include 'gin/recipes/mine.gin'", ["mine.gin includes itself"]),
    "a syntax error": (
        "SEED_DATA = = 3\nINPUT_LENGHT = 3",
        ["gin/recipes/mine.gin:3  Unable to parse value.  [SEED_DATA = = 3]", "mine.gin:4  INPUT"],
    ),
    "a word without quotes": (
        "fake.Config.name = yuan",
        ["mine.gin:3  yuan is not a value; a string needs quotes.  [fake.Config.name = yuan]"],
    ),
    "an unclosed bracket": ("\nSEED_DATA = (3,\n", ["gin/recipes/mine.gin:"]),
    "a syntax error on the last line": ("SEED_DATA =", ["gin/recipes/mine.gin:3  Unable to parse"]),
    "settings of what is not built": (
        "fake.gelu.slope = 3.0",
        ["mine.gin:3  fake.gelu.slope is set but fake builds no fake.gelu."],
    ),
    "settings in a scope that is not built": (
        "trian/fake.DataConfig.length = 3",
        ["trian/fake.DataConfig.length is set but fake builds no trian/fake.DataConfig."],
    ),
    "what a dataclass itself refuses": (
        "fake.ModelConfig.embed_dim = 9\nfake.DataConfig.length = 1",
        ["ModelConfig: embed_dim 9 is no multiple of 2.", "DataConfig: length 1 should be at"],
    ),
    "a setting made required again": (
        "fake.Config.model_dir = %gin.REQUIRED",
        ["fake.Config.model_dir must be set: pass --gin.fake.Config.model_dir=... ."],
    ),
    "what needs itself": (
        "fake.Config.name = @fake.make_name()\nfake.make_name.prefix = @fake.make_name()",
        ["@fake.make_name() needs itself"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_in_files(repository, case):
    text, expected = MISTAKES[case]
    before = repository.files()
    report = mistakes(files=[repository.recipe(text)])
    for part in expected:
        assert part in report
    assert len(report.splitlines()) <= len(expected) + 2, report
    assert repository.files() <= before | {"gin/recipes/mine.gin"}


FLAG_MISTAKES = {
    "INPUT_LENGHT=3": "--gin.INPUT_LENGHT  INPUT_LENGHT is set but nothing uses it. Did you mean",
    "LEARNING_RATE=fast": "--gin.LEARNING_RATE  LEARNING_RATE = 'fast' should be float, got str.",
    "MIXTURE=2024": "MIXTURE = 2024 should be str, got int. Write \"'2024'\".",
    "fake.ModelConfig.tied=true": "tied = 'true' should be bool, got str. Write True.",
    "fake.ModelConfg.tied=True": "fake.ModelConfg is unknown: chatyuan.stages.fake has no Mo",
    "ModelConfg.tied=True": "ModelConfg is not part of this configuration. Did you mean f",
    "fake.ModelConfig.tide=True": "ModelConfig has no parameter tide. Did you mean tied?",
    "fake.Config.mesh={'data': 3": "--gin.fake.Config.mesh  = {'data': 3 is not gin:",
    "SEED_DATA": "--gin.SEED_DATA  has no value; write --gin.SEED_DATA=VALUE.",
    "SEED DATA=3": "'SEED DATA' is not a name; write --gin.NAME=VALUE.",
    "fake.Config.model=@fake.ModelConfig": "got the class itself. Write @fake.ModelConfig().",
    "TRAIN_STEPS=11": "TRAIN_STEPS is set twice: at --gin.TRAIN_STEPS (= 10) and --gin.TRAIN_STEPS",
    "LOSS_NORMALIZING_FACTOR=3": "LOSS_NORMALIZING_FACTOR is set but nothing uses it. T5X's macro",
    "TASK_FEATURE_LENGTHS=3": "TASK_FEATURE_LENGTHS = 3 should be {'inputs': LENGTH, 'targets'",
}


@pytest.mark.parametrize("flag", FLAG_MISTAKES)
def test_mistakes_in_flags(repository, flag):
    assert FLAG_MISTAKES[flag] in mistakes(flag)


def test_the_same_flag_twice_with_the_same_value_is_no_mistake(repository):
    assert load("TRAIN_STEPS=10").train_steps == 10


def test_required_macros_are_named_with_their_meaning(repository):
    report = mistakes(good=False)
    assert (
        "  - TRAIN_STEPS must be set (used by stages/fake: length of the run): "
        "pass --gin.TRAIN_STEPS=... ." in report
    )
    assert "MODEL_DIR must be set" in report


def test_a_field_that_nothing_sets_is_named(repository):
    gin_text = (repository.root / "gin/stages/fake.gin").read_text()
    repository.write("gin/stages/fake.gin", gin_text.replace("fake.DataConfig.mixture = %MIX", "#"))
    report = mistakes()
    assert "DataConfig.mixture must be set: pass --gin.fake.DataConfig.mixture=... ." in report
    assert "MIXTURE is set but nothing uses it" in report  # a stage's own file is checked as well


def test_two_included_files_binding_one_parameter(repository):
    repository.recipe("fake.ModelConfig.embed_dim = 16\n", "gin/a.gin")
    repository.recipe("fake.ModelConfig.embed_dim = 32\n", "gin/b.gin")
    both = "include 'gin/a.gin'\ninclude 'gin/b.gin'\n"
    report = mistakes(files=[repository.recipe(both)])
    assert "set by two included files: gin/a.gin:3 (= 16) and gin/b.gin:3 (= 32)" in report
    settled = repository.recipe(both + "fake.ModelConfig.embed_dim = 64\n")
    assert load(files=[settled]).model.embed_dim == 64
    twice = repository.recipe("include 'gin/a.gin'\ninclude 'gin/c.gin'\n")
    repository.recipe("include 'gin/a.gin'\n", "gin/c.gin")
    assert load(files=[twice]).model.embed_dim == 16  # one file on two paths is one file


def test_an_unreadable_file(repository):
    (repository.root / "bad.gin").write_bytes(b"\xff\xfe\x00")
    assert "bad.gin cannot be read" in mistakes(files=["bad.gin"])


def test_all_mistakes_are_reported_at_once(repository):
    recipe = repository.recipe(
        "INPUT_LENGHT = 3\nfake.ModelConfig.embed_dim = '512'\nfake.ModelConfig.tide = True\n"
        "fake.Config.model = @fake.ModelConfig\nfake.DataConfig.length = 1\n"
    )
    report = mistakes("LEARNING_RATE=fast", files=[recipe])
    parts = ["INPUT_LENGHT", "'512'", "tide", "@fake.ModelConfig()", "'fast'", "length 1 should be"]
    for part in parts:
        assert part in report
    assert len(report.splitlines()) == 1 + len(parts)


def test_arguments_are_refused_by_a_stage_without_them(repository):
    path = repository.root / "stages/fake.py"
    text = path.read_text()
    start = text.index("    arguments:")
    repository.write("stages/fake.py", text[:start] + text[text.index("\n", start) + 1 :])
    assert "fake takes no arguments, got a.txt b;" in mistakes(arguments=["a.txt", "b"])


# T5X's names.


def test_t5x_macros_are_translated_with_a_note(repository, capsys):
    recipe = repository.recipe(
        "MIXTURE_OR_TASK_NAME = 'c4'\nfake.Config.name = %MIXTURE_OR_TASK_NAME\n"
    )
    config = load("TASK_FEATURE_LENGTHS={'inputs': 8}", files=[recipe])
    assert (config.train.mixture, config.name, config.train.length) == ("c4", "c4", 8)
    notes = capsys.readouterr().err.splitlines()
    assert notes == [
        "Note: gin/recipes/mine.gin:3: T5X's MIXTURE_OR_TASK_NAME is read as MIXTURE.",
        "Note: --gin.TASK_FEATURE_LENGTHS: T5X's TASK_FEATURE_LENGTHS is read as "
        "INPUT_LENGTH and TARGET_LENGTH.",
    ]


def test_t5x_lengths_set_both(repository):
    file = gin_files.Reader(repository.root).read_flags(
        ["TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 114}"]
    )
    assert [(b.parameter, b.value) for b in file.bindings] == [
        ("INPUT_LENGTH", 512),
        ("TARGET_LENGTH", 114),
    ]


# Saving.


def test_saved_gin_reads_back_to_the_same_configuration_here_and_in_gin(repository, tmp_path):
    recipe = repository.recipe(
        "fake.ModelConfig.activation = @fake.gelu\nMODEL = @fake.ModelConfig()\n"
        "fake.Config.model = %MODEL\nMODEL/fake.ModelConfig.embed_dim = 12\n"
    )
    config = load(files=[recipe], flags={"restart_on_failure": "3"}, arguments=["a.txt"])
    assert (config.model.embed_dim, config.restart_on_failure) == (12, 3)
    configs.save_run(config, tmp_path / "run")
    again = configs.load("fake", [str(tmp_path / "run" / "config.gin")])
    assert again == config
    gin.clear_config()
    gin.parse_config_file(str(tmp_path / "run" / "config.gin"))
    by_gin = gin.get_configurable(type(config))()
    gin.clear_config()
    assert dataclasses.replace(by_gin.model, activation=None) == dataclasses.replace(
        config.model, activation=None
    )
    assert dataclasses.replace(by_gin, model=config.model) == config
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["config.gin", "config.json"]


def test_a_later_default_does_not_change_an_old_run(repository, tmp_path):
    configs.save_run(load(), tmp_path)
    assert "fake.ModelConfig.embed_dim = 8" in (tmp_path / "config.gin").read_text()


def test_a_part_of_a_saved_configuration_is_rebuilt(repository, tmp_path):
    config = load("fake.ModelConfig.activation=@fake.gelu", files=["gin/models/small.gin"])
    configs.save_run(config, tmp_path)
    assert configs.load_saved(tmp_path, "model", type(config.model)) == config.model
    text = json.dumps(configs.to_json(config))
    assert configs.from_json(type(config), json.loads(text)) == config
    plain = json.loads(json.dumps(dataclasses.asdict(config.train)))
    assert configs.from_json(type(config.train), plain) == config.train
    with pytest.raises(UserError, match="has no setting reward"):
        configs.load_saved(tmp_path, "reward", type(config.model))
    with pytest.raises(UserError, match="does not fit DataConfig: DataConfig has no"):
        configs.load_saved(tmp_path, "model", type(config.train))


def test_a_run_continues_only_under_its_own_configuration(repository, tmp_path):
    configs.check_same_run(load(), tmp_path)  # nothing there yet
    configs.save_run(load(), tmp_path)
    configs.check_same_run(dataclasses.replace(load(), model_dir="/moved"), tmp_path)
    other = load("LEARNING_RATE=0.5", "fake.ModelConfig.embed_dim=16")
    with pytest.raises(UserError) as error:
        configs.check_same_run(other, tmp_path)
    assert "learning_rate: 0.001 there, 0.5 here" in str(error.value)
    assert "model.embed_dim: 8 there, 16 here" in str(error.value)
    assert "--gin.MODEL_DIR=..." in str(error.value)
    configs.check_same_run(other, tmp_path, may_change=("learning_rate", "model"))


def test_a_run_saved_before_a_field_existed_continues_with_its_default(repository, tmp_path):
    configs.save_run(load(), tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    del saved["model"]["window"], saved["mesh"]
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(UserError, match=r"mesh.data: -1 there, 3 here") as error:
        configs.check_same_run(load(), tmp_path)
    assert "window" not in str(error.value)


def test_another_stages_folder_and_damaged_files_are_refused(repository, tmp_path):
    config = load()
    with pytest.raises(UserError, match="is not the folder of a run"):
        configs.read_saved(tmp_path)
    (tmp_path / "config.json").write_text('{"class": "chatyuan.stages.other.Config"}')
    with pytest.raises(UserError, match="chatyuan.stages.other.Config ran there, this is"):
        configs.check_same_run(config, tmp_path)
    (tmp_path / "config.json").write_text('{"class": ')
    with pytest.raises(UserError, match="cannot be read"):
        configs.check_same_run(config, tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="is not a configuration"):
        configs.check_same_run(config, tmp_path)


def test_only_a_loaded_configuration_can_be_saved_as_a_run(repository, tmp_path):
    with pytest.raises(AssertionError, match="not a copy"):
        configs.save_run(dataclasses.replace(load(), train_steps=3), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_values_that_gin_cannot_write_stay_defaults(repository):
    assert not configs._literal(math.inf)
    assert not configs._literal((1, len))
    assert configs._literal({"a": [1, (2.0, None)]})


# Printing.


def test_explain_lists_every_field(repository):
    text = configs.explain(load(files=["gin/models/small.gin"]))
    assert "train_steps         10 steps" in text
    assert "model  ModelConfig\n  embed_dim     64\n" in text


def test_help_lists_macros_with_type_default_unit_and_meaning(repository):
    text = configs.stage_help("fake", {"precompile": "compile and stop"})
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line.startswith("  ")}
    assert text.startswith("Trains a fake model.\n\nMore words.\n\nUsage: python run.py fake [ARG")
    assert rows["TRAIN_STEPS"] == "TRAIN_STEPS int required steps length of the run".split()
    assert rows["LEARNING_RATE"] == ["LEARNING_RATE", "float", "0.001"]
    assert rows["--precompile"] == "--precompile compile and stop".split()


def test_one_file_can_be_checked_by_itself(repository):
    assert configs.check_file("gin/models/small.gin") == []
    bad = repository.recipe(
        "fake.ModelConfig.embed_dim = 'x'\nfake.ModelConfig.tide = %UNDEFINED\n"
    )
    assert len(configs.check_file(bad)) == 2
