"""The stage reward by its command: it learns, is evaluated, resumes bitwise, is read or refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from workshop import (
    RECIPE,
    arrays,
    held_out_preferences,
    preferences,
    rows,
    untimed,
    write_lines,
)

from chatyuan import checkpoints
from chatyuan.errors import UserError
from chatyuan.stages._run_folder import read_reward_model
from chatyuan.text.tokenizer import TokenizerConfig, train_tokenizer
from chatyuan.text.vocabulary import Vocabulary

STEPS = {"TRAIN_STEPS": 40, "EVAL_PERIOD": 20, "CHECKPOINT_PERIOD": 20, "LOG_PERIOD": 10,
         "DROPOUT_RATE": 0.1}  # fmt: skip


@pytest.fixture(scope="module")
def world(preferred, pretrained):
    """(workshop, command line of a reward run)."""
    sources = preferred
    recipe = [line for line in RECIPE.splitlines() if "decod" not in line or "layers" in line]
    write_lines(sources.root / "reward.gin", recipe)

    def reward(name, *more, **settings):
        defaults = {"MIXTURE": sources.preferences, "INIT_FROM": pretrained, **STEPS, **settings}
        file = f"--gin_file={sources.root / 'reward.gin'}"
        return sources.run("reward", file, *more, MODEL_DIR=sources.root / name, **defaults)

    return sources, reward


@pytest.fixture(scope="module")
def trained(world):
    shop, reward = world
    assert reward("rewarding") == 0
    return shop.root / "rewarding"


def test_it_learns_what_is_preferred_and_reports_it(trained):
    found = [row for row in rows(trained / "metrics.jsonl") if "eval/accuracy" in row]
    assert [row["step"] for row in found] == [20, 40]
    assert found[-1]["eval/accuracy"] >= 0.95 and found[-1]["eval/loss"] < 0.3
    assert found[-1]["eval/pairs"] == len(held_out_preferences())
    assert found[-1]["eval/accuracy_low"] < found[-1]["eval/accuracy"]
    table = json.loads((trained / "pairs.json").read_text(encoding="utf-8"))
    assert table["step"] == 40
    assert sum(row["pairs"] for row in table["by_gap"]) == found[-1]["eval/pairs"]
    assert (trained / "plots" / "accuracy_by_gap.png").stat().st_size > 1000
    assert "Accuracy by gap of scores" in (trained / "report.md").read_text(encoding="utf-8")


def test_the_backbone_is_that_of_the_run_it_starts_from(world, pretrained):
    shop, reward = world
    assert reward("untouched", TRAIN_STEPS=1, LEARNING_RATE=0.0) == 0
    before, after = arrays(pretrained, 8), arrays(shop.root / "untouched", 1)
    names = [n for n in before if n.startswith("params/") and "logits_dense" not in n]
    assert names
    for name in names:
        np.testing.assert_array_equal(before[name], after[f"params/backbone/{name[7:]}"])


def test_its_normalisation_is_stored_and_read(trained, sources):
    vocabulary = Vocabulary(sources.vocabulary)
    model, normalisation = read_reward_model(str(trained), vocabulary)
    newest = rows(trained / "metrics.jsonl")[-1]
    assert (normalisation.mean, normalisation.std) == (newest["reward/mean"], newest["reward/std"])
    assert normalisation.std > 0
    params = checkpoints.load_params(trained, model.abstract_params())
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, model.abstract_params())


def test_what_is_no_fitting_reward_model_is_refused(trained, pretrained, sources, tmp_path, world):
    with pytest.raises(UserError, match="not a reward model"):
        read_reward_model(str(pretrained), Vocabulary(sources.vocabulary))
    other = tmp_path / "other.model"
    texts = [text for row in preferences() for text in row.values()]
    train_tokenizer(texts, other, TokenizerConfig(400, extra_ids=4, character_coverage=1.0))
    with pytest.raises(UserError, match="another vocabulary"):
        read_reward_model(str(trained), Vocabulary(other))
    shop, reward = world
    raw = {"reward__Config__normalisation": "'none'", "TRAIN_STEPS": 1}
    assert reward("raw", **raw) == 0
    with pytest.raises(UserError, match="no mean and deviation"):
        read_reward_model(str(shop.root / "raw"), Vocabulary(sources.vocabulary))
    _, taken = read_reward_model(str(shop.root / "raw"), Vocabulary(sources.vocabulary), raw=True)
    assert (taken.mean, taken.std) == (0.0, 1.0)


def test_a_resumed_run_is_the_uninterrupted_one(world, trained):
    shop, reward = world
    half = shop.root / "half"
    assert reward("half", TRAIN_STEPS=20) == 0
    assert reward("half") == 0
    whole, resumed = arrays(trained, 40), arrays(half, 40)
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(value, resumed[name], err_msg=name)
    assert untimed(trained) == untimed(half)


def test_a_dry_run_shows_prompts_with_ranks_and_writes_nothing(world, capsys):
    shop, reward = world
    assert reward("dry", "--dry_run") == 0
    shown = capsys.readouterr().out
    assert "rank 0:" in shown and "memory per device" in shown
    assert not (shop.root / "dry").exists()


def test_mistakes_are_told_before_anything_is_written(world, capsys):
    shop, reward = world
    for settings, message in (
        ({"MIXTURE": shop.reviews}, "not preferences"),
        ({"reward__RewardLossConfig__ranking": "'pairwize'"}, "pairwise"),
        ({"loader__DataConfig__concatenate": True}, "does not apply to preferences"),
        ({"reward__Config__eval_split": "'none'"}, "no split"),
        ({"model__ModelConfig__sequence_parallel": True}, "does not apply to reward"),
    ):
        assert reward("wrong", **settings) == 2
        told = capsys.readouterr().err
        assert message in told, told
        assert not (shop.root / "wrong").exists()


@pytest.mark.slow
def test_the_other_ranking_learns_too(world):
    shop, reward = world
    assert reward("order", reward__RewardLossConfig__ranking="'plackett_luce'") == 0
    assert rows(shop.root / "order" / "metrics.jsonl")[-1]["eval/accuracy"] >= 0.95
    shutil.rmtree(shop.root / "order")
