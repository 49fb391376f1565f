"""What the documents say exists, and the two READMEs say the same."""

import dataclasses
import json
import pathlib
import re
import shlex

import pytest

from chatyuan import configs, gin_files, main
from chatyuan.checkpoints import CheckpointConfig
from chatyuan.data.loader import DataConfig
from chatyuan.decode.config import DecodeConfig
from chatyuan.models.config import ModelConfig
from chatyuan.models.loss import LossConfig
from chatyuan.train.optimizers import OptimizerConfig
from chatyuan.train.schedules import ScheduleConfig

ROOT = pathlib.Path(__file__).parents[1]
README, README_ZH = (ROOT / name for name in ("README.md", "README.zh.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
CONFIGS = {
    cls.__name__: cls
    for cls in (
        CheckpointConfig, DataConfig, DecodeConfig, ModelConfig, LossConfig, OptimizerConfig,
        ScheduleConfig,
    )
}  # fmt: skip
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)#]+)\)")
# The language switch at the top is the one link that differs.
SWITCH = {"README.md", "README.zh.md"}


def prose(path: pathlib.Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def headings(path: pathlib.Path) -> list[str]:
    return re.findall(r"^(#+) ", prose(path), re.MULTILINE)


def blocks(path: pathlib.Path) -> list[tuple[str, str]]:
    return FENCE.findall(path.read_text(encoding="utf-8"))


def tables(path: pathlib.Path) -> list[list[list[str]]]:
    """Tables as rows of cells, the ruling line left out."""
    found, table = [], []
    for line in [*prose(path).splitlines(), ""]:
        if line.startswith("|"):
            table.append([cell.strip() for cell in line.strip("|").split("|")])
        elif table:
            found.append([row for row in table if set("".join(row)) - set("-")])
            table = []
    return found


def table_with(path: pathlib.Path, cell: str) -> list[list[str]]:
    return next(table for table in tables(path) if any(cell in row[0] for row in table))


def commands(text: str) -> list[list[str]]:
    """The words of every command that a block of shell or a notebook cell runs."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in line.lstrip("!% ").split("&&")]
    return [shlex.split(part, comments=True) for part in parts if part.strip()]


def documented_commands() -> list[list[str]]:
    texts = [text for path in (README, README_ZH) for kind, text in blocks(path) if kind == "bash"]
    for notebook in NOTEBOOKS:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        texts += [text for text in code if text.startswith("!")]
    return [words for text in texts for words in commands(text)]


def test_readmes_have_the_same_skeleton():
    assert headings(README) == headings(README_ZH)
    assert blocks(README) == blocks(README_ZH)
    links = [[x for x in LINK.findall(prose(p)) if x not in SWITCH] for p in (README, README_ZH)]
    assert links[0] == links[1]


def test_readmes_have_the_same_tables():
    english, chinese = tables(README), tables(README_ZH)
    assert [len(table) for table in english] == [len(table) for table in chinese]
    for table_en, table_zh in zip(english, chinese, strict=True):
        for row_en, row_zh in zip(table_en, table_zh, strict=True):
            # A name in code is the same in every language; words around it may be in any order.
            names = [sorted(INLINE.findall(" ".join(row))) for row in (row_en, row_zh)]
            assert names[0] == names[1]


def test_readmes_name_the_same_things():
    names = [set(INLINE.findall(prose(path))) for path in (README, README_ZH)]
    assert names[0] == names[1]


@pytest.mark.parametrize(
    "path", [README, README_ZH, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name
)
def test_links_lead_somewhere(path):
    for target in LINK.findall(prose(path)):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_stage_table_is_the_list_of_stages():
    documented = {INLINE.findall(row[0])[0] for row in table_with(README, "`tokenizer`")[1:]}
    assert documented == set(main.stages())


def test_documented_runs_build_a_configuration():
    """Stage, gin files, macros and their types are real; nothing is opened or trained."""
    checked = set()
    for words in documented_commands():
        if words[:2] != ["python", "run.py"] or len(words) < 3:
            continue
        command = main.parse(words[2:])
        assert command.stage in main.stages(), words
        assert not command.flags.keys() - main.stage_flags(command.stage).keys(), words
        config = configs.load(
            command.stage, command.gin_files, command.bindings, arguments=command.arguments
        )
        assert dataclasses.is_dataclass(config)
        checked.add(command.stage)
    assert checked >= {"quickstart", "tokenizer", "cache", "pretrain", "sft", "infer"}


def test_documented_scripts_exist():
    scripts = {words[1] for words in documented_commands() if words[0] == "python" and words[1:]}
    scripts = {script for script in scripts if script.endswith(".py")}
    assert "benchmarks/train_step.py" in scripts
    for script in scripts:
        assert (ROOT / script).exists(), script


def test_paths_in_prose_exist():
    for name in INLINE.findall(prose(README)) + INLINE.findall(prose(ROOT / "CONTRIBUTING.md")):
        if re.fullmatch(r"(chatyuan|gin|tasks|tests|benchmarks|notebooks|\.ci)/[\w./*-]*", name):
            assert list(ROOT.glob(name.rstrip("/"))), name


def test_t5x_macros_are_read_as_documented():
    documented = {}
    for theirs, ours in table_with(README, "`MIXTURE_OR_TASK_NAME`")[1:]:
        if ours.startswith("read as"):
            target = INLINE.findall(ours)[0].split(" ")[0]
            documented |= {name.split(" ")[0]: target for name in INLINE.findall(theirs)}
    assert documented.pop(gin_files.T5X_LENGTHS) == "INPUT_LENGTH"
    assert documented == gin_files.T5X_MACROS
    table = " ".join(cell for row in table_with(README, "`MIXTURE_OR_TASK_NAME`") for cell in row)
    for name in gin_files.T5X_WITHOUT_COUNTERPART:
        assert f"`{name}`" in table


def test_settings_named_in_the_t5x_tables_exist():
    found = re.findall(r"\b(\w+Config)\.(\w+)", prose(README))
    ours = [(name, field) for name, field in found if name in CONFIGS]
    assert len(ours) > 10
    for name, field in ours:
        assert field in {f.name for f in dataclasses.fields(CONFIGS[name])}, (name, field)


def test_t5x_run_modes_are_in_the_table():
    table = table_with(README, "--run_mode=eval")
    for mode, stage in main.RUN_MODES.items():
        row = next(row for row in table if f"--run_mode={mode}`" in row[0])
        assert stage.split(" ")[-1] in row[1] or "planned" in row[1]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_notebooks_are_valid(path):
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and notebook["cells"]
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and isinstance(cell["source"], list)
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            if not cell["source"][0].startswith(("!", "%")):
                compile("".join(cell["source"]), path.name, "exec")


def test_benchmarks_append_to_their_own_section(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path / "RESULTS.md")
    common.append_rows("One", ["a", "b"], [[1, 2]])
    common.append_rows("Two", ["c"], [[3]])
    common.append_rows("One", ["a", "b"], [[4, 5]])
    text = common.RESULTS.read_text()
    one, two = text.split("## Two")
    assert [line for line in one.splitlines() if line[:3] in ("| 1", "| 4")] == [
        "| 1 | 2 |",
        "| 4 | 5 |",
    ]
    assert "| 3 |" in two and "| 4" not in two
    assert common.finish([common.Check("speed", 2.5, goal=3, floor=2)], "floor") == 0
    assert common.finish([common.Check("speed", 2.5, goal=3, floor=2)], "goal") == 1
    assert common.finish([common.Check("memory", 0.6, goal=0.5, at_most=True)], "floor") == 1
