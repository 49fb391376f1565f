"""The stage ppo by its command: it improves, resumes bitwise, is read by others, loses nothing."""

import json
import math
import os
import pathlib
import signal
import sys

import numpy as np
import pytest
from processes import Job
from test_reward import preferences, trained, world  # noqa: F401 - fixtures
from workshop import RECIPE, arrays, rows, write_lines
from workshop import untimed as untimed_rows

from chatyuan.align.iteration import Iteration
from chatyuan.align.rollout import read_rollouts
from chatyuan.checkpoints import read_meta
from chatyuan.data.cache import CacheWriter
from chatyuan.main import main
from chatyuan.text.tokenizer import TokenizerConfig, train_tokenizer
from chatyuan.text.vocabulary import Vocabulary

SMALL = {
    "TRAIN_STEPS": 4, "EVAL_PERIOD": 2, "CHECKPOINT_PERIOD": 2, "LOG_PERIOD": 1, "TARGET_LENGTH": 8,
    "RolloutConfig__samples": 2, "AlignConfig__epochs": 2, "LEARNING_RATE": 0.01,
}  # fmt: skip
# Everything that has a state of its own.
STATEFUL = {
    "AlignConfig__kl_target": 1.0, "AlignConfig__kl_horizon": 100.0,
    "AlignConfig__scale_rewards": "'running'", "ppo__Config__write_rollouts": True,
}  # fmt: skip
TIMES = [f"{phase}_tokens_per_second" for phase in ("rollout", "score", "update")]


def brief(answer_tokens):
    """Fewer tokens score more."""
    return [-len(tokens) for tokens in answer_tokens]


def untimed(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in untimed_rows(folder)]


@pytest.fixture(scope="module")
def ppo(shop, tuned):
    """(name, words, settings) -> status of a run on the eight questions."""
    recipe = [line for line in RECIPE.splitlines() if "decod" not in line or "layers" in line]
    write_lines(shop.root / "ppo.gin", recipe)
    sources = [
        "from __gin__ import dynamic_registration", "from chatyuan.align import rewards",
        "from chatyuan.stages import ppo", "ppo.Config.rewards = (@rewards.RewardSource(),)",
    ]  # fmt: skip
    write_lines(shop.root / "function.gin", [*sources, "rewards.RewardSource.function = %WHAT"])

    def words(name, *more, function="test_ppo:brief", **settings):
        files = [f"--gin_file={shop.root / 'ppo.gin'}"]
        if function is not None:
            settings |= {"WHAT": f"'{function}'"}
            files.append(f"--gin_file={shop.root / 'function.gin'}")
        defaults = {"MIXTURE": shop.pairs, "INIT_FROM": tuned, **SMALL, **settings}
        return [*shop.words("ppo", MODEL_DIR=shop.root / name, **defaults), *files, *more]

    def run(*arguments, **settings):
        return main(words(*arguments, **settings))

    run.root, run.words = shop.root, words
    return run


@pytest.fixture(scope="module")
def whole(ppo, trained):  # noqa: F811
    """Four iterations with a reward model and a function."""
    assert ppo("ppo_whole", REWARD_FROM=trained, **STATEFUL) == 0
    return ppo.root / "ppo_whole"


