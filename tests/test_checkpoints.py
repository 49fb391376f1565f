"""Checkpoints: round trips, atomicity, keeping, damage, full disks, weights only."""

import dataclasses
import datetime
import errno
import os
import pathlib
import subprocess
import sys
import textwrap
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from chatyuan import checkpoint_files, checkpoints
from chatyuan.checkpoints import CheckpointConfig, Checkpointer, load_params, read_meta
from chatyuan.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """Named like the training state."""

    step: jax.Array
    params: dict
    opt_state: object
    ema: object


def make_state(seed=0, step=0, ema=False, width=6) -> State:
    key = jax.random.key(seed)
    params = {
        "encoder": {"w": jax.random.normal(key, (4, width)), "b": jnp.zeros(width, jnp.bfloat16)},
        "head": jnp.full((width,), np.float32(seed)),
    }
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.masked(optax.adam(0.1), {"encoder": True, "head": 0})
    )
    average = jax.tree.map(lambda x: x + 1, params) if ema else None
    return State(jnp.int32(step), params, optimizer.init(params), average)


def same(left, right) -> bool:
    assert jax.tree.structure(left) == jax.tree.structure(right)
    return all(
        a.dtype == b.dtype and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    )


def save_all(folder, steps, config=None, metrics=None, **kwargs) -> Checkpointer:
    checkpointer = Checkpointer(folder, config or CheckpointConfig(keep=10))
    for i, step in enumerate(steps):
        checkpointer.save(
            step,
            make_state(step, step, **kwargs),
            {"seed": 7},
            {"loss": metrics[i]} if metrics else None,
        )
    checkpointer.wait()
    return checkpointer


def biggest_file(folder: pathlib.Path) -> pathlib.Path:
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_round_trip_is_bitwise_and_readable_by_orbax_alone(tmp_path):
    state = make_state(3, 30, ema=True)
    with Checkpointer(tmp_path) as checkpointer:
        assert not (tmp_path / "checkpoints").exists()  # nothing is written before the first save
        checkpointer.save(30, state, {"seed": 1, "data": {"step": 30}}, {"loss": 2.5})
    restored, meta = Checkpointer(tmp_path).restore(jax.eval_shape(lambda: make_state(ema=True)))
    assert same(restored, state)
    assert (meta["step"], meta["seed"], meta["data"]) == (30, 1, {"step": 30})
    assert meta["metrics"] == {"loss": 2.5} and meta["chatyuan_version"]
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader, pytest.warns(UserWarning):
        plain = reader.restore(tmp_path / "checkpoints" / "30" / "state")
    assert set(plain) == {"step", "params", "opt_state", "ema"}
    np.testing.assert_array_equal(plain["params"]["head"], state.params["head"])


def test_donating_the_state_after_save_does_not_change_what_is_written(tmp_path):
    """The CPU backend hands out views of its buffers; the next step overwrites donated ones."""
    state = {"w": jax.random.normal(jax.random.key(0), (2048, 2048))}
    expected = np.array(state["w"])
    update = jax.jit(lambda s: {"w": s["w"] * 2 + 1}, donate_argnums=0)
    jax.block_until_ready(update({"w": jnp.zeros((2048, 2048))}))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state)
        for _ in range(5):
            state = update(state)
        jax.block_until_ready(state)
    restored, _ = Checkpointer(tmp_path).restore({"w": jax.ShapeDtypeStruct((2048, 2048), "f4")})
    np.testing.assert_array_equal(restored["w"], expected)


def test_restores_onto_the_shardings_asked_for(tmp_path):
    state = {"w": jnp.arange(64.0).reshape(8, 8)}
    Checkpointer(tmp_path).save(1, state)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    other = Checkpointer(tmp_path)
    while other.latest_step() is None:  # the first one commits in the background
        pass
    restored, _ = other.restore({"w": jax.ShapeDtypeStruct((8, 8), "f4", sharding=sharding)})
    assert restored["w"].sharding == sharding
    np.testing.assert_array_equal(restored["w"], state["w"])


