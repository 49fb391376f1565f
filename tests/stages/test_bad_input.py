"""Everything that people get wrong: one message that says what to do, status 2, nothing written."""

import contextlib
import errno
import json
import os
import pathlib
import shutil

import pytest
from workshop import Workshop, rows, write_lines

from chatyuan import checkpoints, metrics
from chatyuan.data import cache
from chatyuan.data import sources as data_sources
from chatyuan.main import main
from chatyuan.stages import infer, quickstart

RUN = {"MODEL_DIR": "{root}/new", "MIXTURE": "{text}", "TRAIN_STEPS": "2"}
TUNE = {**RUN, "MIXTURE": "{pairs}"}
ANSWER = {"MODEL_DIR": "{root}/new", "INIT_FROM": "{pretrained}"}
EVALUATE = {**ANSWER, "MIXTURE": "{reviews}"}

# What is wrong -> (stage, settings, what the message says). {names} are filled in by `names`.
MISTAKES: dict[str, tuple[str, dict, list[str]]] = {
    "unknown macro": (
        "pretrain", RUN | {"BATCH_SZIE": "8"},
        ["--gin.BATCH_SZIE", "BATCH_SZIE is set but nothing uses it. Did you mean BATCH_SIZE?"],
    ),
    "wrong type": (
        "pretrain", RUN | {"BATCH_SIZE": "many"}, ["BATCH_SIZE = 'many' should be int, got str"],
    ),
    "macro not set": (
        "pretrain", RUN | {"TRAIN_STEPS": None}, ["TRAIN_STEPS must be set"],
    ),
    "missing vocabulary": (
        "pretrain", RUN | {"VOCABULARY": "{root}/hz.model"},
        ["hz.model: there is no such file. Did you mean zh.model?", "python run.py tokenizer"],
    ),
    "vocabulary is a folder": (
        "pretrain", RUN | {"VOCABULARY": "{root}"}, ["is a folder; give the SentencePiece .model"],
    ),
    "vocabulary is something else": (
        "pretrain", RUN | {"VOCABULARY": "{root}/text.txt"}, ["is not a SentencePiece model"],
    ),
    "vocabulary larger than the model": (
        "pretrain", RUN | {"chatyuan.models.config.ModelConfig.vocab_size": "512"},
        ["has 640 pieces", "vocab_size = 512", "set vocab_size to at least 640"],
    ),
    "vocabulary that the cache was not made with": (
        "pretrain", RUN | {"VOCABULARY": "{root}/other.model"},
        ["was made with vocabulary", "Use the same file, or build a cache"],
    ),
    "vocabulary that the checkpoint was not trained with": (
        "sft", TUNE | {"VOCABULARY": "{root}/other.model", "CACHE_DIR": "{root}/other",
                       "INIT_FROM": "{pretrained}"},
        ["INIT_FROM = ", "was trained with another vocabulary", "Use the run's own"],
    ),
    "no cache": (
        "pretrain", RUN | {"CACHE_DIR": "{root}/nowhere"},
        ["which holds nothing.", "Build it first: python run.py cache --gin.MIXTURE="],
    ),
    "mixture that is not in the cache": (
        "pretrain", RUN | {"MIXTURE": "{text}2"}, ["Did you mean file:", "python run.py cache"],
    ),
    "split that is not in the cache": (
        "pretrain", RUN | {"pretrain.Config.eval_split": "test"},
        ["has no split 'test'", "it has train, validation"],
    ),
    "batch that does not divide over the devices": (
        "pretrain", RUN | {"BATCH_SIZE": "12"},
        ["batch of 12 sequences does not divide over 8 data shards (mesh data=8)",
         "--gin.BATCH_SIZE=8"],
    ),
    "batch that does not divide into microbatches": (
        "pretrain", RUN | {"BATCH_SIZE": "8", "MICROBATCHES": "2"},
        ["does not divide over 8 data shards (mesh data=8) times 2 microbatches", "16"],
    ),
    "no microbatch": ("pretrain", RUN | {"MICROBATCHES": "0"}, ["MICROBATCHES = 0"]),
    "mesh that does not fit": (
        "pretrain", RUN | {"MESH": "{{'data': 3}}"},
        ["MESH data=3 needs 3 devices but there are 8"],
    ),
    "slices that the devices do not form": (
        "pretrain", RUN | {"MESH": "{{'dcn_data': 3, 'fsdp': -1}}"},
        ["MESH dcn_data=3 cuts 8 devices into 3 slices", "--gin.MESH=\"{{'fsdp': -1}}\""],
    ),
    "heads that do not divide": (
        "pretrain", RUN | {"MESH": "{{'data': 2, 'tensor': 4}}"},
        ["decoder/relpos_bias/rel_embedding: its axis 'heads' of size 2 does not divide over 4 "
         "devices (MESH data=2 tensor=4); set MESH tensor to a divisor of 2"],
    ),
    "length that does not divide": (
        "pretrain", RUN | {"MESH": "{{'data': 2, 'tensor': 4}}", "TARGET_LENGTH": "26",
                           "chatyuan.models.config.ModelConfig.num_heads": "4",
                           "chatyuan.models.config.ModelConfig.sequence_parallel": "True"},
        ["decoder_", "its axis 'norm_length' of size 26 does not divide over 4"],
    ),
    "mesh axis that does not exist": (
        "pretrain", RUN | {"MESH": "{{'dta': 8}}"},
        ["MESH has the axis 'dta'", "Did you mean data"],
    ),
    "input too short for one example": (
        "pretrain", RUN | {"INPUT_LENGTH": "4"},
        ["INPUT_LENGTH=4 is too short for one example", "--gin.INPUT_LENGTH="],
    ),
    "target too short for one example": (
        "sft", TUNE | {"TARGET_LENGTH": "1"},
        ["TARGET_LENGTH=1 is too short for one example", "--gin.TARGET_LENGTH=2"],
    ),
    "objective of pairs on plain text": (
        "sft", TUNE | {"MIXTURE": "{text}"}, ["needs tasks with inputs and targets", "plain text"],
    ),
    "objective of one stack on two": (
        "pretrain", RUN | {"chatyuan.data.objectives.ObjectiveConfig.name": "unilm"}, ["unilm"],
    ),
    "no steps": ("pretrain", RUN | {"TRAIN_STEPS": "0"}, ["train_steps = 0 must be at least 1"]),
    "sizes that do not fit together": (
        "pretrain", RUN | {"chatyuan.models.config.ModelConfig.num_kv_heads": "3"},
        ["num_kv_heads = 3 must divide num_heads = 2"],
    ),
    "ramp above the batch": (
        "pretrain", RUN | {"chatyuan.data.loader.DataConfig.batch_ramp": "((0, 64),)"},
        ["batch_ramp = ((0, 64),)", "BATCH_SIZE=8"],
    ),
    "ramp that is no whole number of microbatches": (
        "pretrain", RUN | {"chatyuan.data.loader.DataConfig.batch_ramp": "((0, 4), (1, 8))"},
        ["batch_ramp size 4 is not a whole number of microbatches"],
    ),
    "INIT_FROM that does not exist": (
        "sft", TUNE | {"INIT_FROM": "{root}/pretraind"},
        ["pretraind does not exist. Did you mean pretrained?"],
    ),
    "INIT_FROM that is no run": (
        "sft", TUNE | {"INIT_FROM": "{root}/reviews"}, ["reviews holds no checkpoint"],
    ),
    "INIT_FROM of another size": (
        "sft", TUNE | {"INIT_FROM": "{pretrained}",
                       "chatyuan.models.config.ModelConfig.embed_dim": "16"},
        ["does not fit this model", "the model wants"],
    ),
    "INIT_FROM without a moving average": (
        "sft", TUNE | {"INIT_FROM": "{pretrained}", "sft.Config.init_from_ema": "True"},
        ["holds no moving average"],
    ),
    "MODEL_DIR of another configuration": (
        "pretrain", RUN | {"MODEL_DIR": "{pretrained}", "DROPOUT_RATE": "0.2", "SEED": "3"},
        ["holds a run of another configuration", "model.dropout_rate: 0.1 there, 0.2 here",
         "data.seed: 0 there, 3 here", "--gin.MODEL_DIR="],
    ),
    "MODEL_DIR of another stage": (
        "sft", TUNE | {"MODEL_DIR": "{pretrained}"},
        ["chatyuan.stages.pretrain.Config ran there, this is chatyuan.stages.sft.Config"],
    ),
    "MODEL_DIR that is a file": (
        "pretrain", RUN | {"MODEL_DIR": "{root}/text.txt"}, ["text.txt is a file, not a folder"],
    ),
    "MODEL_DIR below a file": (
        "pretrain", RUN | {"MODEL_DIR": "{root}/text.txt/run"}, ["text.txt is a file"],
    ),
    "MODEL_DIR of evaluate that is a file": (
        "evaluate", EVALUATE | {"MODEL_DIR": "{root}/text.txt"}, ["text.txt is a file"],
    ),
    "MODEL_DIR of infer that is a file": (
        "infer", ANSWER | {"MODEL_DIR": "{root}/text.txt"}, ["text.txt is a file"],
    ),
    "report of no run": (
        "report", {"MODEL_DIR": "{root}/reviews"}, ["reviews holds no metrics.jsonl"],
    ),
    "evaluation of a split that is not there": (
        "evaluate", EVALUATE | {"evaluate.Config.split": "tset"},
        ["has no split 'tset'", "Did you mean test?"],
    ),
    "evaluation of plain text": (
        "evaluate", EVALUATE | {"MIXTURE": "{text}", "evaluate.Config.split": "validation"},
        ["has no inputs", "evaluate needs tasks with inputs and targets"],
    ),
    "evaluation of a split without examples": (
        "evaluate", EVALUATE | {"evaluate.Config.split": "train"}, ["no untokenised examples"],
    ),
    "evaluation with another vocabulary": (
        "evaluate", EVALUATE | {"VOCABULARY": "{root}/other.model"}, ["another vocabulary"],
    ),
    "unknown decoding method": (
        "infer", ANSWER | {"chatyuan.decode.config.DecodeConfig.method": "beem"},
        ["method = 'beem' should be one of", "Did you mean beam?"],
    ),
    "vocabulary that exists": (
        "tokenizer", {"VOCABULARY": "{root}/zh.model", "MIXTURE": "{text}"},
        ["zh.model exists", "--gin.tokenizer.Config.overwrite=True"],
    ),
    "vocabulary larger than the text": (
        "tokenizer", {"VOCABULARY": "{root}/new.model", "MIXTURE": "{text}",
                      "chatyuan.text.tokenizer.TokenizerConfig.vocab_size": "9000"},
        ["vocab_size=9000 is too high for this much text; at most"],
    ),
    "vocabulary without room": (
        "tokenizer", {"VOCABULARY": "{root}/new.model", "MIXTURE": "{text}",
                      "chatyuan.text.tokenizer.TokenizerConfig.vocab_size": "200"},
        ["vocab_size=200 leaves no room for text"],
    ),
    "vocabulary below a file": (
        "tokenizer", {"VOCABULARY": "{root}/text.txt/new.model", "MIXTURE": "{text}"},
        ["text.txt is a file"],
    ),
    "source that does not exist": (
        "tokenizer", {"VOCABULARY": "{root}/new.model", "MIXTURE": "file:{root}/txet.txt"},
        ["There is no file", "Did you mean text.txt?"],
    ),
    "cache of a file that does not exist": (
        "cache", {"CACHE_DIR": "{root}/new", "MIXTURE": "file:{root}/txet.txt"},
        ["There is no file", "Did you mean text.txt?"],
    ),
    "cache of an unknown kind of file": (
        "cache", {"CACHE_DIR": "{root}/new", "MIXTURE": "file:{root}/zh.model"},
        ["ends in '.model'; expected .txt"],
    ),
    "cache of an empty file": (
        "cache", {"CACHE_DIR": "{root}/new", "MIXTURE": "file:{root}/bad/empty.txt"},
        ["empty.txt holds no usable example (the file is empty)"],
    ),
    "cache of a file of empty lines": (
        "cache", {"CACHE_DIR": "{root}/new", "MIXTURE": "file:{root}/bad/blank.txt"},
        ["blank.txt holds no usable example (3 empty)"],
    ),
    "cache of objects of another shape": (
        "cache", {"CACHE_DIR": "{root}/new", "MIXTURE": "file:{root}/bad/shape.jsonl"},
        ["shape.jsonl holds no usable example (2 unknown_shape_or_empty)", '{{"text": "..."}}'],
    ),
    "cache in a file": (
        "cache", {"CACHE_DIR": "{root}/text.txt", "MIXTURE": "{text}"}, ["text.txt"],
    ),
    "cache without a split": (
        "cache", {"CACHE_DIR": "{root}/new", "MIXTURE": "{text}",
                  "cache.Config.splits": "('trian',)"},
        ["has no split 'trian'", "Did you mean train?"],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def names(shop: Workshop, pretrained: pathlib.Path) -> dict[str, object]:
    """What the settings above name; also files that are of no use."""
    bad = shop.root / "bad"
    write_lines(bad / "empty.txt", [])
    write_lines(bad / "blank.txt", ["", "  ", ""])
    write_lines(bad / "shape.jsonl", [{"question": "几点？"}, {"answer": "三点。"}])
    write_lines(shop.root / "prompts.txt", ["你好", "再见"])
    other = {"VOCABULARY": shop.root / "other.model"}
    size = {"chatyuan__text__tokenizer__TokenizerConfig__vocab_size": 600}
    assert shop.run("tokenizer", MIXTURE=shop.text, **other, **size) == 0
    assert shop.run("cache", MIXTURE=shop.pairs, CACHE_DIR=shop.root / "other", **other) == 0
    return {"root": shop.root, "text": shop.text, "reviews": shop.reviews, "pairs": shop.pairs,
            "pretrained": pretrained}  # fmt: skip


def refused(
    shop: Workshop, capsys, words: list[str], expected: list[str], status: int = 2
) -> str:
    """Runs a command that must fail with one message and write nothing; returns the message."""
    before = shop.files()
    capsys.readouterr()
    assert main(words) == status
    err = capsys.readouterr().err
    for text in expected:
        assert text in err
    assert "Traceback" not in err
    assert 0 < len(err.strip()) < 1500
    assert shop.files() == before
    return err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_and_status_2(shop, names, mistake, capsys):
    stage, settings, expected = MISTAKES[mistake]
    settings = {
        name: value if value is None else value.format(**names) for name, value in settings.items()
    }
    if stage == "report":
        settings |= {"VOCABULARY": None, "CACHE_DIR": None}
    if "." in "".join(settings):
        settings = {name.replace(".", "__"): value for name, value in settings.items()}
    more = [str(shop.root / "prompts.txt")] if stage == "infer" else []
    words = [*shop.words(stage, **settings), *more]
    refused(shop, capsys, words, [text.format(**names) for text in expected])


@pytest.mark.parametrize("stage", ["pretrian", "train", ""])
def test_a_stage_that_does_not_exist(shop, capsys, stage):
    words = [word for word in [stage, "--gin.MODEL_DIR=x"] if word]
    expected = {"pretrian": "Did you mean pretrain?", "train": "There is no stage train."}
    refused(shop, capsys, words, [expected.get(stage, "Which stage?")])


def test_a_recipe_that_does_not_exist(shop, capsys):
    words = shop.words("pretrain", TRAIN_STEPS=1, MODEL_DIR=shop.root / "new", MIXTURE=shop.text)
    words.append("--gin_file=gin/recipes/pretrain_quikstart.gin")
    refused(shop, capsys, words, ["gin/recipes/pretrain_quikstart.gin", "not found"])


def test_a_task_that_does_not_exist(shop, capsys):
    words = shop.words("cache", MIXTURE="zh_pretrian", CACHE_DIR=shop.root / "new")
    refused(shop, capsys, words, ["zh_pretrian", "Did you mean zh_pretrain?"])


@pytest.mark.parametrize("files", [[], ["a.txt", "b.txt"], ["nowhere.txt"], ["bad/blank.txt"]])
def test_infer_takes_one_file_with_prompts(shop, names, files, capsys):
    expected = {0: "infer takes one file of prompts, got 0", 2: "got 2"}.get(len(files))
    if files == ["nowhere.txt"]:
        expected = "nowhere.txt"
    if files == ["bad/blank.txt"]:
        expected = "holds no prompt; skipped 3 empty"
    words = shop.words("infer", MODEL_DIR=shop.root / "new", INIT_FROM=names["pretrained"])
    words += [str(shop.root / name) for name in files]
    refused(shop, capsys, words, [expected])


# Files that were damaged.


def damaged_copy(shop: Workshop, folder: pathlib.Path) -> pathlib.Path:
    copy = shop.root / "damaged" / folder.name
    shutil.rmtree(copy.parent, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "damage", "problem"),
    [
        ("targets.tokens.npy", truncate, "bytes where the manifest says"),
        ("targets.tokens.npy", flip, "the checksum of targets.tokens.npy differs"),
        ("targets.offsets.npy", pathlib.Path.unlink, "targets.offsets.npy is missing"),
        ("manifest.json", truncate, "manifest.json cannot be read"),
    ],
)
def test_a_damaged_cache_is_refused(shop, capsys, name, damage, problem):
    copy = damaged_copy(shop, shop.cache)
    (path,) = (copy / cache.folder_name(shop.text)).glob(f"train/{name}")
    damage(path)
    settings = {"MODEL_DIR": shop.root / "new", "MIXTURE": shop.text, "TRAIN_STEPS": 2}
    words = shop.words("pretrain", CACHE_DIR=copy, **settings)
    refused(shop, capsys, words, ["is damaged: ", problem, "python run.py cache"])
    assert shop.run("cache", MIXTURE=shop.text, CACHE_DIR=copy) == 0
    cache.open_cache(copy, shop.text, "train")


def largest(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize("damage", [truncate, flip, pathlib.Path.unlink])
def test_a_damaged_newest_checkpoint_falls_back_loudly(shop, pretrained, damage, capsys):
    copy = damaged_copy(shop, pretrained)
    damage(largest(copy / "checkpoints" / "8"))
    folder = shop.root / "damaged" / "answers"
    prompts = write_lines(shop.root / "prompts.txt", ["你好", "再见"])
    assert shop.run("infer", str(prompts), MODEL_DIR=folder, INIT_FROM=copy) == 0
    err = capsys.readouterr().err
    assert "WARNING: checkpoint" in err and "is damaged" in err and "falling back to step 4" in err
    assert len(rows(folder / "predictions.jsonl")) == 2
    assert (copy / "checkpoints" / "8").is_dir(), "another's run is left as it is"


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(shop, pretrained, capsys):
    copy = damaged_copy(shop, pretrained)
    flip(largest(copy / "checkpoints" / "8"))
    settings = {"MODEL_DIR": copy, "MIXTURE": shop.text, "DROPOUT_RATE": 0.1, "TRAIN_STEPS": 8}
    assert shop.run("pretrain", **settings) == 0
    captured = capsys.readouterr()
    assert "falling back to step 4" in captured.err
    assert "Continuing from step 4 to step 8" in captured.out
    names = {path.name for path in (copy / "checkpoints").iterdir()}
    assert names == {"4", "8", "8.damaged"}
    assert [row["step"] for row in rows(copy / "metrics.jsonl")] == [2, 4, 6, 8]


@pytest.mark.parametrize("stage", ["infer", "sft", "evaluate"])
def test_a_damaged_only_checkpoint_is_refused(shop, pretrained, stage, capsys):
    copy = damaged_copy(shop, pretrained)
    shutil.rmtree(copy / "checkpoints" / "4")
    truncate(largest(copy / "checkpoints" / "8"))
    settings = {"MODEL_DIR": shop.root / "new", "INIT_FROM": copy}
    settings |= {"infer": {}, "evaluate": {"MIXTURE": shop.reviews}}.get(
        stage, {"MIXTURE": shop.pairs, "TRAIN_STEPS": 2}
    )
    prompts = write_lines(shop.root / "prompts.txt", ["你好", "再见"])
    words = shop.words(stage, **settings) + ([str(prompts)] if stage == "infer" else [])
    refused(shop, capsys, words, ["every checkpoint is damaged", "Restore a copy"])


@pytest.mark.parametrize("content", ["", "[]", '{"class"'])
def test_an_unreadable_run_is_refused(shop, pretrained, content, capsys):
    copy = damaged_copy(shop, pretrained)
    (copy / "config.json").write_text(content)
    settings = {"MODEL_DIR": copy, "MIXTURE": shop.text, "DROPOUT_RATE": 0.1, "TRAIN_STEPS": 8}
    words = shop.words("pretrain", **settings)
    refused(shop, capsys, words, ["config.json", "restore it or use a new folder"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_another_user_is_refused(shop, capsys):
    locked = shop.root / "locked"
    locked.mkdir(exist_ok=True)
    locked.chmod(0o500)
    settings = {"MODEL_DIR": locked / "run", "MIXTURE": shop.text, "TRAIN_STEPS": 2}
    words = shop.words("pretrain", **settings)
    refused(shop, capsys, words, ["cannot be written"])


def test_a_vocabulary_that_the_run_did_not_start_with_is_refused(shop, names, capsys):
    copy = damaged_copy(shop, names["pretrained"])
    settings = {"MODEL_DIR": copy, "MIXTURE": shop.pairs, "TRAIN_STEPS": 8}
    settings |= {"VOCABULARY": shop.root / "other.model", "CACHE_DIR": shop.root / "other"}
    # The same mixture name, cached anew with the other vocabulary.
    saved = json.loads((copy / "config.json").read_text())
    saved["data"]["mixture"] = shop.pairs
    saved["objective"]["name"] = "seq2seq"
    saved["model"]["dropout_rate"] = 0.0
    (copy / "config.json").write_text(json.dumps(saved))
    recipe = "--gin.chatyuan.data.objectives.ObjectiveConfig.name=seq2seq"
    words = [*shop.words("pretrain", **settings), recipe]
    refused(shop, capsys, words, ["was trained with another vocabulary"])


# A disk that is full.


@contextlib.contextmanager
def full_disk(monkeypatch, module, name, path):
    def fail(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(module, name, fail)
        yield


def test_a_full_disk_while_caching(shop, capsys, monkeypatch):
    folder = shop.root / "full_cache"
    folder.mkdir(exist_ok=True)
    task = folder / cache.folder_name(shop.text)
    task.mkdir(exist_ok=True)
    words = shop.words("cache", MIXTURE=shop.text, CACHE_DIR=folder)
    with full_disk(monkeypatch, cache, "_npy_header", task):
        refused(shop, capsys, words, ["No space left while writing the cache", "CACHE_DIR"])


def test_a_full_disk_while_training(shop, capsys, monkeypatch):
    folder = shop.root / "full_run"
    settings = {"MODEL_DIR": folder, "MIXTURE": shop.text, "TRAIN_STEPS": 4, "LOG_PERIOD": 2,
                "CHECKPOINT_PERIOD": 2, "EVAL_PERIOD": 0}  # fmt: skip
    settings |= {"pretrain__Config__num_samples": 0, "pretrain__Config__eval_split": "None"}
    real, calls = checkpoints.write_inventory, []

    def second_fails(path, sums):
        calls.append(path)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        real(path, sums)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "write_inventory", second_fails)
        assert shop.run("pretrain", **settings) == 2
    err = capsys.readouterr().err
    for text in ("checkpoint of step 4 cannot be written", "the disk is full", "Make room",
                 "checkpoints intact: 2"):  # fmt: skip
        assert text in err
    assert "Traceback" not in err
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["2"]
    assert shop.run("pretrain", **settings) == 0
    assert "Continuing from step 2" in capsys.readouterr().out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_while_reporting(shop, capsys, monkeypatch):
    folder = shop.root / "full_metrics"
    folder.mkdir()
    settings = {"MODEL_DIR": folder, "MIXTURE": shop.text, "TRAIN_STEPS": 2}
    settings |= {"pretrain__Config__num_samples": 0, "pretrain__Config__eval_split": "None"}
    original = metrics.Writer.start

    def start(self, step):
        original(self, step)
        (folder / "metrics.jsonl").symlink_to("/dev/full")

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Writer, "start", start)
        assert shop.run("pretrain", **settings) == 2
    (folder / "metrics.jsonl").unlink()
    err = capsys.readouterr().err
    assert "metrics.jsonl cannot be written: No space left on device" in err
    assert "Traceback" not in err


def test_a_full_disk_while_answering(shop, pretrained, capsys, monkeypatch):
    prompts = write_lines(shop.root / "prompts.txt", ["你好", "再见"])
    folder = shop.root / "full_answers"
    command = {"MODEL_DIR": folder, "INIT_FROM": pretrained}
    with full_disk(monkeypatch, infer, "_write", folder / "predictions.jsonl"):
        assert shop.run("infer", str(prompts), **command) == 2
    err = capsys.readouterr().err
    assert "The disk is full while writing" in err and "Traceback" not in err
    assert shop.run("infer", str(prompts), **command) == 0
    assert len(rows(folder / "predictions.jsonl")) == 2


# Text that is not clean.


def test_invalid_utf8_and_empty_lines_are_counted_reported_and_skipped(shop, capsys):
    path = shop.root / "messy.txt"
    good = [f"第{number}行是完整的一句话。" for number in range(60)]
    lines = [line.encode() for line in good]
    lines[10:10] = [b"", "这一行坏了".encode()[:-1], b"   ", b"\xff\xfe\xfd"]
    path.write_bytes(b"\n".join(lines) + b"\n")
    folder = shop.root / "messy_cache"
    mixture = f"{data_sources.FILE_PREFIX}{path}"
    assert shop.run("cache", MIXTURE=mixture, CACHE_DIR=folder) == 0
    out = capsys.readouterr().out
    assert "skipped 2 empty, 2 invalid_utf8" in out
    manifests = {
        split: json.loads((cache.split_path(folder, mixture, split) / "manifest.json").read_text())
        for split in ("train", "validation")
    }
    assert sum(m["num_examples"] for m in manifests.values()) == 60
    assert all(m["skipped"] == {"empty": 2, "invalid_utf8": 2} for m in manifests.values())


def test_messy_prompts_are_counted_and_skipped(shop, pretrained, capsys):
    path = shop.root / "messy_prompts.txt"
    path.write_bytes("你好\n\n再见\n".encode() + b"\xff\xfe\n")
    folder = shop.root / "messy_answers"
    assert shop.run("infer", str(path), MODEL_DIR=folder, INIT_FROM=pretrained) == 0
    assert "2 answers; skipped 1 empty, 1 invalid_utf8" in capsys.readouterr().out
    assert [row["inputs"] for row in rows(folder / "predictions.jsonl")] == ["你好", "再见"]


def test_the_quickstart_names_what_is_not_installed(shop, capsys, monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "snownlp" else real(name, *a)
    )
    words = ["quickstart", f"--gin.MODEL_DIR={shop.root / 'new'}"]
    refused(shop, capsys, words, ["snownlp", "-e '.[quickstart]'"])
    assert quickstart.PROMPTS
