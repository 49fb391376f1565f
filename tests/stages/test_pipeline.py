"""Every stage after the other, on small files: what each leaves, and that the model has learned."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest
from workshop import PAIRS, rows, write_lines

from chatyuan import configs
from chatyuan.evaluate import text_metrics
from chatyuan.evaluate.baseline import CharNgramClassifier
from chatyuan.models import build
from chatyuan.stages import _run_folder
from chatyuan.text.vocabulary import Vocabulary

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_tokenizer_leaves_a_vocabulary_and_its_figures(sources):
    vocabulary = Vocabulary(sources.vocabulary)
    stats = json.loads((sources.root / "zh.model.json").read_text(encoding="utf-8"))
    assert vocabulary.size == stats["pieces"] == 640
    assert len(vocabulary.sentinel_ids) == 20
    text = "今天，这里的早餐非常满意。\n价格\t不错"
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_the_cache_of_a_file_has_its_splits_counted(shop):
    folder = shop.cache
    assert len(list(folder.glob("*.mixture.json"))) >= 3  # other tests make more
    manifests = [json.loads(path.read_text()) for path in folder.glob("*/*/manifest.json")]
    found = {(m["task"], m["split"]): m["num_examples"] for m in manifests}
    assert found[shop.pairs, "train"] == len(PAIRS)
    assert found[shop.reviews, "test"] == 27
    texts = len((shop.root / "text.txt").read_text(encoding="utf-8").splitlines())
    assert found[shop.text, "train"] + found[shop.text, "validation"] == texts


def test_a_cache_that_is_up_to_date_is_not_built_again(shop, capsys):
    before = shop.files()
    assert shop.run("cache", MIXTURE=shop.text) == 0
    assert capsys.readouterr().out.count("up to date") == 2
    assert shop.files() == before


def test_a_training_run_leaves_what_is_promised(shop, pretrained):
    names = {path.name for path in pretrained.iterdir()}
    assert names == {
        "config.gin", "config.json", "metrics.jsonl", "samples.jsonl", "report.md", "plots",
        "checkpoints", "tensorboard", "vocabulary.model",
    }  # fmt: skip
    reports = rows(pretrained / "metrics.jsonl")
    assert [row["step"] for row in reports] == [2, 4, 6, 8]
    promised = {"step", "loss", "learning_rate", "grad_norm", "seconds_per_step",
                "tokens_per_second", "accuracy", "nonfinite_steps", "tokens_seen"}  # fmt: skip
    for row in reports:
        assert promised <= set(row)
        assert all(math.isfinite(value) for value in row.values())
        assert ("eval/loss" in row) == (row["step"] in (4, 8))
    assert reports[-1]["loss"] < reports[0]["loss"] < math.log(768) + 1
    samples = rows(pretrained / "samples.jsonl")
    assert {row["step"] for row in samples} == {4, 8}
    assert all("<extra_id_0>" in row["input"] and row["target"] for row in samples)
    assert {path.name for path in (pretrained / "checkpoints").iterdir()} == {"4", "8"}
    report = (pretrained / "report.md").read_text(encoding="utf-8")
    for part in ("# Pretraining", "## Data", "text.txt", "plots/loss.png", "ModelConfig"):
        assert part in report
    for plot in (pretrained / "plots").iterdir():
        assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_saved_configuration_is_the_one_that_ran(shop, pretrained):
    saved = configs.load("pretrain", [str(pretrained / "config.gin")])
    assert saved.model.embed_dim == 32 and saved.data.mixture == shop.text
    assert saved.model_dir == str(pretrained)
    as_json = json.loads((pretrained / "config.json").read_text(encoding="utf-8"))
    assert configs.from_json(type(saved), as_json) == saved


def test_a_run_knows_its_model_and_vocabulary_by_itself(shop, pretrained):
    model, vocabulary = _run_folder.read_model(str(pretrained))
    assert vocabulary.path == pretrained / "vocabulary.model"
    assert vocabulary.sha256 == Vocabulary(shop.vocabulary).sha256
    step = str(pretrained / "checkpoints" / "8")
    assert _run_folder.read_model(step)[0] == model
    assert build(model).num_params == 2 * 768 * 32 + sum((
        # encoder: q k v o, two in and one out, two norms; decoder: twice the attention, three norms
        4 * 32 * 32 + 3 * 32 * 64 + 2 * 32,
        8 * 32 * 32 + 3 * 32 * 64 + 3 * 32,
        2 * 32,  # final norms
        2 * 2 * 32,  # relative biases
    ))  # fmt: skip


def test_tuning_starts_from_the_pretrained_weights(tuned, pretrained):
    first, *_, last = rows(tuned / "metrics.jsonl")
    assert "# Instruction tuning" in (tuned / "report.md").read_text(encoding="utf-8")
    assert last["eval/loss"] < 0.05 and last["eval/accuracy"] == 1.0
    assert json.loads((tuned / "config.json").read_text())["init_from"] == str(pretrained)


def test_eight_pairs_are_learned_by_heart_from_their_first_token(shop, tuned):
    """The decoder starts from padding and learns the first token too (clue-ai/ChatYuan#11)."""
    prompts = write_lines(shop.root / "prompts.jsonl", [{"inputs": a, "id": a} for a in PAIRS])
    folder = shop.root / "answers"
    assert shop.run("infer", str(prompts), MODEL_DIR=folder, INIT_FROM=tuned) == 0
    answers = rows(folder / "predictions.jsonl")
    assert [row["index"] for row in answers] == list(range(8))
    assert [row["id"] for row in answers] == list(PAIRS)
    assert {row["inputs"]: row["prediction"] for row in answers} == PAIRS
    assert all(row["finished"] for row in answers)
    last = rows(tuned / "samples.jsonl")[-8:]
    assert {row["input"]: row["output"] for row in last} == PAIRS
    assert {row["input"]: row["target"] for row in last} == PAIRS


def test_infer_continues_after_the_last_complete_line(shop, tuned, capsys):
    prompts = write_lines(shop.root / "prompts.txt", [*PAIRS][:5] + [*PAIRS][6:])
    folder = shop.root / "resumed"
    command = {"MODEL_DIR": folder, "INIT_FROM": tuned}
    assert shop.run("infer", str(prompts), **command) == 0
    path = folder / "predictions.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == len(prompts.read_text(encoding="utf-8").splitlines())
    # Killed while the fourth line was being written.
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    capsys.readouterr()
    assert shop.run("infer", str(prompts), **command) == 0
    assert "holds 3 answers already; continuing after them." in capsys.readouterr().out
    assert path.read_bytes() == whole
    assert shop.run("infer", str(prompts), **command) == 0
    assert path.read_bytes() == whole


def test_generated_answers_are_measured(shop, tuned, capsys):
    folder = shop.root / "evaluated"
    settings = {"MIXTURE": shop.pairs, "INIT_FROM": tuned, "MODEL_DIR": folder, "BATCH_SIZE": 8,
                "INPUT_LENGTH": 48, "TARGET_LENGTH": 24}  # fmt: skip
    assert shop.run("evaluate", **settings) == 0
    (row,) = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["tasks"]
    assert (row["task"], row["examples"]) == (shop.pairs, 8)
    assert row["exact match"] == row["rouge_l"] == 1.0 and row["chrf"] > 0.99
    answers = list(PAIRS.values())
    assert row["characters"] == sum(map(len, answers)) / len(answers)
    assert row["distinct-2"] == text_metrics.distinct(answers, 2)
    predictions = rows(folder / "predictions.jsonl")
    assert {p["inputs"]: p["prediction"] for p in predictions} == PAIRS
    vocabulary = Vocabulary(shop.vocabulary)
    tokens = sum(len(vocabulary.encode(text)) + 1 for text in PAIRS.values())
    size = sum(len(text.encode()) for text in PAIRS.values())
    assert row["bits per byte"] == pytest.approx(row["loss"] * tokens / math.log(2) / size)
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "# Evaluation on test" in report and "辽阔" in report


def test_a_judge_labels_the_answers(shop, tuned, capsys):
    folder = shop.root / "judged"
    settings = {"MIXTURE": shop.pairs, "INIT_FROM": tuned, "MODEL_DIR": folder, "BATCH_SIZE": 8,
                "INPUT_LENGTH": 48, "TARGET_LENGTH": 24}  # fmt: skip
    settings |= {"evaluate__Config__judge": repr(shop.reviews)}
    assert shop.run("evaluate", **settings) == 2
    assert "a judge must not know it" in capsys.readouterr().err
    settings |= {"evaluate__Config__judge_split": repr("train")}
    assert shop.run("evaluate", **settings) == 0
    (row,) = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["tasks"]
    train, test = (
        [(e["input"], e["target"]) for e in rows(shop.root / "reviews" / f"{split}.jsonl")]
        for split in ("train", "test")
    )
    judge = CharNgramClassifier(*zip(*train, strict=True))
    verdicts = judge.predict(list(PAIRS.values()))
    assert set(judge.labels) == {"好评", "差评"}
    for label in judge.labels:
        assert row[f"judged {label}"] == verdicts.count(label) / len(PAIRS)
    assert row["judge's accuracy"] == judge.accuracy(*zip(*test, strict=True)) > 0.5


def test_choices_are_counted(shop, pretrained):
    folder = shop.root / "chosen"
    settings = {"MIXTURE": shop.reviews, "INIT_FROM": pretrained, "MODEL_DIR": folder}
    settings |= {"BATCH_SIZE": 16, "INPUT_LENGTH": 48, "TARGET_LENGTH": 24}
    settings |= {"evaluate__Config__max_examples": 16}
    settings |= {"evaluate__Config__baseline": repr((shop.reviews,))}
    assert shop.run("evaluate", **settings) == 0
    (row,) = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["tasks"]
    predictions = rows(folder / "predictions.jsonl")
    assert row["examples"] == len(predictions) == 16
    right = sum(p["prediction"] == p["targets"] for p in predictions)
    assert all(p["prediction"] in p["answer_choices"] for p in predictions)
    assert row["accuracy"] == right / 16
    spread = math.sqrt(row["accuracy"] * (1 - row["accuracy"]) / 16)
    assert row["standard error"] == pytest.approx(spread)
    praised = sum(p["targets"] == "好评" for p in predictions)
    assert row["majority"] == max(praised, 16 - praised) / 16
    train = rows(shop.root / "reviews" / "train.jsonl")
    fitted = CharNgramClassifier([e["input"] for e in train], [e["target"] for e in train])
    expected = fitted.accuracy(
        [p["inputs"] for p in predictions], [p["targets"] for p in predictions]
    )
    assert row["linear baseline"] == pytest.approx(expected) and expected > 0.5
    assert math.isfinite(row["loss"]) and row["loss"] > 1


def test_the_report_can_be_written_again(shop, pretrained, tmp_path):
    path = pretrained / "report.md"
    before = path.read_text(encoding="utf-8")
    path.unlink()
    assert shop.run("report", VOCABULARY=None, CACHE_DIR=None, MODEL_DIR=pretrained) == 0
    after = path.read_text(encoding="utf-8")
    assert "plots/loss.png" in after and "ModelConfig" in after
    path.write_text(before, encoding="utf-8")


@pytest.mark.parametrize(
    "stage", ["tokenizer", "cache", "pretrain", "sft", "evaluate", "infer", "report", "quickstart"]
)
def test_help_lists_the_settings(shop, stage, capsys):
    assert shop.run(stage, "--help") == 0
    out = capsys.readouterr().out
    text = (ROOT / "gin" / "stages" / f"{stage}.gin").read_text(encoding="utf-8")
    macros = [line.split(" = ")[0] for line in text.splitlines() if line.split(" ")[0].isupper()]
    assert macros
    for name in macros:
        assert name in out, f"{name} should be listed by --help"


DRY = {
    "tokenizer": (("VOCABULARY={root}/new.model", "MIXTURE={text}"), "The first two:\n  "),
    "cache": (("CACHE_DIR={root}/new", "MIXTURE={reviews}"), "splits train, validation, test"),
    "pretrain": (
        ("MODEL_DIR={root}/new", "MIXTURE={text}", "TRAIN_STEPS=5"),
        "disk per checkpoint",
    ),
    "sft": (
        ("MODEL_DIR={root}/new", "MIXTURE={pairs}", "TRAIN_STEPS=5", "INIT_FROM={pretrained}"),
        "memory per device",
    ),
    "evaluate": (
        ("MODEL_DIR={root}/new", "MIXTURE={reviews}", "INIT_FROM={pretrained}"),
        "test: 27 examples",
    ),
    "infer": (("MODEL_DIR={root}/new", "INIT_FROM={pretrained}"), "parameters"),
    "report": (("MODEL_DIR={pretrained}",), "can be drawn"),
    "quickstart": (("MODEL_DIR={root}/new",), "python run.py pretrain"),
}


@pytest.mark.parametrize("stage", DRY)
def test_a_dry_run_shows_and_writes_nothing(shop, pretrained, stage, capsys):
    prompts = write_lines(shop.root / "prompts.txt", list(PAIRS))
    names = {"root": shop.root, "text": shop.text, "reviews": shop.reviews, "pairs": shop.pairs}
    settings = dict(
        word.format(**names, pretrained=pretrained).split("=", 1) for word in DRY[stage][0]
    )
    if stage in ("report", "quickstart"):
        settings |= {"VOCABULARY": None, "CACHE_DIR": None}
    before = shop.files()
    more = [str(prompts)] if stage == "infer" else []
    assert shop.run(stage, "--dry_run", *more, **settings) == 0
    out = capsys.readouterr().out
    assert DRY[stage][1] in out
    assert shop.files() == before


def test_a_dry_run_shows_rows_with_what_is_learned_in_brackets(shop, capsys):
    settings = {"MODEL_DIR": shop.root / "new", "MIXTURE": shop.pairs, "TRAIN_STEPS": 5}
    assert shop.run("sft", "--dry_run", **settings) == 0
    out = capsys.readouterr().out
    assert "row 0:" in out and "row 1:" in out
    assert "[</s>]" in out
    decoder = [line for line in out.splitlines() if line.startswith("  decoder segment")]
    assert decoder and all("[" in line.split(": ", 1)[1].split()[0] for line in decoder)
    for fact in ("parameters: ", "FLOPs per token: ", "memory per device: ", "disk per checkpoint"):
        assert fact in out
    assert "attention: dense (" in out and " keys on cpu: at most" in out


def test_a_stage_that_reads_a_cache_imports_neither_tensorflow_nor_seqio(shop, pretrained):
    code = (
        "import sys; from chatyuan.main import main; status = main(sys.argv[1:]); "
        "heavy = {'tensorflow', 'seqio', 'tensorflow_datasets', 'torch', 'tasks'}; "
        "print(sorted(heavy & set(sys.modules))); sys.exit(status)"
    )
    settings = {"MODEL_DIR": shop.root / "light", "MIXTURE": shop.text, "TRAIN_STEPS": 1}
    settings |= {"DROPOUT_RATE": 0.1, "pretrain__Config__num_samples": 0}
    words = [sys.executable, "-c", code, *shop.words("pretrain", **settings)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")