def test_keep_last_best_and_one_a_day(tmp_path, monkeypatch):
    config = CheckpointConfig(keep=2, keep_best_metric="loss")
    checkpointer = save_all(tmp_path / "a", range(1, 7), config, metrics=[3, 1, 2, 1, 5, 4])
    assert checkpointer.steps() == [2, 5, 6]
    assert checkpointer.best() == (2, 1.0)  # the earlier of two equal ones
    assert checkpointer.is_best({"loss": 0.5}) and not checkpointer.is_best({"loss": 1.0})
    assert not checkpointer.is_best({"loss": float("nan")})
    with pytest.raises(UserError, match=r"'loss' is not among .*Did you mean los\?"):
        checkpointer.is_best({"los": 1.0})
    again = Checkpointer(tmp_path / "a", config)  # a new process knows the best from the files
    again.save(7, make_state(7), metrics={"loss": 9})
    again.close()
    assert again.steps() == [2, 6, 7]

    highest = CheckpointConfig(keep=1, keep_best_metric="loss", keep_best_mode="max")
    assert save_all(tmp_path / "b", [1, 2, 3], highest, metrics=[1, 9, 2]).steps() == [2, 3]

    days = iter(["2026-01-01", "2026-01-01", "2026-01-02", "2026-01-03", "2026-01-03"])
    real = datetime.datetime

    class Clock:
        @staticmethod
        def now(tz):
            assert tz is datetime.UTC
            return real.fromisoformat(next(days) + "T12:00:00+00:00")

    clock = types.SimpleNamespace(datetime=Clock, UTC=datetime.UTC)
    monkeypatch.setattr(checkpoints, "datetime", clock)
    daily = CheckpointConfig(keep=1, keep_daily=True)
    assert save_all(tmp_path / "c", [1, 2, 3, 4, 5], daily).steps() == [2, 3, 5]


