"""Sharding on 8 fake devices: meshes, the rules table, the state, the batch, and equal training."""

import dataclasses
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from chatyuan import sharding
from chatyuan.errors import UserError
from chatyuan.train.state import init_state
from chatyuan.train.step import make_train_step

sys.path.insert(0, str(pathlib.Path(__file__).parent / "train"))
import train_problem as problem  # noqa: E402

# (mesh, microbatches)
RUNS = [
    ({"data": 8}, 2),
    ({"data": 2, "fsdp": 4}, 1),
    ({"data": 2, "fsdp": 2, "tensor": 2}, 2),
    ({"fsdp": 2, "sequence": 2, "stage": 2}, 1),
]


def _mesh(**shape):
    return sharding.make_mesh(shape)


def test_mesh_has_every_axis_and_takes_the_rest():
    mesh = sharding.make_mesh({"data": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2, "sequence": 1, "stage": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert mesh.devices.size == 8


def test_slices_are_the_outer_parts_of_an_axis():
    mesh = sharding.make_mesh({"dcn_data": 2, "fsdp": -1, "tensor": 2})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2, "sequence": 1, "stage": 1}
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids[..., 0, 0], np.arange(8).reshape(2, 2, 2))
    both = sharding.make_mesh({"dcn_data": 2, "data": 2, "tensor": 2})
    ids = np.vectorize(lambda device: device.id)(both.devices)[:, 0, :, 0, 0]
    np.testing.assert_array_equal(ids, np.arange(8).reshape(4, 2))
    across = sharding.make_mesh({"data": 2, "dcn_fsdp": 2, "fsdp": 2})
    ids = np.vectorize(lambda device: device.id)(across.devices)[..., 0, 0, 0]
    np.testing.assert_array_equal(ids, [[0, 1, 4, 5], [2, 3, 6, 7]])