def assert_same_run(ours, theirs, step):
    ours_arrays, theirs_arrays = arrays(ours, step), arrays(theirs, step)
    assert ours_arrays.keys() == theirs_arrays.keys()
    for root in ("params", "opt_state", "critic", "critic_opt_state", "kl_coef", "reward_moments"):
        assert any(name.split("/")[0] == root for name in ours_arrays), root
    for name, value in ours_arrays.items():
        assert value.tobytes() == theirs_arrays[name].tobytes(), name
    assert untimed(ours) == untimed(theirs)
    for name in ("samples.jsonl", "rollouts.jsonl"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


def test_a_run_reports_what_happened(whole, trained):  # noqa: F811
    found = rows(whole / "metrics.jsonl")
    assert [row["step"] for row in found] == [0, 1, 2, 3, 4]
    for row in found[1:]:
        for name in (
            "score", "score_std", "reward", "kl", "kl_coef", "entropy", "clip_fraction",
            "approx_kl", "explained_variance", "value_loss", "policy_loss", "length", "ended",
            "score_rewarding", "score_brief", "sampler_gap", "critic_grad_norm",
        ):  # fmt: skip
            assert math.isfinite(row[name]), name
        both = row["score_rewarding"] + row["score_brief"]
        assert row["score"] == pytest.approx(both, abs=1e-4)
        assert row["first_ratio"] == pytest.approx(1, abs=1e-5)
        assert 1 <= row["length"] <= 8 and 0 <= row["ended"] <= 1
    assert all(row[name] > 0 for row in found[2:] for name in TIMES)
    assert found[1]["kl"] == pytest.approx(0, abs=1e-5)
    assert found[-1]["kl_coef"] != found[1]["kl_coef"]
    assert all("eval/score" in found[n] and "eval/kl" in found[n] for n in (0, 2, 4))
    text = (whole / "report.md").read_text(encoding="utf-8")
    for words in ("reward.png", "output at step 0", "output at step 4", "score at step 0", "rloo"):
        assert (words in text) == (words != "rloo"), words
    assert (whole / "plots" / "reward.png").stat().st_size > 1000


def test_rollouts_are_written_on_request(whole):
    found = read_rollouts(whole / "rollouts.jsonl")
    assert [row["step"] for row in found] == sorted([0, 1, 2, 3] * 16)
    assert len({(row["prompt_id"], row["sample"]) for row in found}) == 64
    assert found[0]["prompt"] and found[0]["tokens"]
    scores = rows(whole / "metrics.jsonl")
    for step in range(4):
        of = [row["reward"] for row in found if row["step"] == step]
        assert np.mean(of) == pytest.approx(scores[step + 1]["score"], abs=1e-4)


def test_a_resumed_run_is_the_uninterrupted_one(ppo, whole, trained):  # noqa: F811
    command = {"REWARD_FROM": trained, **STATEFUL}
    assert ppo("ppo_half", **command | {"TRAIN_STEPS": 2}) == 0
    assert ppo("ppo_half", **command) == 0
    assert_same_run(whole, ppo.root / "ppo_half", 4)


def test_a_signal_saves_and_ends_with_status_0(ppo, whole, trained, monkeypatch, capsys):  # noqa: F811
    command = {"REWARD_FROM": trained, **STATEFUL}
    real, count = Iteration.__call__, [0]

    def call(self, state, batch):
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, state, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Iteration, "__call__", call)
        with pytest.raises(SystemExit) as stopped:
            ppo("ppo_stopped", **command)
    assert stopped.value.code == 0
    assert "Stopped by SIGTERM at step 3, resumable" in capsys.readouterr().out
    assert ppo("ppo_stopped", **command) == 0
    assert_same_run(whole, ppo.root / "ppo_stopped", 4)


def test_it_improves(ppo):
    assert ppo("ppo_brief", TRAIN_STEPS=16, EVAL_PERIOD=16) == 0
    found = [row["eval/score"] for row in rows(ppo.root / "ppo_brief" / "metrics.jsonl")
             if "eval/score" in row]  # fmt: skip
    assert found[-1] > found[0] + 1, found


def test_its_model_is_an_ordinary_one(ppo, shop, whole):
    write_lines(shop.root / "asked.txt", ["二加三等于几？"])
    answers = shop.root / "ppo_answers"
    assert shop.run("infer", str(shop.root / "asked.txt"), INIT_FROM=whole, MODEL_DIR=answers) == 0
    assert "prediction" in rows(answers / "predictions.jsonl")[0]
    assert shop.run("evaluate", INIT_FROM=whole, MIXTURE=shop.pairs,
                    MODEL_DIR=shop.root / "ppo_evaluated") == 0  # fmt: skip
    tuned_on = shop.root / "ppo_tuned_on"
    assert shop.run("sft", INIT_FROM=whole, MIXTURE=shop.pairs, MODEL_DIR=tuned_on, TRAIN_STEPS=1,
                    LEARNING_RATE=0.0) == 0  # fmt: skip
    ours, theirs = arrays(whole, 4), arrays(tuned_on, 1)
    names = [name for name in theirs if name.startswith("params/")]
    assert names
    for name in names:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    assert ppo("ppo_again", INIT_FROM=whole, TRAIN_STEPS=1) == 0


def test_a_dry_run_shows_prompts_and_costs_and_writes_nothing(ppo, trained, capsys):  # noqa: F811
    assert ppo("ppo_dry", "--dry_run", REWARD_FROM=trained) == 0
    shown = capsys.readouterr().out
    for words in ("Two prompts:", "memory per device", "rewarding x 1, brief x 1", "parameters"):
        assert words in shown
    assert not (ppo.root / "ppo_dry").exists()