def truncate(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def zero(path):
    path.write_bytes(b"\0" * path.stat().st_size)


@pytest.mark.parametrize("harm", [truncate, flip, zero, pathlib.Path.unlink])
def test_a_damaged_newest_checkpoint_falls_back_loudly(tmp_path, capsys, harm):
    folder = save_all(tmp_path, [1, 2]).directory
    harm(biggest_file(folder / "2"))
    checkpointer = Checkpointer(tmp_path, CheckpointConfig(keep=2))
    restored, meta = checkpointer.restore(make_state())
    assert meta["step"] == 1 and same(restored, make_state(1, 1))
    warning = capsys.readouterr().err
    assert "WARNING" in warning and "2 is damaged" in warning and "step 1" in warning
    # It no longer counts among the newest, is kept for a look, and its step can be saved again.
    assert checkpointer.steps() == [1] and (folder / "2.damaged").is_dir()
    checkpointer.save(2, make_state(2, 2))
    checkpointer.close()
    assert checkpointer.restore(make_state())[1]["step"] == 2


def test_damage_that_no_inventory_shows_is_met_when_reading(tmp_path, capsys):
    """A folder whose sums are right but whose arrays Orbax cannot read, as after a bad copy."""
    folder = save_all(tmp_path, [1, 2]).directory
    zero(biggest_file(folder / "2"))
    (folder / "2" / "files.json").unlink()
    checkpoint_files.write_inventory(folder / "2", checksums=True)
    for path in (folder / "2" / "state").rglob("manifest.ocdbt"):
        truncate(path)
    (folder / "2" / "files.json").unlink()
    checkpoint_files.write_inventory(folder / "2", checksums=True)
    assert Checkpointer(tmp_path).restore(make_state())[1]["step"] == 1
    assert "2 is damaged" in capsys.readouterr().err


def test_all_damaged_or_none_there(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        Checkpointer(tmp_path).restore(make_state())
    folder = save_all(tmp_path, [1, 2]).directory
    for step in "12":
        (folder / step / "meta.json").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged.*meta.json is missing"):
        Checkpointer(tmp_path).restore(make_state())


def test_killed_between_save_and_commit(tmp_path):
    """The process dies after the arrays are written, before the rename."""
    save_all(tmp_path, [1])
    program = f"""
        import os, jax.numpy as jnp
        from chatyuan import checkpoints
        checkpoints.write_inventory = lambda *_: os._exit(9)
        c = checkpoints.Checkpointer({str(tmp_path)!r})
        c.save(2, {{"w": jnp.zeros(3)}})
        c.wait()
    """
    code = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False).returncode
    assert code == 9
    folder = tmp_path / "checkpoints"
    assert (folder / "2.tmp" / "state").is_dir() and (folder / "2.tmp" / "meta.json").exists()
    checkpointer = Checkpointer(tmp_path)
    assert checkpointer.latest_step() == 1
    assert checkpointer.restore(make_state())[1]["step"] == 1
    assert sorted(os.listdir(folder)) == ["1"]


@pytest.mark.parametrize("where", ["mkdir", "orbax", "commit"])
def test_a_full_disk_keeps_the_earlier_checkpoints(tmp_path, monkeypatch, where):
    checkpointer = save_all(tmp_path, [1])
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fail(*_, **__):
        # TensorStore reports the same thing as a ValueError with the system's text.
        raise ValueError(f"RESOURCE_EXHAUSTED: {full.strerror}") if where == "orbax" else full

    with monkeypatch.context() as patch:
        if where == "mkdir":
            patch.setattr(pathlib.Path, "mkdir", fail)
        elif where == "orbax":
            patch.setattr(ocp.AsyncCheckpointer, "save", fail)
        else:
            patch.setattr(checkpoints, "write_inventory", fail)
        with pytest.raises(UserError, match="step 2 .*the disk is full.*intact: 1.* Make room"):
            checkpointer.save(2, make_state(2))
            checkpointer.wait()
    assert os.listdir(checkpointer.directory) == ["1"]
    checkpointer.save(3, make_state(3, 3))  # and it works again once there is room
    checkpointer.close()
    assert checkpointer.restore(make_state())[1]["step"] == 3


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file, not a folder"):
        Checkpointer(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(UserError, match="cannot be written"):
        Checkpointer(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_model_is_the_users_mistake_not_damage(tmp_path):
    checkpointer = save_all(tmp_path, [1])
    other = make_state(width=8)
    with pytest.raises(UserError, match=r"does not fit.*params/encoder/w is \(4, 6\).*\(4, 8\)"):
        checkpointer.restore(other)
    less = dataclasses.replace(other, opt_state=())
    with pytest.raises(UserError, match=r"only in the checkpoint: opt_state/.*and \d+ more"):
        checkpointer.restore(less)
    state = make_state()
    cast = dataclasses.replace(state, step=jnp.float32(0))
    with pytest.raises(UserError, match="step is int32, the model wants float32"):
        checkpointer.restore(cast)
    assert checkpointer.steps() == [1]


def test_restore_or_init(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    facts = {"vocabulary_sha256": "ab", "model": {"embed_dim": 6, "acts": ("gelu", "linear")}}
    state, meta = checkpoints.restore_or_init(checkpointer, None, make_state, facts)
    assert same(state, make_state()) and meta == {}
    checkpointer.save(4, make_state(4, 4), facts)
    checkpointer.wait()

    def unused():
        raise AssertionError("init ran although there is a checkpoint")

    state, meta = checkpoints.restore_or_init(checkpointer, make_state(), unused, facts)
    assert same(state, make_state(4, 4)) and meta["step"] == 4
    changed = {**facts, "model": {**facts["model"], "embed_dim": 8}}
    with pytest.raises(UserError, match="another configuration: model.embed_dim was 6, is now 8"):
        checkpoints.restore_or_init(checkpointer, make_state(), unused, changed)


def test_load_params_from_every_kind_of_path(tmp_path, capsys):
    folder = save_all(tmp_path, [1, 2], ema=True).directory
    wanted = jax.eval_shape(lambda: make_state().params)
    for path, seed in ((tmp_path, 2), (folder, 2), (folder / "1", 1)):
        assert same(load_params(path, wanted), make_state(seed).params)
        assert read_meta(path)["step"] == seed
    assert "moving average" in capsys.readouterr().err
    average = load_params(tmp_path, wanted, use_ema=True)
    assert same(average, make_state(2, ema=True).ema)
    halves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), wanted)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_state(2).params)
    assert same(load_params(tmp_path, halves), expected)


def test_load_params_says_everything_that_does_not_fit(tmp_path):
    save_all(tmp_path / "run", [1])
    wanted = make_state(width=9).params
    wanted["decoder"] = wanted.pop("encoder")
    with pytest.raises(UserError) as error:
        load_params(tmp_path / "run", wanted)
    message = str(error.value)
    assert "2 missing in the checkpoint: params/decoder/" in message
    assert "2 only in the checkpoint: params/encoder/" in message
    assert "1 different: params/head is (6,), the model wants (9,)" in message
    with pytest.raises(UserError, match="holds no moving average"):
        load_params(tmp_path / "run", make_state().params, use_ema=True)
    with pytest.raises(UserError, match="does not exist. Did you mean run"):
        load_params(tmp_path / "rum", wanted)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no checkpoint; it should be"):
        read_meta(tmp_path / "empty")


def test_bad_configurations():
    with pytest.raises(UserError, match="period = 0 must be at least 1; set CHECKPOINT_PERIOD"):
        CheckpointConfig(period=0)
    with pytest.raises(UserError, match="'min' or 'max'"):
        CheckpointConfig(keep_best_mode="lowest")
