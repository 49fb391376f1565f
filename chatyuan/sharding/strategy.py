"""What is split beyond the rules table: ZeRO over copies of a parameter, and the adaptive hybrid.

The mesh says how many copies of a parameter there are: one for each device of `data` and
`sequence`, and of `fsdp` where the rules do not split it. `ShardingConfig` says what the copies
share (Rajbhandari et al. 2020, arXiv:1910.02054, sections 5.1 to 5.3):

1. `zero_stage` 1: each copy keeps and updates its part of the optimizer state, and of the moving
   average; the new parameters are gathered.
2. `zero_stage` 2: gradients are summed in parts as well, those of microbatches too.
3. The parameters themselves are split by the mesh axis `fsdp` (stage 3). With `data` beside it,
   parameters are split inside a group and copied across groups: MiCS (arXiv:2205.00119), and with
   `zero_stage` 1 or 2 ZeRO++'s hpZ (arXiv:2306.10209), whose optimizer state is split over all.
4. `memory_budget`: `fsdp` splits no more parameters than the budget of a device asks for.

A part is a slice of the first dimension that divides: of whole layers where possible, so that what
an optimizer computes from a whole matrix stays on one device. What divides nowhere stays whole.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from chatyuan.errors import UserError
from chatyuan.sharding.mesh import describe
from chatyuan.sharding.rules import RULES, AnyMesh, Rules, Tree, bytes_per_device, partition_spec

Path = tuple[str, ...]
Spec = tuple[tuple[str, ...], ...]  # mesh axes of every dimension


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """How the copies of a parameter share their work; `gin/sharding` holds the usual choices.

    Raises:
        UserError: a value out of range.
    """

    zero_stage: int = dataclasses.field(
        default=0,
        metadata={"help": "what copies share: 0 nothing, 1 optimizer state, 2 gradients too"},
    )
    memory_budget: float | None = dataclasses.field(
        default=None,
        metadata={
            "help": "weights, gradients and optimizer state that a device may hold: fsdp splits "
            "only the parameters that do not fit; None = all of them",
            "unit": "GiB",
        },
    )

    def __post_init__(self) -> None:
        """Checks both values."""
        if self.zero_stage not in (0, 1, 2):
            raise UserError(
                f"ShardingConfig.zero_stage = {self.zero_stage} must be 0, 1 or 2; stage 3 is the "
                "mesh axis fsdp: --gin.MESH=\"{'fsdp': -1}\"."
            )
        if self.memory_budget is not None and self.memory_budget <= 0:
            raise UserError(
                f"ShardingConfig.memory_budget = {self.memory_budget} must be positive, in GiB; "
                "None splits every parameter over fsdp."
            )


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where everything of a training step lives, as trees of `NamedSharding`.

    Attributes:
        state: of the whole TrainState.
        gradients: of the gradients while they are summed, a tree like the parameters.
        updates: of what the optimizer computes before it reaches the parameters, likewise.
        whole: parameters that fsdp leaves whole because the memory budget allows it, as paths.
    """

    state: Any
    gradients: Tree
    updates: Tree
    whole: tuple[str, ...] = ()

    def facts(self) -> dict[str, str]:
        """Returns what the memory budget decided, for the lines printed at the start of a run."""
        if not self.whole:
            return {}
        count = len(jax.tree.leaves(self.updates))
        return {"not split by fsdp": f"{len(self.whole)} of {count}: {', '.join(self.whole)}"}


def place(
    abstract_state: Any,
    logical_axes: Tree,
    mesh: AnyMesh,
    config: ShardingConfig | None = None,
    *,
    rules: Rules = RULES,
) -> Placement:
    """Returns the places of a training step's arrays.

    What belongs to a parameter lies with the parameter's part: an array belongs to a parameter if
    its path in the state contains the parameter's path. Dimensions that an optimizer has reduced
    to 1 are not split; everything else (steps, counts) is on every device.

    Args:
        abstract_state: arrays or shapes with fields `params`, `opt_state` and `ema`, such as
            `jax.eval_shape` of `chatyuan.train.state.init_state`.
        logical_axes: the tree of parameters with a tuple of logical axis names per parameter.
        mesh: of `make_mesh` or `abstract_mesh`.
        config: None = ShardingConfig().
        rules: logical axis -> mesh axes.

    Raises:
        UserError: a dimension does not divide, or the budget is too small even for split state.
    """
    config = config or ShardingConfig()
    parameters = _parameters(abstract_state.params, logical_axes)
    whole: tuple[Path, ...] = ()
    if config.memory_budget is not None:
        whole = _left_whole(abstract_state, parameters, mesh, config, rules)
    placement = _placement(abstract_state, parameters, mesh, config, rules, whole)
    return dataclasses.replace(placement, whole=tuple("/".join(path) for path in whole))


def state_shardings(
    abstract_state: Any,
    logical_axes: Tree,
    mesh: AnyMesh,
    config: ShardingConfig | None = None,
    *,
    rules: Rules = RULES,
) -> Any:
    """Returns `place(...).state`: the sharding of every array of a TrainState."""
    return place(abstract_state, logical_axes, mesh, config, rules=rules).state


@dataclasses.dataclass(frozen=True)
class _Parameter:
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


def _parameters(abstract_params: Tree, logical_axes: Tree) -> dict[Path, _Parameter]:
    flat = jax.tree.map(
        lambda leaf, axes: _Parameter(tuple(leaf.shape), tuple(axes)), abstract_params, logical_axes
    )
    is_leaf = lambda node: isinstance(node, _Parameter)  # noqa: E731
    return {
        _keys(path): parameter
        for path, parameter in jax.tree_util.tree_leaves_with_path(flat, is_leaf=is_leaf)
    }