def test_a_wrong_reward_function_loses_nothing(ppo, whole, trained, capsys, monkeypatch):  # noqa: F811
    """What was learned before it is saved, whenever a checkpoint was due; a mended one goes on."""
    faults = {1: lambda scores: [math.nan, *scores[1:]], 2: lambda scores: scores[:-1]}
    real, count = brief, [0]

    def faulty(answer_tokens):
        count[0] += 1
        scores = real(answer_tokens)
        # An evaluation and one step go well.
        return faults[step](scores) if count[0] > 2 else scores

    command = {"REWARD_FROM": trained, **STATEFUL, "CHECKPOINT_PERIOD": 100}
    monkeypatch.setattr(sys.modules["test_ppo"], "brief", faulty)
    for step, words in ((1, "returned nan"), (2, "shape (15,) for 16 answers")):
        count[0] = 0
        assert ppo("ppo_faulty", **command) == 2
        captured = capsys.readouterr()
        assert words in captured.err and "Nothing was learned from this batch" in captured.err
        assert f"The state of step {step} is saved" in captured.out
        saved = {path.name for path in (ppo.root / "ppo_faulty" / "checkpoints").iterdir()}
        assert str(step) in saved and str(step + 1) not in saved
    monkeypatch.setattr(sys.modules["test_ppo"], "brief", real)
    assert ppo("ppo_faulty", **command) == 0
    assert_same_run(whole, ppo.root / "ppo_faulty", 4)


def test_mistakes_are_told_before_anything_is_written(ppo, shop, tuned, trained, capsys):  # noqa: F811
    for settings, message in (
        ({"function": None}, "Nothing gives rewards"),
        ({"REWARD_FROM": tuned}, "is not a reward model"),
        ({"INIT_FROM": trained}, "is a reward model; give the tuned model"),
        ({"MIXTURE": shop.text}, "plain text"),
        ({"function": "test_ppo:breif"}, "Did you mean brief"),
        ({"function": "test_ppo"}, "should be written package.module:function"),
        ({"AlignConfig__method": "'pppo'"}, "Did you mean ppo"),
        ({"AlignConfig__method": "'rloo'", "RolloutConfig__samples": 1}, "at least 2"),
        ({"AlignConfig__minibatches": 3}, "use a multiple of 24"),
        ({"AlignConfig__ptx_coef": 1.0}, "ppo.Config.ptx"),
        ({"ppo__Config__critic_from": trained}, "critic = 'separate'"),
        ({"loader__DataConfig__pack": True}, "would join prompts"),
        ({"ppo__Config__eval_split": "'none'"}, "no split"),
        ({"AlignConfig__reference_layers": 3}, "more than the 1 decoder layers"),
        ({"MESH": {"data": 4, "sequence": 2}}, "which ppo cannot"),
        ({"AlignConfig__min_length": 9}, "within TARGET_LENGTH = 8"),
        ({"ppo__Config__rollout_mesh": {"data": 8}}, "leave at least one for MESH"),
        ({"AlignConfig__lag": 2}, "should be 0 or 1"),
    ):
        assert ppo("ppo_mistaken", **settings) == 2, settings
        told = capsys.readouterr().err
        assert message in told, told
        assert not (shop.root / "ppo_mistaken").exists()


def test_empty_prompts_are_refused(ppo, shop, capsys):
    """Files never give any, but a seqio task of one's own can."""
    vocabulary = Vocabulary(shop.vocabulary)
    lengths = np.array([3, 0, 2, 3])
    for split in ("train", "validation"):
        with CacheWriter(shop.cache, "hollow", split, features=["inputs", "targets"],
                         vocabulary=vocabulary) as writer:  # fmt: skip
            writer.write(
                {"inputs": np.arange(10, 18), "targets": np.arange(10, 14)},
                {"inputs": lengths, "targets": np.ones(4, int)},
            )
            writer.finish({"key": "hollow"})
    assert ppo("ppo_empty", MIXTURE="hollow") == 2
    assert "1 of 4 prompts are empty" in capsys.readouterr().err
    assert not (shop.root / "ppo_empty").exists()


