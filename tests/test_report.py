"""report.md and its pictures."""

import errno
import html
import io
import json
import math
import re

import numpy as np
import pytest
from PIL import Image

from chatyuan import plots, report
from chatyuan.errors import UserError
from chatyuan.metrics import Writer
from chatyuan.report import Section, combine_reports, escape, table, write_report


def train(folder, steps=200, every=5, **more):
    """Writes what a run of `steps` leaves behind."""
    with Writer(folder, total_steps=steps, tensorboard=False, stream=io.StringIO()) as writer:
        for step in range(every, steps + 1, every):
            row = {
                "loss": 2 + 7 * math.exp(-step / 30),
                "learning_rate": 1e-3 * min(1, step / 20),
                "grad_norm": 1 + 9 * math.exp(-step / 10),
                "seconds_per_step": 0.5,
                "tokens_per_second": 40_000.0,
                "tokens_seen": 20_000 * step,
                "nonfinite_steps": int(step == every),
            } | more
            if step % (steps // 4) == 0:
                row |= {"eval/loss": row["loss"] + 0.1, "评测/准确率": step / steps}
                out = "好" if step == steps else "的的"
                writer.write_samples(
                    step, [{"task": "t", "input": "酒店|很好", "output": out, "target": "好"}]
                )
            writer.write(step, row)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"))


def test_report_of_a_run(run):
    path = write_report(
        run,
        title="预训练: a_b *tiny*",
        config_text="X = '```'\n",
        data_table=[{"source": "reviews", "documents": 17400, "tokens": 1234567, "epochs": 3.25}],
        evaluation={"sentiment accuracy": 0.8345678},
        facts={"parameters": 22_700_000},
        sections=[Section("Next", text="Run `x`.")],
    )
    text = path.read_text()
    assert text.startswith("# 预训练: a_b \\*tiny\\*\n")
    assert "| parameters | 22,700,000 |" in text and "| steps | 200 |" in text
    assert re.search(r"training loss, last report \| 2\.0089 \(step 200\)", text)
    assert "| tokens seen, without padding | 4M |" in text
    assert "| tokens per second, median | 40,000 |" in text
    assert "| training time, without evaluation | about 1:40 |" in text
    assert "| steps skipped (gradient not finite) | 1 |" in text
    assert "| reviews | 17,400 | 1,234,567 | 3.25 |" in text
    assert "| sentiment accuracy | 0.8346 |" in text
    assert "| 评测/准确率 | 0.25 | 0.25 | 1 | 1 |" in text
    # Before and after, side by side; the bar inside the text does not split the cell.
    assert "| task | input | output at step 50 | output at step 200 | target |" in text
    assert "| t | 酒店\\|很好 | 的的 | 好 | 好 |" in text
    assert "````\nX = '```'\n````" in text  # the fence is longer than the one inside
    assert "## Next\n\nRun `x`." in text
    links = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
    names = ("loss", "learning_rate", "throughput", "grad_norm", "evaluation")
    assert links == [f"plots/{name}.png" for name in names]
    for link in links:
        picture = np.asarray(Image.open(run / link).convert("L"), float)
        assert min(picture.shape) > 250 and picture.std() > 8  # something is drawn on it
    assert not list(run.rglob("*.tmp"))


def test_report_before_the_first_figures(tmp_path):
    text = write_report(tmp_path / "new", title="x").read_text()
    assert "No figures were reported yet." in text and "![" not in text
    text = write_report(tmp_path / "new", title="x", evaluation={"accuracy": 0.5}).read_text()
    assert "accuracy" in text and "No figures" not in text
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": None}) + "\n{bro")
    text = write_report(tmp_path, title="x").read_text()
    assert "| steps | 1 |" in text and not (tmp_path / "plots").exists()


def test_null_and_missing_figures_are_left_out_of_curves(tmp_path):
    rows = [
        {"step": 1, "loss": None},
        {"step": 2, "loss": 3.0},
        {"step": 3},
        {"step": 4, "loss": 1},
    ]
    assert plots.series(rows, "loss") == ([2.0, 4.0], [3.0, 1.0])
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [p.path.name for p in plots.draw(tmp_path)] == ["loss.png"]


def test_smoothing_keeps_lines_and_removes_noise():
    line = [2.0 * i for i in range(50)]
    np.testing.assert_allclose(plots.smooth(line, 7), line)  # no lag at the ends either
    noise = np.random.default_rng(0).normal(size=1000)
    assert np.std(plots.smooth(list(noise), 101)) < 0.25 * np.std(noise)
    assert plots.smooth([1.0], 9) == [1.0] and plots.smooth([], 3) == []


def test_every_curve_is_drawn_with_few_points_flat_or_negative_values(tmp_path):
    train(tmp_path, steps=8, every=2, loss=-1.0, grad_norm=0.0, learning_rate=0.0, mfu=0.4)
    assert len(plots.draw(tmp_path)) == 5


def test_combined_report_links_into_the_run_folders(tmp_path):
    train(tmp_path / "my runs" / "sft")
    path = combine_reports(
        tmp_path / "out",
        title="Quickstart",
        text="Everything is here.",
        sections=[
            Section("1. The tokenizer", table={"pieces": 8000, "lossless": True}),
            Section("Tuning", model_dir=tmp_path / "my runs" / "sft", config_text="A = 1"),
            Section("Replies", samples=[{"input": "你好", "output": "长" * 100 + "\n\n# 标题"}]),
        ],
    )
    text = path.read_text()
    assert "- [1\\. The tokenizer](#1-the-tokenizer)\n- [Tuning](#tuning)" in text
    assert "| pieces | 8,000 |\n| lossless | yes |" in text
    for link in re.findall(r"!\[[^]]*\]\(([^)]*)\)", text):
        assert (tmp_path / "out" / link.replace("%20", " ")).resolve().is_file()
        assert link.startswith("../my%20runs/sft/plots/")
    assert "<details><summary>Configuration</summary>\n\n```\nA = 1\n```" in text
    replies = text.split("## Replies")[-1]
    assert f"> {'长' * 100}  \n> \n> \\# 标题" in replies  # long texts are quoted, line by line


@pytest.mark.parametrize(
    "text",
    [
        "<script>x</script> &lt; a|b",
        "*a* _b_ __c__ `d` [e](f) ![g](h) ~~i~~ $j$",
        "# x\n## y\n- z\n+ z\n* z\n1. a\n2) b\n---\n===",
        "    code\n\tcode",
        "snake_case 3.5 -1.5 2.50 小元：你好！#1",
    ],
)
def test_escaped_text_is_shown_as_it_is(text):
    """No unescaped markup is left, and undoing the escapes restores the text."""
    escaped = escape(text)
    assert not re.search(r"(?<!\\)[`*\[\]|~$]|[<>]", escaped)
    for line in escaped.split("\n"):
        assert not re.match(r"\s*([-+] |#|\d+[.)]\s|---|===| {4})", line)
    shown = html.unescape(re.sub(r"\\([!-/:-@\[-`{-~])", r"\1", escaped)).replace("\xa0", " ")
    assert shown == text.replace("\t", " ")


def test_numbers_and_ordinary_text_stay_readable_in_the_file():
    assert escape("bits_per_byte 0.834 -1.5") == "bits_per_byte 0.834 -1.5"
    assert escape("\x1b[31m\x00") == "\ufffd\\[31m\ufffd"


def test_a_folder_that_cannot_be_written(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="report.md cannot be written"):
        write_report(tmp_path / "file" / "x", title="x")
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(plots.os, "replace", lambda *_: (_ for _ in ()).throw(full))
    with pytest.raises(UserError, match="loss.png cannot be written: No space left on device"):
        plots.draw(run)


def test_tables():
    rows = [{"a": 1, "b": "x\ny"}, {"a": 2.5, "c": None}]
    assert table(rows) == (
        "| a | b | c |\n|---:|---|---:|\n| 1 | x<br>y |  |\n| 2.5 |  |  |"
    )  # fmt: skip
    assert report.table({"n": 1234}) == "| | |\n|---|---|\n| n | 1,234 |"
