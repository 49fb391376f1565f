"""The flags that overlap communication with computation, with a finder of plugins of our own."""

import importlib.util
import os
import subprocess
import sys

import pytest

from chatyuan.errors import UserError
from chatyuan.stages import _host, _overlap


@pytest.fixture
def installed(monkeypatch):
    """Sets which plugins there are; nothing of the environment is left over."""
    for name in ("JAX_PLATFORMS", _overlap.SWITCH, *_overlap.VARIABLES.values()):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    return lambda *names: monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name if name in names else None
    )


def flags(variable: str) -> dict[str, str]:
    words = os.environ.get(variable, "").split()
    return dict(word.removeprefix("--").split("=") for word in words)


@pytest.mark.parametrize("plugin, kind", [("jax_cuda13_plugin", "gpu"), ("libtpu", "tpu")])
def test_a_plugin_gets_its_flags(installed, plugin, kind):
    installed(plugin)
    _overlap.apply(_host.accelerators())
    wanted = {name: value for name, (value, _) in _overlap.FLAGS[kind].items()}
    assert wanted and all(name.startswith("xla_") for name in wanted)
    for other, variable in _overlap.VARIABLES.items():
        assert flags(variable) == (wanted if other == kind else {})
    _overlap.apply(_host.accelerators())  # children inherit the environment
    assert flags(_overlap.VARIABLES[kind]) == wanted


def test_what_the_user_sets_wins_flag_by_flag(installed, monkeypatch):
    installed("libtpu")
    first, second, *rest = _overlap.FLAGS["tpu"]
    monkeypatch.setenv("LIBTPU_INIT_ARGS", f"--{first}=false --no{second} --megascale_port=1")
    _overlap.apply(_host.accelerators())
    words = os.environ["LIBTPU_INIT_ARGS"].split()
    assert words[:3] == [f"--{first}=false", f"--no{second}", "--megascale_port=1"]
    assert [word.strip("-").partition("=")[0] for word in words[3:]] == rest


@pytest.mark.parametrize("plugins", [(), ("libtpu", "jax_cuda12_plugin")])
def test_nothing_on_cpu(installed, monkeypatch, plugins):
    installed(*plugins)
    if plugins:
        monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert _host.on_cpu()
    _overlap.apply(_host.accelerators())
    assert not any(map(flags, _overlap.VARIABLES.values()))


def test_platforms_choose_between_plugins(installed, monkeypatch):
    installed("libtpu", "jax_cuda12_plugin")
    assert set(_host.accelerators()) == {"gpu", "tpu"}
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    assert _host.accelerators() == ["gpu"]


def test_the_switch(installed, monkeypatch):
    installed("libtpu")
    monkeypatch.setenv(_overlap.SWITCH, "0")
    _overlap.apply(_host.accelerators())
    assert not flags("LIBTPU_INIT_ARGS")
    monkeypatch.setenv(_overlap.SWITCH, "off")
    with pytest.raises(UserError, match="CHATYUAN_OVERLAP=off should be 0"):
        _overlap.apply(_host.accelerators())


def test_jaxlib_knows_the_flags_for_gpus():
    """It ends a process that has one it does not know; the options of GPUs are in every jaxlib."""
    named = [f"--{name}={value}" for name, (value, _) in _overlap.FLAGS["gpu"].items()]
    start = [sys.executable, "-c", "import jax; jax.devices()"]
    for words, known in ((named, True), ([*named, "--xla_gpu_no_such_flag=true"], False)):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(words)}
        done = subprocess.run(start, env=environment, capture_output=True, text=True)
        assert (done.returncode == 0) == known, done.stderr
