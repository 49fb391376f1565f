"""A small world of the stages: files of Chinese text, and commands run in this process."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from chatyuan.checkpoint_arrays import read_arrays
from chatyuan.main import main

RECIPE = """
from __gin__ import dynamic_registration
from chatyuan.decode import config as decoding
from chatyuan.models import config as model
from chatyuan.train import optimizers
from chatyuan.train import schedules

INPUT_LENGTH = 48
TARGET_LENGTH = 24
BATCH_SIZE = 8
LEARNING_RATE = 0.005
WARMUP_STEPS = 0
LOG_PERIOD = 2
EVAL_PERIOD = 4
CHECKPOINT_PERIOD = 4

model.ModelConfig.vocab_size = 768
model.ModelConfig.embed_dim = 32
model.ModelConfig.mlp_dim = 64
model.ModelConfig.num_heads = 2
model.ModelConfig.head_dim = 16
model.ModelConfig.num_encoder_layers = 1
model.ModelConfig.num_decoder_layers = 1
optimizers.OptimizerConfig.name = 'adamw'
schedules.ScheduleConfig.name = 'constant'
decoding.DecodeConfig.max_decode_length = 16
"""
VOCABULARY = """
from __gin__ import dynamic_registration
from chatyuan.text import tokenizer as training

training.TokenizerConfig.vocab_size = 640
training.TokenizerConfig.extra_ids = 20
training.TokenizerConfig.character_coverage = 1.0
"""
PLACES = "房间 早餐 服务 位置 书 电影 手机 电池 屏幕 味道 价格 空调".split()
PRAISE = "很好 很干净 非常满意 值得推荐 特别新鲜 相当不错".split()
BLAME = "很差 很脏 非常失望 不值得买 特别吵 相当糟糕".split()
TIMES = "今天 昨天 上个月 去年冬天 第一次来 和朋友一起".split()
QUESTION = "这条评论是好评还是差评？\n"
PAIRS = {
    "中国的首都是哪里？": "北京是中国的首都。",
    "一年有几个季节？": "四个：春、夏、秋、冬。",
    "用一个词形容大海。": "辽阔",
    "把“谢谢”翻译成英语。": "Thank you",
    "二加三等于几？": "等于5。",
    "用户：你好！\n小元：": "您好，我是小元。",
    "解释成语：画蛇添足": "比喻做了多余的事。",
    "太阳从哪边升起？": "东边。",
}
TIMING = ("seconds_per_step", "tokens_per_second", "input_wait")


@dataclasses.dataclass(frozen=True)
class Workshop:
    """Paths, and commands with the settings that every one of them needs."""

    root: pathlib.Path

    @property
    def vocabulary(self) -> pathlib.Path:
        return self.root / "zh.model"

    @property
    def cache(self) -> pathlib.Path:
        return self.root / "cache"

    @property
    def text(self) -> str:
        """The mixture of plain text."""
        return f"file:{self.root / 'text.txt'}"

    @property
    def reviews(self) -> str:
        """The mixture with answer choices and three splits."""
        return f"file:{self.root / 'reviews'}"

    @property
    def pairs(self) -> str:
        """The mixture of eight questions, the same in every split."""
        return f"file:{self.root / 'pairs'}"

    @property
    def preferences(self) -> str:
        """The mixture of preferences."""
        return f"file:{self.root / 'preferences'}"

    def words(self, stage: str, **settings: object) -> list[str]:
        """A command line; settings override what the stage gets from the recipe."""
        recipe = {"tokenizer": "vocabulary.gin", "pretrain": "tiny.gin", "sft": "tiny.gin",
                  "dpo": "tiny.gin"}  # fmt: skip
        given: dict[str, object] = {"VOCABULARY": self.vocabulary, "CACHE_DIR": self.cache}
        if stage in ("evaluate", "infer"):
            given.pop("VOCABULARY")
        if stage in ("tokenizer", "infer"):
            given.pop("CACHE_DIR")
        words = [stage]
        if stage in recipe:
            words.append(f"--gin_file={self.root / recipe[stage]}")
        for name, value in {**given, **settings}.items():
            if value is not None:
                words.append(f"--gin.{name.replace('__', '.')}={value}")
        return words

    def run(self, stage: str, *more: str, **settings: object) -> int:
        """Runs a command in this process; returns its status."""
        return main([*self.words(stage, **settings), *more])

    def files(self) -> dict[str, str]:
        """Every file below, with a hash of its content."""
        return {
            str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(self.root.rglob("*"))
            if path.is_file()
        } | {str(p.relative_to(self.root)): "" for p in self.root.rglob("*") if p.is_dir()}


def sentences() -> Iterator[str]:
    """A few hundred different ones."""
    for time, place, words in itertools.product(TIMES, PLACES, (*PRAISE, *BLAME)):
        yield f"{time}，这里的{place}{words}，"


def documents() -> list[str]:
    """Texts of one to four sentences."""
    parts = list(sentences())
    texts, start = [], 0
    while start < len(parts):
        count = 1 + (start * 7) % 4
        texts.append("".join(parts[start : start + count])[:-1] + "。")
        start += count
    return texts


def reviews() -> list[dict[str, Any]]:
    """Questions with two choices."""
    choices = ["好评", "差评"]
    return [
        {"input": f"{QUESTION}{time}，{place}{words}。", "target": target,
         "answer_choices": choices}
        for time in TIMES
        for place in PLACES
        for target, of in zip(choices, (PRAISE, BLAME), strict=True)
        for words in of
    ]  # fmt: skip


def preferences() -> list[dict[str, str]]:
    """Praise is chosen over blame."""
    return [
        {"prompt": f"{time}，{place}怎么样？", "chosen": good, "rejected": bad}
        for time in TIMES
        for place in PLACES
        for good, bad in zip(PRAISE, BLAME, strict=True)
    ]


def held_out_preferences() -> list[dict[str, str]]:
    """Combinations that are never trained on; their words are."""
    return preferences()[::7]


def write_lines(path: pathlib.Path, rows: list[Any]) -> pathlib.Path:
    """Writes text, or objects as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def furnish(root: pathlib.Path) -> Workshop:
    """Writes the sources and recipes."""
    spoken = [f"{a}{b}".replace("\n", "") for a, b in PAIRS.items()]
    write_lines(root / "text.txt", [*spoken, *documents()])
    questions = reviews()
    write_lines(root / "reviews" / "train.jsonl", questions[::2])
    write_lines(root / "reviews" / "validation.jsonl", questions[1::32])
    write_lines(root / "reviews" / "test.jsonl", questions[3::32])
    pairs = [{"input": a, "target": b} for a, b in PAIRS.items()]
    for split in ("train", "validation", "test"):
        write_lines(root / "pairs" / f"{split}.jsonl", pairs)
    held_out = held_out_preferences()
    write_lines(root / "preferences" / "validation.jsonl", held_out)
    learned = [row for row in preferences() if row not in held_out]
    write_lines(root / "preferences" / "train.jsonl", learned)
    (root / "tiny.gin").write_text(RECIPE, encoding="utf-8")
    (root / "vocabulary.gin").write_text(VOCABULARY, encoding="utf-8")
    return Workshop(root)


def arrays(run: pathlib.Path, step: int) -> dict[str, np.ndarray]:
    """Every array of a checkpoint: weights, optimizer, step."""
    folder = (run / "checkpoints" / str(step)).absolute()
    shapes = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["arrays"]
    wanted = {
        name: jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        for name, (shape, dtype) in shapes.items()
    }
    return {name: np.asarray(a) for name, a in read_arrays(folder, wanted).items()}


def untimed(run: pathlib.Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what differs from run to run."""
    found = rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if k not in TIMING} for row in found]
