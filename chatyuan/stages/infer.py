"""Answer the prompts of a file (text: one a line; JSONL: field "inputs"), as JSON lines.

Results are written batch by batch in the order of the prompts; starting again in the same MODEL_DIR
continues after the last complete line.
"""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

from chatyuan import checkpoints, configs
from chatyuan.checkpoint_files import check_writable
from chatyuan.decode.config import DecodeConfig
from chatyuan.decode.text import TextConfig, TextGenerator
from chatyuan.errors import UserError
from chatyuan.models import build
from chatyuan.stages import _run_folder
from chatyuan.text import files

PREDICTIONS = "predictions.jsonl"
_CHUNK = 8  # batches between two writes: prompts of one chunk are sorted by length together


def _field(help_text: str, unit: str = "", **kwargs: Any) -> Any:
    return dataclasses.field(metadata={"help": help_text, "unit": unit}, **kwargs)


@dataclasses.dataclass(frozen=True)
class Config:
    """Which model answers what."""

    model_dir: str = _field("folder for predictions.jsonl")
    init_from: str = _field("run or checkpoint that answers")
    arguments: tuple[str, ...] = _field("FILE of prompts", default=())
    vocabulary: str | None = _field("None = the copy that the run keeps", default=None)
    use_ema: bool = _field("use the moving average of the weights", default=False)
    decoding: DecodeConfig = _field("how answers are generated", default=DecodeConfig())
    text: TextConfig = _field("how prompts become batches", default=TextConfig())
    seed: int = _field("of sampling; prompt i uses seed + i", default=0)
    dialogue: bool = _field("wrap plain prompts as 用户：... 小元：", default=False)


def run(config: Config) -> None:
    """Writes MODEL_DIR/predictions.jsonl: {"index", "inputs", "prediction", ...} a line."""
    path = _file(config)
    check_writable(pathlib.Path(config.model_dir))
    configs.check_same_run(config, config.model_dir)
    model_config, vocabulary = _run_folder.read_model(config.init_from, config.vocabulary)
    folder = pathlib.Path(config.model_dir)
    target = folder / PREDICTIONS
    done = _complete_lines(target)
    skipped = files.Skipped()
    rows = itertools.islice(_prompts(path, skipped, config.dialogue), done, None)
    first = next(rows, None)
    if first is None and not done:
        raise UserError(f"{path} holds no prompt{_because(skipped)}.")
    model = build(model_config)
    params = checkpoints.load_params(
        config.init_from, model.abstract_params(), use_ema=config.use_ema
    )
    generator = TextGenerator(model, vocabulary, config.decoding, config.text)
    configs.save_run(config, folder)
    if done:
        print(f"{target} holds {done:,} answers already; continuing after them.")
    rows = iter(()) if first is None else itertools.chain([first], rows)
    with target.open("a", encoding="utf-8") as out:
        while chunk := list(itertools.islice(rows, _CHUNK * config.text.batch_sizes[-1])):
            prompts = [row["inputs"] for row in chunk]
            results = generator.generate(params, prompts, config.seed + done)
            for row, result in zip(chunk, results, strict=True):
                _write(out, {"index": done, **row}, result)
                done += 1
            out.flush()
            print(f"{done:,} answered", flush=True)
    print(f"Written: {target} ({done:,} answers{_because(skipped)}).")


def dry_run(config: Config) -> None:
    """Opens the checkpoint and the file; shows the first prompts as the model sees them."""
    path = _file(config)
    model_config, vocabulary = _run_folder.read_model(config.init_from, config.vocabulary)
    print(f"{config.init_from}: {build(model_config).num_params:,} parameters")
    for row in itertools.islice(_prompts(path, files.Skipped(), config.dialogue), 2):
        pieces = [vocabulary.piece(i) for i in vocabulary.encode(row["inputs"])]
        print(f"  {' '.join(pieces)}")


def _file(config: Config) -> pathlib.Path:
    if len(config.arguments) != 1:
        raise UserError(
            f"infer takes one file of prompts, got {len(config.arguments)}: "
            "python run.py infer FILE --gin.INIT_FROM=RUN --gin.MODEL_DIR=OUT"
        )
    path = pathlib.Path(config.arguments[0])
    if not path.is_file():
        raise UserError(f"There is no file {path} of prompts.")
    return path


def _prompts(
    path: pathlib.Path, skipped: files.Skipped, dialogue: bool
) -> Iterator[dict[str, Any]]:
    """Rows with "inputs"; JSON rows keep their other fields."""
    from chatyuan.text.templates import dialogue_prompt

    for row in files.read_prompts(path, skipped):
        yield {**row, "inputs": dialogue_prompt(row["inputs"])} if dialogue else row


def _complete_lines(path: pathlib.Path) -> int:
    """Number of complete lines; what an interruption left of another is cut off."""
    if not path.exists():
        return 0
    with path.open("rb+") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)
    return data.count(b"\n")


def _write(out: TextIO, row: dict[str, Any], result: Any) -> None:
    answer: dict[str, Any] = {"prediction": result.text}
    if len(result.texts) > 1:
        answer |= {"predictions": result.texts, "scores": result.scores}
    answer |= {"finished": result.finished[0]}
    if result.truncated_tokens:
        answer["truncated_tokens"] = result.truncated_tokens
    out.write(json.dumps({**row, **answer}, ensure_ascii=False) + "\n")


def _because(skipped: files.Skipped) -> str:
    counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(skipped.items()))
    return f"; skipped {counts}" if counts else ""
