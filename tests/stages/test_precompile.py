"""`--precompile` compiles the step of the run, shows what it costs and leaves no trace."""

import importlib.util
import re

import jax
import pytest

from chatyuan.main import main
from chatyuan.stages import _precompile

SETTINGS = {
    "TRAIN_STEPS": 4, "MESH": {"data": 2, "fsdp": 4}, "DROPOUT_RATE": 0.0, "MICROBATCHES": 1,
}  # fmt: skip


def lines(out: str, name: str) -> list[str]:
    return [line for line in out.splitlines() if line.strip().startswith(name)]


def test_it_shows_memory_and_collectives_and_writes_nothing(shop, capsys):
    before = shop.files()
    settings = {**SETTINGS, "MODEL_DIR": shop.root / "precompiled", "MIXTURE": shop.text}
    assert shop.run("pretrain", "--precompile", **settings) == 0
    out = capsys.readouterr().out
    assert shop.files() == before
    # Compiled beside predicted: weights and both moments, split over fsdp, and the small batch.
    held = float(re.search(r"state and batch +([\d.,]+) MiB", out).group(1))
    count = int(re.search(r"parameters: ([\d,]+)", out).group(1).replace(",", ""))
    assert held == pytest.approx(3 * 4 * count / 4 / 2**20, rel=0.2, abs=0.1)
    assert re.search(r"all-gather +over fsdp ", out)  # the weights that fsdp splits
    assert re.search(r"all-reduce +over \S*data", out)  # the gradients of copies
    assert "nothing was trained or written" in out


def test_one_device_exchanges_nothing():
    found = _precompile._collective_lines([])
    assert list(found) == ["Collectives of a step: a device sends 0.00 MiB"]


def test_help_lists_it(capsys):
    for stage in ("pretrain", "sft"):
        assert main([stage, "--help"]) == 0
        assert "--precompile" in capsys.readouterr().out


def test_mistakes_are_told(shop, capsys, monkeypatch):
    more = {"MODEL_DIR": shop.root / "precompiled", "MIXTURE": shop.text, **SETTINGS}
    assert shop.run("pretrain", "--precompile=", **more) == 2
    assert "--precompile= has no value" in capsys.readouterr().err
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "libtpu" else found(name)
    )
    assert shop.run("sft", "--precompile=v5e:4x4", **more) == 2
    assert "pip install libtpu" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_topology_of_several_hosts(shop, capsys):
    folder = shop.root / "precompiled"
    settings = {**SETTINGS, "MODEL_DIR": folder, "MIXTURE": shop.text}
    assert shop.run("pretrain", "--precompile=v5e:2x4", **settings) == 0
    assert "8 x TPU v5 lite" in capsys.readouterr().out
    assert not folder.exists() and jax.default_backend() == "cpu"
    assert shop.run("pretrain", "--precompile=h100:8", **settings) == 2
    assert "v5e:2x4" in capsys.readouterr().err