@dataclasses.dataclass(frozen=True)
class Chip:
    """As much of a TPU device as `mesh_utils` looks at."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "fake"
    device_kind: str = "fake"


@pytest.mark.parametrize(
    "shape",
    [{"dcn_data": 2, "fsdp": 2, "tensor": 2}, {"data": 2, "dcn_fsdp": 2, "fsdp": 2}],
    ids=str,
)
def test_pretended_slices_are_laid_out_as_real_ones(shape):
    grid = lambda chips: sharding.mesh._hybrid_grid(  # noqa: E731
        *(tuple(part.values()) for part in sharding.mesh_sizes(shape, 8)), chips
    )
    real = grid([Chip(i, i // 4) for i in range(8)])
    pretended = grid([Chip(i, 0) for i in range(8)])
    as_ids = np.vectorize(lambda chip: chip.id)
    np.testing.assert_array_equal(as_ids(real), as_ids(pretended))


def test_several_slices_become_copies_unless_told_otherwise():
    sizes = lambda shape: sharding.mesh_sizes(shape, 16, slices=2)  # noqa: E731
    within, across = sizes({"data": -1, "tensor": 4})
    assert (within["data"], within["tensor"], across["data"]) == (2, 4, 2)
    within, across = sizes({"dcn_fsdp": -1, "fsdp": 8})
    assert (within["fsdp"], across["fsdp"], across["data"]) == (8, 2, 1)
    with pytest.raises(UserError) as error:
        sizes({"dcn_data": 4, "fsdp": -1})
    assert "MESH dcn_data=4 needs 4 slices but the devices form 2; use --gin.MESH=" in str(error)
    assert "'dcn_data': 2" in str(error.value)


def test_abstract_mesh_needs_no_devices():
    mesh = sharding.abstract_mesh({"dcn_data": 4, "fsdp": 16, "tensor": -1}, 256)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 16, "tensor": 4, "sequence": 1, "stage": 1}
    assert sharding.describe(mesh) == "data=4 fsdp=16 tensor=4"
    assert sharding.describe(sharding.abstract_mesh({}, 1)) == "one device"


def test_mesh_of_given_devices():
    assert sharding.make_mesh({"data": -1}, devices=jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (
            {"data": 3},
            "MESH data=3 needs 3 devices but there are 8; use --gin.MESH=\"{'data': -1}\"",
        ),
        (
            {"data": 8, "tensor": 2},
            "needs 16 devices but there are 8; use --gin.MESH=\"{'data': -1, 'tensor': 2}\"",
        ),
        ({"data": -1, "tensor": 3}, "needs a multiple of 3 devices but there are 8"),
        ({"data": 4}, "needs 4 devices but there are 8"),
        ({"model": 8}, "MESH has the axis 'model'; the axes are data, fsdp"),
        ({"tensr": 8}, "Did you mean tensor?"),
        ({"data": -1, "fsdp": -1}, "-1 for data and fsdp; only one"),
        ({"data": 0}, "must be a positive number"),
        ({"data": 2.0}, "must be a positive number"),
        ({"dcn_data": 3, "fsdp": -1}, "MESH dcn_data=3 cuts 8 devices into 3 slices"),
        (
            {"dcn_data": 2, "fsdp": 8},
            "MESH dcn_data=2 fsdp=8 needs 16 devices but there are 8; "
            "use --gin.MESH=\"{'data': -1, 'dcn_data': 2}\"",
        ),
        ({"dcn_dta": 2}, "Did you mean dcn_data?"),
        ({"dcn_data": -1, "dcn_fsdp": -1}, "-1 for dcn_data and dcn_fsdp; only one"),
    ],
)
def test_mesh_mistakes(shape, message):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(shape)
    assert message in str(error.value)


def test_specs_follow_the_rules():
    mesh = _mesh(data=2, fsdp=2, tensor=2)
    spec = sharding.partition_spec
    assert spec(("embed", "mlp"), mesh) == PartitionSpec("fsdp", "tensor")
    assert spec(("layers", "heads", "embed"), mesh) == PartitionSpec(None, "tensor", "fsdp")
    assert spec(("batch", "length", None), mesh) == PartitionSpec(("data", "fsdp"), None, None)
    assert spec((), mesh) == PartitionSpec()


def test_two_axes_on_one_mesh_axis_are_an_error_unless_it_has_one_part():
    with pytest.raises(UserError) as error:
        sharding.partition_spec(("vocab", "mlp"), _mesh(data=4, tensor=2), name="fused/kernel")
    assert "fused/kernel: the axes 'vocab' and 'mlp'" in str(error.value)
    assert "'tensor'" in str(error.value)
    assert sharding.partition_spec(("vocab", "mlp"), _mesh(data=8)) == PartitionSpec(None, None)


def test_parameter_that_does_not_divide_is_named():
    with pytest.raises(UserError) as error:
        sharding.shardings(
            {"attention": {"query": jax.ShapeDtypeStruct((16, 6), jnp.float32)}},
            {"attention": {"query": ("embed", "heads")}},
            _mesh(data=2, tensor=4),
        )
    assert "attention/query: its axis 'heads' of size 6 does not divide over 4" in str(error.value)


def test_unknown_logical_axis_is_a_programming_error():
    with pytest.raises(AssertionError, match="'colour' has no rule"):
        sharding.partition_spec(("colour",), _mesh(data=8))


def test_shardings_are_never_a_no_op_on_cpu():
    mesh = _mesh(data=2, fsdp=2, tensor=2)
    params = problem.init_params()
    placed = jax.device_put(params, sharding.shardings(params, problem.AXES, mesh))
    shard = placed["wi"].addressable_shards[0]
    assert shard.data.shape == (2, problem.EMBED // 2, problem.MLP // 2)
    assert len({s.device for s in placed["wi"].addressable_shards}) == 8


def test_batch_becomes_global_arrays():
    mesh = _mesh(data=2, fsdp=2, sequence=2)
    batch = problem.make_batch(8)
    placed = sharding.shard_batch(batch, mesh)
    for name, value in batch.items():
        np.testing.assert_array_equal(placed[name], value)
        spec = PartitionSpec(("data", "fsdp"), ("sequence",))
        assert placed[name].sharding == NamedSharding(mesh, spec)
        assert placed[name].addressable_shards[0].data.shape == (2, problem.LENGTH // 2)

    abstract = sharding.abstract_batch(batch, mesh)
    for name, value in placed.items():
        assert (abstract[name].shape, abstract[name].dtype) == (value.shape, value.dtype)
        assert abstract[name].sharding == value.sharding


def test_batches_are_placed_one_ahead_and_in_order():
    mesh, read = _mesh(data=8), []

    def rows():
        for number in range(3):
            read.append(number)
            yield {"tokens": np.full((8, 4), number)}

    stream = sharding.shard_ahead(rows(), mesh)
    assert int(next(stream)["tokens"][0, 0]) == 0 and not read[2:]
    assert [int(batch["tokens"][0, 0]) for batch in stream] == [1, 2]

    endless = sharding.shard_ahead(({"tokens": np.zeros((8, 4))} for _ in iter(int, 1)), mesh)
    next(endless)
    endless.close()  # its thread ends

    def broken():
        yield {"tokens": np.zeros((8, 4))}
        raise UserError("the cache is cut off")

    stream = sharding.shard_ahead(broken(), mesh)
    next(stream)
    with pytest.raises(UserError, match="cut off"):
        next(stream)


def test_batch_that_does_not_divide_over_the_data_shards():
    with pytest.raises(UserError) as error:
        sharding.shard_batch({"tokens": np.zeros((130, 4), np.int32)}, _mesh(data=8))
    assert str(error.value) == (
        "train batch of 130 sequences does not divide over 8 data shards (mesh data=8); "
        "use 128 or 136: --gin.BATCH_SIZE=128"
    )


def test_length_that_does_not_divide_over_the_sequence_axis():
    with pytest.raises(UserError, match="tokens: its axis 'length' of size 5"):
        sharding.shard_batch({"tokens": np.zeros((8, 5), np.int32)}, _mesh(data=4, sequence=2))


def test_length_that_does_not_divide_over_sequence_parallel_devices():
    batch, mesh = {"tokens": np.zeros((8, 6), np.int32)}, _mesh(data=2, tensor=4)
    sharding.check_lengths(batch, mesh)
    with pytest.raises(UserError) as error:
        sharding.check_lengths(batch, mesh, sequence_parallel=True)
    assert "tokens: its axis 'norm_length' of size 6 does not divide over 4" in str(error.value)


def test_check_batch_counts_microbatches():
    mesh = _mesh(data=8)
    sharding.check_batch(32, mesh, 4)
    with pytest.raises(UserError) as error:
        sharding.check_batch(24, mesh, 2)
    assert "8 data shards (mesh data=8) times 2 microbatches; use 16 or 32" in str(error.value)
    with pytest.raises(
        UserError, match="5 sequences does not divide over 2 microbatches; use 4 or 6"
    ):
        sharding.check_batch(5, sharding.make_mesh({"data": 1}, jax.devices()[:1]), 2)


@pytest.mark.parametrize("name", ["adafactor", "adamw", "muon"])
def test_state_lies_where_its_parameters_lie(name):
    mesh = _mesh(data=2, fsdp=2, tensor=2)
    _, optimizer = problem.make_parts(
        name, **({"min_dim_size_to_factor": 8} if name == "adafactor" else {})
    )
    abstract = jax.eval_shape(lambda: init_state(problem.init_params(), optimizer, ema=True))
    placement = sharding.state_shardings(abstract, problem.AXES, mesh)
    expected = sharding.shardings(abstract.params, problem.AXES, mesh)
    assert placement.params == placement.ema == expected
    assert placement.step.spec == PartitionSpec()
    specs = {
        jax.tree_util.keystr(path, simple=True, separator="/"): place.spec
        for path, place in jax.tree_util.tree_leaves_with_path(placement.opt_state)
    }
    both = PartitionSpec(None, "fsdp", "tensor")
    if name == "adafactor":
        assert specs["moments/wi/row"] == PartitionSpec(None, "fsdp", None)
        assert specs["moments/wi/column"] == PartitionSpec(None, None, "tensor")
        assert specs["moments/norm/full"] == PartitionSpec("fsdp")
    else:
        moments = [spec for path, spec in specs.items() if path.endswith("/wi")]
        assert moments == [both] * (2 if name == "adamw" else 1)
    assert all(spec == PartitionSpec() for path, spec in specs.items() if "count" in path)


ZERO = {  # stage -> the factor by which (parameters, gradients, optimizer state) are split
    0: (1, 1, 1),
    1: (1, 1, 8),
    2: (1, 8, 8),
}


@pytest.mark.parametrize("stage", ZERO)
def test_zero_splits_what_copies_share(stage):
    mesh = _mesh(data=4, sequence=2)
    _, optimizer = problem.make_parts("adamw")
    abstract = jax.eval_shape(lambda: init_state(problem.init_params(), optimizer, ema=True))
    config = sharding.ShardingConfig(zero_stage=stage)
    placement = sharding.place(abstract, problem.AXES, mesh, config)
    found = [
        sharding.bytes_per_device(tree, places)
        for tree, places in (
            (abstract.params, placement.state.params),
            (abstract.params, placement.gradients),
            (abstract.ema, placement.state.ema),
        )
    ]
    size = sharding.bytes_per_device(
        abstract.params,
        jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), abstract.params),
    )
    assert [size / bytes_ for bytes_ in found] == pytest.approx(ZERO[stage], rel=0.02)
    assert placement.updates == placement.state.ema
    # Whole layers where they divide: what an optimizer sums over a matrix stays on one device.
    if stage:
        assert placement.updates["wi"].spec == PartitionSpec(("sequence",), ("data",), None)


def test_mistaken_strategies():
    with pytest.raises(UserError, match="zero_stage = 3 must be 0, 1 or 2; stage 3 is the mesh"):
        sharding.ShardingConfig(zero_stage=3)
    with pytest.raises(UserError, match="memory_budget = 0 must be positive"):
        sharding.ShardingConfig(memory_budget=0)


def test_a_memory_budget_splits_only_what_does_not_fit():
    mesh = _mesh(fsdp=8)
    _, optimizer = problem.make_parts("adamw")
    abstract = jax.eval_shape(lambda: init_state(problem.init_params(), optimizer))

    def used(placement):
        return sharding.bytes_per_device(abstract, placement.state) + sharding.bytes_per_device(
            abstract.params, placement.gradients
        )

    def place(budget):
        config = sharding.ShardingConfig(memory_budget=budget / 2**30)
        return sharding.place(abstract, problem.AXES, mesh, config)

    everything = sharding.place(abstract, problem.AXES, mesh)
    most = used(place(2**40))
    assert set(place(2**40).whole) == set(problem.AXES)
    assert used(everything) < most / 7
    assert place(used(everything)).state == everything.state
    previous = ()
    for budget in np.linspace(used(everything), most, 7):
        placement = place(budget)
        assert used(placement) <= budget
        assert len(placement.whole) >= len(previous)
        previous = placement.whole
        for name in problem.AXES:
            whole = placement.state.params[name].is_fully_replicated
            assert whole == (name in placement.whole)
    with pytest.raises(UserError, match="when everything is split .MESH fsdp=8.; use more devices"):
        place(used(everything) - 8)


def test_bytes_per_device():
    mesh = _mesh(data=2, fsdp=4)
    params = jax.eval_shape(problem.init_params)
    placement = sharding.shardings(params, problem.AXES, mesh)
    whole = sum(leaf.size * 4 for leaf in jax.tree.leaves(params))
    # Every parameter of the problem has an "embed" axis.
    assert sharding.bytes_per_device(params, placement) == whole // 4
    described = sharding.with_shardings(params, placement)
    assert described["wi"].sharding == placement["wi"]
    assert described["wi"].shape == params["wi"].shape


def _train(mesh, microbatches, name, steps=3):
    """(final parameters, losses, gradient norms) of a short run on a mesh, or on one device."""
    schedule, optimizer = problem.make_parts(name, clip_norm=1.0)
    loss_fn = problem.make_loss(dropout_rate=0.2)
    step = make_train_step(loss_fn, optimizer, schedule, microbatches=microbatches, seed=1)
    state = init_state(problem.init_params(), optimizer)
    if mesh is not None:
        placement = sharding.state_shardings(state, problem.AXES, mesh)
        state = jax.device_put(state, placement)
    losses, norms = [], []
    for index in range(steps):
        batch = problem.make_batch(16, seed=index)
        batch = jax.device_put(batch) if mesh is None else sharding.shard_batch(batch, mesh)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
        norms.append(float(metrics["grad_norm"][0]))
        if mesh is not None:
            for leaf, place in zip(*map(jax.tree.leaves, (state, placement)), strict=True):
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    return jax.tree.map(np.asarray, state.params), losses, norms


@pytest.fixture(scope="module")
def one_device():
    return {m: _train(None, m, "adamw") for m in (1, 2)}


@pytest.mark.parametrize(("shape", "microbatches"), RUNS, ids=str)
def test_eight_devices_equal_one(one_device, shape, microbatches):
    params, losses, norms = _train(sharding.make_mesh(shape), microbatches, "adamw")
    expected_params, expected_losses, expected_norms = one_device[microbatches]
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-5)
    for name, value in expected_params.items():
        np.testing.assert_allclose(
            params[name], value, atol=1e-5 * np.abs(value).max(), err_msg=name
        )


def test_every_device_computes_its_share_of_a_microbatch():
    """The rows of a microbatch are spread over the data shards, not worked off by all of them."""
    schedule, optimizer = problem.make_parts()
    flops = {}
    for devices in (1, 8):
        mesh = sharding.make_mesh({"data": devices}, jax.devices()[:devices])
        step = make_train_step(problem.make_loss(), optimizer, schedule, microbatches=2)
        state = init_state(problem.init_params(), optimizer)
        state = jax.device_put(state, sharding.state_shardings(state, problem.AXES, mesh))
        batch = sharding.shard_batch(problem.make_batch(256), mesh)
        flops[devices] = step.lower(state, batch).compile().cost_analysis()["flops"]
    assert flops[8] < flops[1] / 6