def _placement(
    abstract_state: Any,
    parameters: Mapping[Path, _Parameter],
    mesh: AnyMesh,
    config: ShardingConfig,
    rules: Rules,
    whole: Sequence[Path],
) -> Placement:
    unsplit = {
        name: tuple(axis for axis in mesh_axes if axis != "fsdp")
        for name, mesh_axes in rules.items()
    }
    own: dict[Path, Spec] = {}
    shared: dict[Path, Spec] = {}
    for path, parameter in parameters.items():
        spec = partition_spec(
            parameter.axes,
            mesh,
            shape=parameter.shape,
            name="/".join(path),
            rules=unsplit if path in whole else rules,
        )
        # jax writes a single axis without its tuple.
        own[path] = tuple((e,) if isinstance(e, str) else e or () for e in spec)
        shared[path] = own[path]
        if config.zero_stage:
            shared[path] = _among_copies(parameter.shape, own[path], mesh, rules)

    def places(tree: Tree, specs: Mapping[Path, Spec]) -> Tree:
        def one(path: tuple, leaf: Any) -> NamedSharding:
            owner = _owner(_keys(path), parameters)
            if owner is None:
                return NamedSharding(mesh, PartitionSpec())
            return NamedSharding(mesh, _kept(leaf.shape, parameters[owner].shape, specs[owner]))

        return jax.tree_util.tree_map_with_path(one, tree)

    params = places(abstract_state.params, own)
    state = dataclasses.replace(places(abstract_state, shared), params=params)
    updates = places(abstract_state.params, shared)
    return Placement(state, updates if config.zero_stage == 2 else params, updates)


def _among_copies(shape: tuple[int, ...], spec: Spec, mesh: AnyMesh, rules: Rules) -> Spec:
    """The spec of one copy's part: every axis of copies on the first dimension that divides."""
    entries = list(spec)
    used = {axis for entry in spec for axis in entry}
    for axis in (*rules["batch"], *rules["length"]):
        if mesh.shape[axis] == 1 or axis in used:
            continue
        for dimension, size in enumerate(shape):
            parts = math.prod(mesh.shape[name] for name in (*entries[dimension], axis))
            if size % parts == 0:
                entries[dimension] = (*entries[dimension], axis)
                break
    return tuple(entries)


def _kept(shape: Sequence[int], parameter_shape: Sequence[int], spec: Spec) -> PartitionSpec:
    """The parameter's entries where the array has the parameter's size, None elsewhere."""
    if len(shape) != len(parameter_shape):
        return PartitionSpec(*(None,) * len(shape))
    return PartitionSpec(
        *(
            (entry or None) if size == full else None
            for size, full, entry in zip(shape, parameter_shape, spec, strict=True)
        )
    )


def _left_whole(
    abstract_state: Any,
    parameters: Mapping[Path, _Parameter],
    mesh: AnyMesh,
    config: ShardingConfig,
    rules: Rules,
) -> tuple[Path, ...]:
    """The parameters that need no fsdp: starting from none split, the fewest and largest are.

    Splitting saves memory and costs two gathers a step, in proportion to the size of the parameter.
    So the largest are split, until one alone suffices, and then the smallest such.
    """

    def needed(whole: Sequence[Path]) -> dict[Path, int]:
        """Bytes per device of each parameter with its gradient and optimizer state."""
        return _owned_bytes(
            abstract_state,
            parameters,
            _placement(abstract_state, parameters, mesh, config, rules, whole),
        )

    as_copies, split = needed(tuple(parameters)), needed(())
    budget = config.memory_budget * 2**30
    total = sum(as_copies.values())
    saved = {path: as_copies[path] - split.get(path, 0) for path in parameters}
    if total - sum(saved.values()) > budget:
        least = (total - sum(saved.values())) / 2**30
        raise UserError(
            f"ShardingConfig.memory_budget = {config.memory_budget} GiB, but weights, gradients "
            f"and optimizer state take {least:.3g} GiB per device when everything is split (MESH "
            f"{describe(mesh)}); use more devices on fsdp or a budget of at least {least:.3g}."
        )
    # Equal sizes go by name: every process and every restart must decide alike.
    rest = sorted((path for path in parameters if saved[path] > 0), key=lambda p: (-saved[p], p))
    chosen = []
    while total > budget:
        enough = [path for path in rest if total - saved[path] <= budget]
        path = enough[-1] if enough else rest[0]
        rest.remove(path)
        chosen.append(path)
        total -= saved[path]
    return tuple(path for path in parameters if saved[path] > 0 and path not in chosen)


def _owned_bytes(
    abstract_state: Any, parameters: Mapping[Path, _Parameter], placement: Placement
) -> dict[Path, int]:
    """Bytes per device by owner; () owns what belongs to no parameter."""
    trees = [
        (abstract_state, placement.state),
        (abstract_state.params, placement.gradients),
    ]
    found: dict[Path, int] = dict.fromkeys(parameters, 0)
    for tree, places in trees:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        for (path, leaf), sharding in zip(leaves, jax.tree.leaves(places), strict=True):
            owner = _owner(_keys(path), parameters) or ()
            found[owner] = found.get(owner, 0) + bytes_per_device(leaf, sharding)
    return found


def _owner(path: Path, parameters: Mapping[Path, _Parameter]) -> Path | None:
    """The parameter whose path is a run of keys of this path, the longest that begins first."""
    windows = (
        path[start:stop] for start in range(len(path)) for stop in range(len(path), start, -1)
    )
    return next((window for window in windows if window in parameters), None)


def _keys(path: tuple) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)
