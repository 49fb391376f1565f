"""The fit finds laws that were put in; the published coefficients give the published optimum."""

import json
import re

import numpy as np
import pytest

from chatyuan import configs, main
from chatyuan.errors import UserError
from chatyuan.models import build
from chatyuan.models.config import ModelConfig
from chatyuan.planning.scaling_law import CHINCHILLA, Run, fit
from chatyuan.stages import plan


def runs(noise: float = 0.0, seed: int = 0) -> list[Run]:
    random = np.random.default_rng(seed)
    sizes = [(n, n * ratio) for n in np.geomspace(2e7, 2e9, 5) for ratio in (5, 20, 80)]
    return [
        Run(f"{n:.0e}", n, d, float(CHINCHILLA.loss(n, d) * np.exp(noise * random.normal())))
        for n, d in sizes
    ]


def test_recovers_the_law_without_noise():
    law = fit(runs(), resamples=1).law
    assert law.alpha == pytest.approx(CHINCHILLA.alpha, rel=1e-3)
    assert law.beta == pytest.approx(CHINCHILLA.beta, rel=1e-3)
    assert law.e == pytest.approx(CHINCHILLA.e, rel=1e-3)


def test_noise_is_inside_the_interval():
    fitted = fit(runs(noise=0.003), resamples=20)
    n, d = 1e10, 2e11
    low, high = fitted.interval(n, d)
    assert low < float(CHINCHILLA.loss(n, d)) < high
    narrow = fitted.interval(n, d, new_run=False)
    assert narrow[1] - narrow[0] <= high - low
    assert (high - low) / low < 0.1


def test_published_coefficients_give_the_published_optimum():
    """Hoffmann et al. 2022: approach 3 has N ~ C^0.46 and 40B parameters for Gopher's budget."""
    n, d = CHINCHILLA.optimum(np.array([5.76e23, 5.76e24]))
    assert n[0] / 1e9 == pytest.approx(40, rel=0.05)
    assert np.log10(n[1] / n[0]) == pytest.approx(0.46, abs=0.01)
    np.testing.assert_allclose(6 * n * d, [5.76e23, 5.76e24])
    for factor in (0.8, 1.25):  # it is a minimum along 6 N D = C
        assert CHINCHILLA.loss(n * factor, d / factor)[0] > CHINCHILLA.loss(n, d)[0]


@pytest.mark.parametrize(
    ("some", "words"),
    [
        (runs()[:3], "at least 6"),
        ([Run("x", 1e8, d, 3.0) for d in np.geomspace(1e8, 1e10, 8)], "model sizes"),
        ([Run("x", n, 1e9, 3.0) for n in np.geomspace(1e7, 1e9, 8)], "TRAIN_STEPS"),
        ([Run("x", n, 20 * n, 3.0) for n in np.geomspace(1e7, 1e9, 8)], "told apart"),
        ([Run("broken", 1e7, 1e9, float("nan")), *runs()], "broken"),
    ],
)
def test_what_determines_no_law_is_refused(some, words):
    with pytest.raises(UserError, match=words):
        fit(some)


def test_a_run_is_read_from_its_folder(tmp_path):
    model = ModelConfig(embed_dim=8, mlp_dim=8, num_heads=1, head_dim=8, vocab_size=128)
    saved = {"class": "x", "model": configs.to_json(model)}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    rows = [{"step": 1, "loss": 5.0, "tokens_seen": 10}, {"step": 2, "loss": 4.0, "tokens_seen": 20,
            "eval/loss": 4.5}]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = plan.read_run(str(tmp_path / "metrics.jsonl"))
    assert (run.parameters, run.tokens, run.loss) == (build(model).num_params, 20, 4.5)
    with pytest.raises(UserError, match="does not exist"):
        plan.read_run(str(tmp_path / "nowhere"))


def test_the_command_fits_predicts_and_draws(tmp_path, capsys):
    shapes, models = (8, 16, 32), []
    for index, width in enumerate(shapes):
        sizes = {"embed_dim": width, "mlp_dim": 2 * width, "num_heads": 1, "head_dim": 8}
        models.append((sizes, ModelConfig(vocab_size=128, **sizes)))
        n = build(models[-1][1]).num_params
        for ratio in (5, 20, 80):
            folder = tmp_path / f"{index}_{ratio}"
            folder.mkdir()
            saved = {"class": "x", "model": configs.to_json(models[-1][1])}
            (folder / "config.json").write_text(json.dumps(saved))
            loss = float(CHINCHILLA.loss(n, n * ratio))
            row = {"step": 1, "loss": loss, "tokens_seen": n * ratio}
            (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    files = [str(path) for path in sorted(tmp_path.glob("*/metrics.jsonl"))]
    wanted = [f"--gin.ModelConfig.{name}={value}" for name, value in models[-1][0].items()]
    settings = {"ModelConfig.vocab_size": 128, "INPUT_LENGTH": 64, "TARGET_LENGTH": 32,
                "BATCH_SIZE": 10, "TRAIN_STEPS": 5000,
                "plan.Config.plot": tmp_path / "law.png"}  # fmt: skip
    words = [*wanted, *(f"--gin.{name}={value}" for name, value in settings.items())]
    assert main.main(["plan", "--fit", "--dry_run", *files, *words]) == 0
    assert not (tmp_path / "law.png").exists()
    capsys.readouterr()
    assert main.main(["plan", "--fit", *files, *words]) == 0
    out = capsys.readouterr().out
    n, d = build(models[-1][1]).num_params, 10 * (64 + 32) * 5000
    found = re.search(r"loss ([\d.]+), 90 % of such runs between ([\d.]+) and ([\d.]+)\.", out)
    loss, low, high = map(float, found.groups())
    assert loss == pytest.approx(float(CHINCHILLA.loss(n, d)), rel=0.02)
    assert low <= loss + 1e-4 and loss <= high + 1e-4
    assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")


def test_settings_written_for_other_stages_are_read(tmp_path, capsys):
    file = tmp_path / "recipe.gin"
    for stage in ("pretrain", "sft"):
        file.write_text(
            "from __gin__ import dynamic_registration\n"
            f"from chatyuan.stages import {stage}\n{stage}.Config.microbatches = 4\n"
        )
        assert configs.load("plan", [str(file)]).microbatches == 4
    file.write_text(
        "from __gin__ import dynamic_registration\n"
        "from chatyuan.stages import infer\ninfer.Config.batch_size = 4\n"
    )
    with pytest.raises(UserError, match="infer.Config"):
        configs.load("plan", [str(file)])


def test_a_saved_configuration_is_planned(tmp_path):
    macros = {"MODEL_DIR": "m", "MIXTURE": "x", "VOCABULARY": "v", "CACHE_DIR": "c",
              "MICROBATCHES": 2}  # fmt: skip
    recipe = "gin/recipes/pretrain_t5_1_1_small.gin"
    trained = configs.load("pretrain", [recipe], macros)
    configs.save_run(trained, tmp_path)
    planned = configs.load("plan", [str(tmp_path / "config.gin")], {"plan.Config.devices": 64})
    assert planned.devices == 64 and planned.microbatches == 2
    for name in ("model", "optimizer", "data", "mesh", "sharding", "loop"):
        assert getattr(planned, name) == getattr(trained, name), name
