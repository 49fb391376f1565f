"""A stage small enough to know by heart, in a repository of its own."""

import importlib
import os
import pathlib
import sys

import pytest

from chatyuan import configs, stages

STAGE = '''"""Trains a fake model.

More words.
"""

import dataclasses
import os
import pathlib
from collections.abc import Callable
from typing import Literal

from chatyuan import configs, errors
from chatyuan.errors import UserError

FLAGS = {"precompile": "compile and stop", "restart_on_failure": "how often to try again"}


def gelu(x: float, slope: float = 0.5) -> float:
    """A function that gin may name."""
    return x * slope


def make_name(prefix: str = "run") -> str:
    """A function that gin may call."""
    return prefix + "-name"


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A model."""

    embed_dim: int = 8
    num_heads: int = 2
    activations: tuple[str, ...] = ("gelu",)
    kind: Literal["encoder_decoder", "prefix_lm"] = "encoder_decoder"
    dropout_rate: float = 0.0
    window: int | None = None
    tied: bool = False
    activation: Callable[..., float] | None = None

    def __post_init__(self) -> None:
        if self.embed_dim % self.num_heads:
            raise UserError(f"embed_dim {self.embed_dim} is no multiple of {self.num_heads}.")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Data."""

    mixture: str
    length: int = 16

    def __post_init__(self) -> None:
        if self.length < 2:
            raise ValueError(f"length {self.length} should be at least 2.")


@dataclasses.dataclass(frozen=True)
class Config:
    """What the stage does."""

    model_dir: str = dataclasses.field(metadata={"help": "folder of the run"})
    train_steps: int = dataclasses.field(metadata={"help": "length of the run", "unit": "steps"})
    model: ModelConfig
    train: DataConfig
    evaluate: DataConfig | None = None
    learning_rate: float = 1e-3
    mesh: dict[str, int] = dataclasses.field(default_factory=lambda: {"data": -1})
    name: str = ""
    precompile: bool = False
    restart_on_failure: int = 0
    arguments: tuple[str, ...] = dataclasses.field(default=(), metadata={"help": "files to read"})


def run(config: Config) -> None:
    """Writes the configuration."""
    configs.check_same_run(config, config.model_dir, may_change=("train_steps",))
    configs.save_run(config, config.model_dir)
    failure = os.environ.get("FAKE_FAILURE")
    if failure:
        raise eval(failure)
    print("ran", config.train_steps)


def dry_run(config: Config) -> None:
    """Prints."""
    print("would run", config.train_steps)
'''

GIN = """from __gin__ import dynamic_registration
from chatyuan.stages import fake

MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = %gin.REQUIRED
MIXTURE = 'reviews'
INPUT_LENGTH = 16
LEARNING_RATE = 0.001
SEED_DATA = 3

fake.Config.model_dir = %MODEL_DIR
fake.Config.train_steps = %TRAIN_STEPS
fake.Config.learning_rate = %LEARNING_RATE
fake.Config.model = @fake.ModelConfig()
fake.Config.train = @train/fake.DataConfig()
fake.Config.evaluate = @fake.DataConfig()
fake.Config.mesh = {'data': %SEED_DATA}
fake.DataConfig.mixture = %MIXTURE
train/fake.DataConfig.length = %INPUT_LENGTH
"""

MODEL = """from __gin__ import dynamic_registration
from chatyuan.stages import fake
fake.ModelConfig:
    embed_dim = 64
    num_heads = 4
"""


class Repository:
    """A temporary repository holding the stage `fake`."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.write("stages/fake.py", STAGE)
        self.write("gin/stages/fake.gin", GIN)
        self.write("gin/models/small.gin", MODEL)

    def write(self, name: str, text: str) -> str:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return name

    def recipe(self, text: str, name: str = "gin/recipes/mine.gin") -> str:
        """Writes a recipe that imports the stage on its second line; the text starts on line 3."""
        head = "from __gin__ import dynamic_registration\nfrom chatyuan.stages import fake\n"
        return self.write(name, head + text)

    def files(self) -> set[str]:
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*.*")}


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Repository:
    """The temporary repository, made the one that `chatyuan` runs in."""
    made = Repository(tmp_path / "repository")
    monkeypatch.setattr(configs, "ROOT", made.root)
    monkeypatch.setattr(stages, "__path__", [*stages.__path__, str(made.root / "stages")])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.chdir(made.root)
    monkeypatch.delenv("FAKE_FAILURE", raising=False)
    importlib.invalidate_caches()
    yield made
    sys.modules.pop("chatyuan.stages.fake", None)
    if hasattr(stages, "fake"):
        delattr(stages, "fake")
    assert os.getcwd() == str(made.root)