def test_reward_models_that_do_not_fit_are_refused(ppo, world, tuned, tmp_path, capsys):  # noqa: F811
    shop, reward = world
    raw = {"reward__Config__normalisation": "'none'", "TRAIN_STEPS": 1}
    assert reward("ppo_raw", **raw) == 0
    other = tmp_path / "other.model"
    texts = [text for row in preferences() for text in row.values()]
    train_tokenizer(texts, other, TokenizerConfig(400, extra_ids=4, character_coverage=1.0))
    assert shop.run("cache", MIXTURE=f"file:{shop.root / 'preferences'}", VOCABULARY=other,
                    CACHE_DIR=tmp_path / "cache") == 0  # fmt: skip
    more = {"VOCABULARY": other, "CACHE_DIR": tmp_path / "cache", "INIT_FROM": None,
            "TRAIN_STEPS": 1}  # fmt: skip
    assert reward("ppo_other", **more) == 0
    capsys.readouterr()
    for name, message in (
        ("ppo_raw", "no mean and deviation"),
        ("ppo_other", "another vocabulary"),
    ):
        assert ppo("ppo_unfit", function=None, REWARD_FROM=shop.root / name) == 2
        told = capsys.readouterr().err
        assert message in told and str(shop.root / name) in told, told
        assert not (shop.root / "ppo_unfit").exists()


def test_a_run_goes_on_with_the_models_it_began_with_alone(ppo, whole, trained, tuned, capsys):  # noqa: F811
    earlier = tuned / "checkpoints" / "75"
    command = {"REWARD_FROM": trained, **STATEFUL, "TRAIN_STEPS": 5}
    assert ppo("ppo_whole", **command | {"INIT_FROM": earlier}) == 2
    told = capsys.readouterr().err
    assert "another checkpoint as policy and reference" in told
    assert rows(whole / "metrics.jsonl")[-1]["step"] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "'rloo'", "epochs": 1},
        {"method": "'grpo'", "zero_spread": "'drop'"},
        {"method": "'remax'", "scale_rewards": "'running'", "clip_reward": 2.0},
        {"method": "'reinforce_pp'", "no_end_score": -20.0},
        {"method": "'best_of_n'"},
        {"method": "'online_dpo'"},
        {"critic": "'separate'", "critic_warmup": 1, "reference_layers": 1, "stop_kl": 0.5},
    ],
    ids=lambda settings: "_".join(f"{v}".strip("'") for v in settings.values()),
)
def test_every_method_is_a_run(ppo, settings, request):
    """Its own mathematics is tested in tests/align; here it is found, runs and is resumed."""
    name = f"ppo_{request.node.callspec.id}"
    align = {f"AlignConfig__{key}": value for key, value in settings.items()}
    assert ppo(name, **align, TRAIN_STEPS=2) == 0
    found = rows(ppo.root / name / "metrics.jsonl")
    assert all(math.isfinite(row["loss"]) for row in found[1:])
    assert found[-1]["eval/kl"] != 0
    assert ppo(name, **align, TRAIN_STEPS=3) == 0


def test_drawing_ahead_on_devices_of_their_own_resumes_bitwise(ppo, capsys):
    settings = {
        **STATEFUL, "AlignConfig__lag": 1, "MESH": {"data": 2, "fsdp": 2},
        "ppo__Config__rollout_mesh": {"data": 4},
    }  # fmt: skip
    assert ppo("ppo_ahead", TRAIN_STEPS=4, **settings) == 0
    assert "an iteration ahead by 4 x cpu" in capsys.readouterr().out
    assert ppo("ppo_ahead_half", TRAIN_STEPS=2, **settings) == 0
    assert ppo("ppo_ahead_half", TRAIN_STEPS=4, **settings) == 0
    assert_same_run(ppo.root / "ppo_ahead", ppo.root / "ppo_ahead_half", 4)
    found = read_rollouts(ppo.root / "ppo_ahead" / "rollouts.jsonl")
    assert {(row["step"], row["version"]) for row in found} == {(0, 0), (1, 0), (2, 1), (3, 2)}
    figures = rows(ppo.root / "ppo_ahead" / "metrics.jsonl")
    assert [row["lag"] for row in figures[1:]] == [0, 1, 1, 1]
    assert all(0 < row["importance"] < 2 for row in figures[1:])


