"""The stage dpo by its command: ln 2 at first, it learns, its reference is kept and never stale.

The model it starts from is tuned on the chosen answers of the same preferences.
"""

import json
import math

import numpy as np
import pytest
from workshop import arrays, held_out_preferences, rows, untimed

from chatyuan.stages import _reference, _supervised

STEPS = {"TRAIN_STEPS": 12, "EVAL_PERIOD": 6, "CHECKPOINT_PERIOD": 6, "LOG_PERIOD": 1,
         "dpo__Config__num_samples": 0}  # fmt: skip
SHORT = {**STEPS, "TRAIN_STEPS": 1, "EVAL_PERIOD": 0}
LOSS = "preference_losses__PreferenceLoss__"


@pytest.fixture(scope="module")
def chosen(preferred, pretrained):
    """A model tuned on the chosen answers: the mixture of preferences, given to sft."""
    folder = preferred.root / "dpo_reference"
    settings = {"MODEL_DIR": folder, "MIXTURE": preferred.preferences, "INIT_FROM": pretrained}
    numbers = {"TRAIN_STEPS": 30, "EVAL_PERIOD": 30, "CHECKPOINT_PERIOD": 15, "LOG_PERIOD": 15}
    assert preferred.run("sft", **settings, **numbers, sft__Config__num_samples=0) == 0
    return folder


@pytest.fixture(scope="module")
def dpo(preferred, chosen):
    """Runs the stage in a folder of that name; returns its status."""

    def run(name, *more, **settings):
        given = {"MIXTURE": preferred.preferences, "INIT_FROM": chosen, **STEPS, **settings}
        given.setdefault("MODEL_DIR", preferred.root / f"dpo_{name}")
        return preferred.run("dpo", *more, **given)

    return run


@pytest.fixture(scope="module")
def trained(dpo, preferred):
    assert dpo("trained", dpo__Config__num_samples=2, dpo__Config__alarm_nats=1e-3) == 0
    return preferred.root / "dpo_trained"


def files(preferred):
    folder = preferred.cache / _reference.FOLDER
    return {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_tuning_on_preferences_learns_the_chosen_answers(chosen):
    first, last = (rows(chosen / "metrics.jsonl")[place] for place in (0, -1))
    assert last["loss"] < first["loss"]
    assert last["eval/loss"] < 3.0


def test_at_first_the_policy_is_the_reference(trained):
    first = rows(trained / "metrics.jsonl")[0]
    assert first["step"] == 1
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["reward_margin"] == pytest.approx(0, abs=1e-6)
    assert first["chosen_fall"] == pytest.approx(0, abs=1e-5)
    assert first["rejected_fall"] == pytest.approx(0, abs=1e-5)
    assert first["grad_norm"] > 0


def test_it_learns_what_is_preferred_and_reports_it(trained):
    found = [row for row in rows(trained / "metrics.jsonl") if "eval/accuracy" in row]
    assert [row["step"] for row in found] == [6, 12]
    last = found[-1]
    assert last["eval/accuracy"] >= 0.95 and last["eval/loss"] < 0.5
    assert last["eval/pairs"] == len(held_out_preferences())
    assert last["eval/reward_margin"] == pytest.approx(
        last["eval/chosen_reward"] - last["eval/rejected_reward"], abs=1e-5
    )
    assert last["eval/chosen_log_prob"] > last["eval/rejected_log_prob"]
    assert json.loads((trained / "pairs.json").read_text(encoding="utf-8"))["step"] == 12
    assert (trained / "plots" / "log_probs.png").stat().st_size > 1000
    samples = rows(trained / "samples.jsonl")
    assert len(samples) == 4 and {"input", "target", "output"} <= samples[0].keys()
    assert "Chosen and rejected answers" in (trained / "report.md").read_text(encoding="utf-8")


def test_a_fall_of_the_chosen_answers_is_an_alarm(dpo, preferred, capsys):
    """At such a rate plain DPO lowers both answers, at first at least."""
    assert dpo("fallen", LEARNING_RATE=0.05, EVAL_PERIOD=3, dpo__Config__alarm_nats=0.25) == 0
    folder = preferred.root / "dpo_fallen"
    found = [row for row in rows(folder / "metrics.jsonl") if "eval/alarm" in row]
    assert [row["eval/alarm"] for row in found] == [row["eval/chosen_fall"] > 0.25 for row in found]
    alarms = [row for row in found if row["eval/alarm"]]
    assert alarms and alarms[0]["eval/chosen_fallen"] > 0
    # What the accuracy does not show: it rises all the same.
    assert max(row["eval/accuracy"] for row in found) > 0.9
    told = capsys.readouterr().out
    assert f"WARNING: step {alarms[0]['step']}: the chosen answers" in told
    assert "**Alarm** at step" in (folder / "report.md").read_text(encoding="utf-8")


def test_a_resumed_run_is_the_uninterrupted_one(dpo, trained, preferred):
    extra = {"dpo__Config__num_samples": 2, "dpo__Config__alarm_nats": 1e-3}
    assert dpo("half", TRAIN_STEPS=6, **extra) == 0
    assert dpo("half", **extra) == 0
    half = preferred.root / "dpo_half"
    whole, resumed = arrays(trained, 12), arrays(half, 12)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)
    assert untimed(trained) == untimed(half)


