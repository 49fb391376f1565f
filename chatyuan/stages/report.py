"""Write the plots and report.md of a run again, from the files in its folder.

For a run that was killed between evaluations, or after an update of the report itself.
"""

import dataclasses
import pathlib
from typing import Any

from chatyuan import configs, report
from chatyuan.errors import UserError
from chatyuan.metrics import METRICS


@dataclasses.dataclass(frozen=True)
class Config:
    """Which run."""

    model_dir: str = dataclasses.field(metadata={"help": "folder of the run"})


def run(config: Config) -> None:
    """Writes MODEL_DIR/report.md and plots/."""
    folder = _checked(config)
    gin = folder / configs.GIN_NAME
    text = gin.read_text(encoding="utf-8") if gin.exists() else ""
    print(f"Written: {report.write_report(folder, title=folder.name, config_text=text)}")


def dry_run(config: Config) -> None:
    """Checks that there is something to report."""
    print(f"{_checked(config) / METRICS} can be drawn.")


def _checked(config: Config) -> Any:
    folder = pathlib.Path(config.model_dir)
    if not (folder / METRICS).exists():
        raise UserError(f"MODEL_DIR = {folder} holds no {METRICS}; give the folder of a run.")
    return folder
