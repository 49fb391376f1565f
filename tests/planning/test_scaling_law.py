"""The fit finds laws that were put in; the published coefficients give the published optimum."""

import json

import numpy as np
import pytest

from chatyuan import configs
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
