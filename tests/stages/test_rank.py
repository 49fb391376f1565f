"""The stage rank by its command: served, saved, ended, resumed, and read by cache for reward."""

import contextlib
import json
import signal
import subprocess
import sys
import urllib.request

import numpy as np
import pytest
from workshop import BLAME, PLACES, PRAISE, write_lines

from chatyuan import main
from chatyuan.data.loader import DataConfig
from chatyuan.data.preferences import PreferenceLoader
from chatyuan.text.vocabulary import Vocabulary

COUNT = 12


@pytest.fixture(scope="module")
def drafts(sources):
    """Folders as `infer` leaves them, of a good and of a bad model, and a file of a third."""
    folder = sources.root / "drafts"
    prompts = [f"{place}怎么样？" for place in PLACES][:COUNT]
    for name, texts in (("tuned", PRAISE), ("early", BLAME)):
        (folder / name).mkdir(parents=True)
        write_lines(folder / name / "predictions.jsonl", [
            {"index": i, "inputs": prompt, "prediction": texts[i % len(texts)], "finished": True}
            for i, prompt in enumerate(prompts)
        ])  # fmt: skip
    write_lines(folder / "third.jsonl", [{"prompt": p, "answers": ["还行"]} for p in prompts])
    return [str(folder / name) for name in ("tuned", "early", "third.jsonl")]


@contextlib.contextmanager
def served(words):
    """(address, process) of a stage that runs in a process of its own; ended by SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "run.py", *words],
        cwd=main.__file__.rsplit("/", 2)[0],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        try:
            lines = []
            while not lines or not lines[-1].startswith("The page: "):
                lines.append(process.stdout.readline())
                assert lines[-1], lines
            yield lines[-1].split()[-1], process
        finally:
            process.kill()


def call(address, name, **request):
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{address}api/{name}", body, headers), timeout=20
    ) as answer:
        return json.load(answer)


def rank_all(address, name, most):
    """Ranks as a person who likes praise would; returns how many."""
    item = call(address, "next", annotator=name)["item"]
    for done in range(most):
        if item is None:
            return done
        ranks = [1 if t in PRAISE else 3 if t in BLAME else 2 for t in item["answers"]]
        item = call(address, "save", annotator=name, item=item["key"], ranks=ranks, seconds=2.5)[
            "item"
        ]
    return most


def ended(process):
    process.send_signal(signal.SIGTERM)
    out = process.stdout.read()
    assert process.wait(30) == 0, out
    return out


def test_what_is_ranked_is_saved_resumed_and_read_by_reward(sources, drafts):
    folder = sources.root / "ranked"
    words = ["rank", *drafts, f"--gin.MODEL_DIR={folder}", "--gin.rank.Config.port=0",
             "--gin.rank.Config.overlap_period=4"]  # fmt: skip
    with served(words) as (address, process):
        assert rank_all(address, "甲", 5) == 5
        process.kill()
    with served(words) as (address, process):
        assert rank_all(address, "甲", COUNT) == COUNT - 5
        assert rank_all(address, "乙", COUNT) == 3
        refused = subprocess.run(
            [sys.executable, "run.py", *words], cwd=main.__file__.rsplit("/", 2)[0],
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert refused.returncode == 2
        assert f"in use by another process (process {process.pid})" in refused.stderr
        out = ended(process)
    assert "12 of 12 prompts are finished" in out
    assert "prompts ranked by two 3" in out and "same verdict on a pair 1" in out
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert "| tuned | 30 | 1 |" in report and "Kendall" in report

    mixture = f"file:{folder / 'rankings.jsonl'}"
    assert sources.run("cache", MIXTURE=mixture) == 0
    config = DataConfig(mixture=mixture, cache_dir=str(sources.cache), input_length=48,
                        target_length=24, batch_size=COUNT)  # fmt: skip
    vocabulary = Vocabulary(sources.vocabulary)
    batch = PreferenceLoader(config, vocabulary).batch(0)
    assert batch["answers"].shape[:2] == (COUNT, 3)
    for row in np.flatnonzero(batch["rows"] >= 0):
        answers = [
            vocabulary.decode([token for token in tokens if token > 1])
            for tokens in batch["answers"][row].tolist()
        ]
        by_rank = dict(zip(batch["ranks"][row].tolist(), answers, strict=True))
        assert by_rank[0] in PRAISE and by_rank[1] == "还行" and by_rank[2] in BLAME


def test_a_dry_run_shows_two_and_writes_nothing(sources, drafts, capsys):
    folder = sources.root / "dry_rank"
    assert main.main(["rank", *drafts, f"--gin.MODEL_DIR={folder}", "--dry_run"]) == 0
    shown = capsys.readouterr().out
    assert "12 prompts with 3 to 3 different answers from tuned, early, third." in shown
    assert shown.count("怎么样？") == 2 and "[early]" in shown
    assert not folder.exists()


def test_mistakes_are_told_before_anything_is_written(sources, drafts, capsys, pretrained):
    folder = sources.root / "wrong_rank"

    def told(*words, model_dir=folder):
        assert main.main(["rank", *words, f"--gin.MODEL_DIR={model_dir}"]) == 2
        assert not folder.exists()
        return capsys.readouterr().err

    assert "takes the drafts" in told()
    assert "There is no file" in told("nowhere.jsonl")
    assert "no prompt has two different answers" in told(drafts[2])
    assert "should be 2 to 9" in told(*drafts, "--gin.rank.Config.answers=10")
    assert "is below 0" in told(*drafts, "--gin.rank.Config.overlap_period=-1")
    assert "of categories" in told(*drafts, "--gin.rank.Config.taxonomy='nowhere.txt'")
    assert "every address" in told(*drafts, "--gin.rank.Config.host='0.0.0.0'")
    assert "another configuration" in told(*drafts, model_dir=pretrained)