def test_adapters_are_trained_alone_and_read_by_others(ppo, shop, tuned, capsys):
    low = {"ModelConfig__adapter_rank": 2, "TRAIN_STEPS": 2}
    assert ppo("ppo_low", **low) == 0
    folder = ppo.root / "ppo_low"
    ours, theirs = arrays(folder, 2), arrays(tuned, read_meta(tuned)["step"])
    base = [name for name in theirs if name.startswith("params/")]
    assert {n for n in ours if n.startswith("params/") and "/adapter_" not in n} == set(base)
    for name in base:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    changed = [n for n in ours if n.startswith("params/") and n.endswith("adapter_out")]
    assert changed and any(ours[name].any() for name in changed)
    assert not any("kernel" in name for name in ours if name.startswith("opt_state/"))
    # Read as it is, with its adapters; by ppo again, which keeps them; by sft, which adds them.
    prompts = write_lines(shop.root / "low.txt", ["天空"])
    answers = {"INIT_FROM": folder, "MODEL_DIR": shop.root / "low_answers"}
    assert shop.run("infer", str(prompts), **answers) == 0
    assert ppo("ppo_low_again", INIT_FROM=folder, **low) == 0
    figures = rows(ppo.root / "ppo_low_again" / "metrics.jsonl")
    assert figures[1]["kl"] == pytest.approx(0, abs=1e-5)
    assert ppo("ppo_low_rank", INIT_FROM=folder, **low | {"ModelConfig__adapter_rank": 3}) == 2
    assert "Set adapter_rank and adapter_alpha as there" in capsys.readouterr().err
    assert ppo("ppo_low_merged", INIT_FROM=folder, TRAIN_STEPS=1, LEARNING_RATE=0.0) == 0
    merged = arrays(ppo.root / "ppo_low_merged", 1)
    assert {n for n in merged if n.startswith("params/")} == set(base)
    for name in changed[:3]:
        stem = name.removesuffix("adapter_out")
        low_rank = ours[f"{stem}adapter_in"].astype(np.float64) @ ours[name].astype(np.float64)
        want = theirs[f"{stem}kernel"] + 16.0 / 2 * low_rank
        np.testing.assert_allclose(merged[f"{stem}kernel"], want, atol=1e-5)


@pytest.mark.slow
def test_a_pretraining_mixture_adds_its_gradient(ppo, shop):
    lines = [
        "from __gin__ import dynamic_registration", "from chatyuan.data import loader",
        "from chatyuan.stages import ppo", "ppo.Config.ptx = @ptx/loader.DataConfig()",
        f"ptx/loader.DataConfig.mixture = '{shop.text}'", "ptx/loader.DataConfig.pack = True",
        "ptx/loader.DataConfig.batch_size = 16",
    ]  # fmt: skip
    write_lines(shop.root / "ptx.gin", lines)
    file = f"--gin_file={shop.root / 'ptx.gin'}"
    assert ppo("ppo_ptx", file, TRAIN_STEPS=2, AlignConfig__ptx_coef=0.5) == 0
    for row in rows(ppo.root / "ppo_ptx" / "metrics.jsonl")[1:]:
        assert row["ptx_loss"] > 0 and row["ptx_grad_norm"] > 0


@pytest.mark.slow
def test_a_critic_starts_as_the_reward_model(ppo, trained):  # noqa: F811
    settings = {
        "AlignConfig__critic": "'separate'", "ppo__Config__critic_from": trained,
        "REWARD_FROM": trained, "TRAIN_STEPS": 1, "LEARNING_RATE": 0.0, "function": None,
    }  # fmt: skip
    assert ppo("ppo_critic", **settings) == 0
    ours, theirs = arrays(ppo.root / "ppo_critic", 1), arrays(trained, 40)
    names = [name for name in theirs if name.startswith("params/backbone/")]
    assert names
    for name in names:
        np.testing.assert_array_equal(ours[f"critic/{name[7:]}"], theirs[name], err_msg=name)
    meta = json.loads((trained / "checkpoints" / "40" / "meta.json").read_text())["metrics"]
    head = theirs["params/head/kernel"] / np.float32(meta["reward/std"])
    np.testing.assert_allclose(ours["critic/head/kernel"], head, rtol=1e-6)


@pytest.mark.slow
def test_eight_devices_do_what_one_does(ppo, monkeypatch):
    settings = {"TRAIN_STEPS": 2, "LEARNING_RATE": 0.001}
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    assert ppo("ppo_eight", MESH=mesh, **settings) == 0
    here = pathlib.Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    job = Job(ppo.root / "ppo_job", ppo.words("ppo_one", **settings), count=1, devices=1)
    assert job.wait(300) == [0], job.output(0)
    for ours, theirs in zip(*map(untimed, (ppo.root / "ppo_eight", ppo.root / "ppo_one")),
                            strict=True):  # fmt: skip
        assert ours.keys() == theirs.keys()
        for key, value in ours.items():
            assert theirs[key] == pytest.approx(value, rel=5e-3, abs=5e-4), key