def test_microbatches_and_mesh_change_neither_loss_nor_gradient(dpo, trained, preferred):
    first = rows(trained / "metrics.jsonl")[0]
    assert dpo("micro", MICROBATCHES=2, MESH="{'data': 4, 'tensor': 2}", **SHORT) == 0
    row = rows(preferred.root / "dpo_micro" / "metrics.jsonl")[0]
    for name in ("loss", "grad_norm", "chosen_log_prob", "rejected_log_prob"):
        assert row[name] == pytest.approx(first[name], rel=1e-5), name


def test_the_reference_is_computed_once_and_shared(dpo, trained, preferred, monkeypatch, capsys):
    """Only what precedes training runs here."""
    only = lambda config, title, assemble: assemble(config).prepare()  # noqa: E731
    monkeypatch.setattr(_supervised, "run", only)
    before = files(preferred)
    assert {path.suffix for path in before} == {".npz"}
    with monkeypatch.context() as patched:
        patched.setattr(_reference, "_computed", None)
        assert dpo("shared", **{f"{LOSS}beta": 0.3}) == 0
    assert files(preferred) == before
    # Other lengths and another checkpoint are other files; a damaged one is computed again.
    assert dpo("shorter", TARGET_LENGTH=8) == 0
    assert dpo("earlier", INIT_FROM=preferred.root / "dpo_reference" / "checkpoints" / "15") == 0
    assert len(files(preferred)) == len(before) + 4  # train and validation
    damaged = next(iter(before))
    with np.load(damaged) as stored:
        whole = stored["log_probs"]
    content = damaged.read_bytes()
    damaged.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert dpo("mended") == 0
    assert "is damaged; its log-probs are computed again" in capsys.readouterr().out
    with np.load(damaged) as stored:
        np.testing.assert_array_equal(stored["log_probs"], whole)


def test_a_run_does_not_go_on_against_another_reference(dpo, preferred, capsys):
    earlier = preferred.root / "dpo_reference" / "checkpoints" / "15"
    assert dpo("moved", INIT_FROM=earlier, **SHORT) == 0
    first = rows(preferred.root / "dpo_moved" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert dpo("moved", **{**SHORT, "TRAIN_STEPS": 2}) == 2
    assert "is not the reference" in capsys.readouterr().err


def test_losses_without_a_reference_store_none(dpo, preferred, tmp_path):
    for loss in ("orpo", "simpo"):
        settings = {f"{LOSS}loss": f"'{loss}'", "dpo__Config__reference_dir": tmp_path / "none"}
        assert dpo(loss, **{**SHORT, **settings}) == 0
        row = rows(preferred.root / f"dpo_{loss}" / "metrics.jsonl")[0]
        assert math.isfinite(row["loss"]) and "chosen_fall" not in row
    assert not (tmp_path / "none").exists()


def test_kto_has_answers_of_other_prompts(dpo, preferred, capsys):
    settings = {**SHORT, f"{LOSS}loss": "'kto'"}
    assert dpo("kto", **settings) == 0
    row = rows(preferred.root / "dpo_kto" / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(0.5, abs=1e-6)  # sigma(0) of both halves
    assert dpo("kto_micro", MICROBATCHES=2, MESH="{'data': 4, 'tensor': 2}", **settings) == 2
    assert "mean over the whole batch" in capsys.readouterr().err


def test_what_it_makes_is_an_ordinary_model(preferred, shop, trained, tmp_path):
    asked = tmp_path / "prompts.txt"
    asked.write_text("今天，早餐怎么样？\n", encoding="utf-8")
    folder = tmp_path / "answers"
    assert preferred.run("infer", str(asked), INIT_FROM=trained, MODEL_DIR=folder) == 0
    settings = {"INIT_FROM": trained, "MODEL_DIR": tmp_path / "evaluated"}
    assert preferred.run("evaluate", MIXTURE=shop.pairs, **settings) == 0


def test_a_dry_run_shows_pairs_and_writes_nothing(dpo, preferred, capsys):
    before = preferred.files()
    assert dpo("dry", "--dry_run", TARGET_LENGTH=10) == 0
    shown = capsys.readouterr().out
    assert "rank 0:" in shown and "not computed yet" in shown and "memory per device" in shown
    assert preferred.files() == before


def test_mistakes_are_told_before_anything_is_written(dpo, preferred, shop, capsys):
    before = preferred.files()
    for settings, message in (
        ({"MIXTURE": shop.reviews}, "not preferences"),
        ({"INIT_FROM": None}, "INIT_FROM must be set"),
        ({f"{LOSS}loss": "'dpp'"}, "Did you mean dpo"),
        ({f"{LOSS}label_smoothing": 0.1}, "belongs to cdpo, robust"),
        ({"dpo__Config__pairs": "'worst'"}, "best_worst"),
        ({"dpo__Config__alarm_nats": -1.0}, "must be above 0"),
        ({"loader__DataConfig__concatenate": True}, "does not apply to preferences"),
        ({"model__ModelConfig__sequence_parallel": True}, "does not apply to dpo"),
        ({"dpo__Config__reference_dir": shop.vocabulary}, "is a file, not a folder"),
    ):
        assert dpo("wrong", **settings) == 2
        told = capsys.readouterr().err
        assert message in told, told
    assert preferred.files() == before
