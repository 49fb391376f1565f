"""What a strategy costs in communication, as formulas; `compiled` holds them to account.

Every device of a parameter's copies has computed a gradient from its own tokens, so a step must sum
P bytes of gradients whatever is split (P: what one device would hold without `fsdp`; n devices):

- copies (`data`): all-reduce of P.
- ZeRO-1 and 2: reduce-scatter of P, then all-gather of P of new parameters: the same volume, for an
  all-reduce is these two. ZeRO-1 sums microbatches in whole gradients and so reduces each whole.
- `fsdp`: reduce-scatter of P, all-gather of P for the forward and again for the backward pass (once
  where XLA keeps what it has gathered: layers that are neither scanned nor rematerialised).
- `fsdp` in groups, copies across: as `fsdp` inside, all-reduce of P / fsdp across.

What activations cost is known where the model is: `chatyuan.models.communication`.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator

import jax
from jax.sharding import NamedSharding

from chatyuan.sharding.rules import RULES, AnyMesh, Tree
from chatyuan.sharding.strategy import Placement

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of collective over one set of devices.

    Attributes:
        kind: one of KINDS.
        axes: the mesh axes over which devices talk to each other.
        payload: bytes of the whole array on one device: what an all-gather returns, what the
            others take.
        devices: that take part in one exchange.
        times: how often it runs in a step.
    """

    kind: str
    axes: tuple[str, ...]
    payload: int
    devices: int
    times: int = 1

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends in all: ring algorithms, which are optimal in volume.

        (n-1)/n of the payload for all-gather, reduce-scatter and all-to-all, twice that for
        all-reduce (Patarasuk & Yuan 2009), all of it for a permutation.
        """
        if self.kind == "collective-permute":
            return float(self.payload * self.times)
        share = (self.devices - 1) / self.devices
        return self.payload * self.times * share * (2 if self.kind == "all-reduce" else 1)


def summed(collectives: Iterable[Collective]) -> dict[str, int]:
    """Returns payload bytes of a step by kind; kinds that do not occur are left out."""
    totals: dict[str, int] = {}
    for one in collectives:
        totals[one.kind] = totals.get(one.kind, 0) + one.payload * one.times
    return totals


@dataclasses.dataclass(frozen=True)
class Use:
    """How a microbatch uses a parameter.

    Attributes:
        gathers: how often it gathers a parameter that fsdp splits; 0: it works on the parts, and
            the gradient of a part stays with it.
        width: bytes per value while the parameter is gathered and its gradient reduced: those of
            the compute dtype where it is cast first. Updates always take the array's own.
        sums: how often it sums the gradient, except over `data`, over which it does so once.
        joint: whether gradients are summed over rows and over lengths at once. XLA does one after
            the other behind a matrix product.
    """

    gathers: int = 2
    width: int = 4
    sums: int = 1
    joint: bool = False


def parameter_communication(
    abstract_params: Tree,
    placement: Placement,
    mesh: AnyMesh,
    *,
    microbatches: int = 1,
    use: Callable[[str], Use] = lambda path: Use(),
    reduce_scatter: bool = True,
) -> list[Collective]:
    """Returns what parameters, gradients and updates cost in one step.

    Args:
        abstract_params: the tree of parameters.
        placement: of `place`.
        mesh: of the placement.
        microbatches: gradients are summed over them; each uses the parameters anew.
        use: path -> how a microbatch uses the parameter.
        reduce_scatter: False counts a reduce-scatter as an all-reduce (whose result is then cut),
            which is what XLA makes of it on CPU.
    """
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params)
    places = (placement.state.params, placement.gradients, placement.updates)
    found: list[Collective] = []
    for (key, leaf), *at in zip(leaves, *map(jax.tree.leaves, places), strict=True):
        path = jax.tree_util.keystr(key, simple=True, separator="/")
        found += _of_one(leaf, *at, mesh, use(path), microbatches, reduce_scatter)
    return found


def _of_one(
    leaf: jax.ShapeDtypeStruct,
    parameter: NamedSharding,
    gradient: NamedSharding,
    update: NamedSharding,
    mesh: AnyMesh,
    use: Use,
    times: int,
    reduce_scatter: bool,
) -> Iterator[Collective]:
    token_axes = [a for a in (*RULES["batch"], *RULES["length"]) if mesh.shape[a] > 1]
    own, summed_at, updated_at = (
        [a for a in token_axes if a in _axes(place)] for place in (parameter, gradient, update)
    )
    # Values where the parameter is whole, as far as it ever is.
    size = leaf.size // _count([a for a in _axes(parameter) if a not in token_axes], mesh)
    if not use.gathers:
        size //= _count(own, mesh)
        token_axes, summed_at, updated_at = (
            [a for a in axes if a not in own] for axes in (token_axes, summed_at, updated_at)
        )
        own = []

    def collective(kind: str, axes: list[str], values: int, width: int, times: int) -> Collective:
        return Collective(kind, tuple(axes), values * width, _count(axes, mesh), times)

    if own:
        yield collective("all-gather", own, size, use.width, times * use.gathers)
    # One microbatch: XLA sees that only a part of the sum is used, and reduces just that.
    scattered = summed_at if times > 1 else updated_at
    left = size
    for kind, axes in (
        ("reduce-scatter" if reduce_scatter else "all-reduce", scattered),
        ("all-reduce", [a for a in token_axes if a not in scattered]),
    ):
        rows = [a for a in axes if use.joint or a in RULES["batch"]]
        for group in (rows, [a for a in axes if a not in rows]):
            copies = [a for a in group if a == "data" and use.sums > 1]
            inner = [a for a in group if a not in copies]
            if inner:
                yield collective(kind, inner, left, use.width, times * use.sums)
            if copies:
                yield collective(kind, copies, left, leaf.dtype.itemsize, times)
            if kind == "reduce-scatter":
                left //= _count(group, mesh)
        if axes is scattered and kind == "all-reduce":
            left //= _count(axes, mesh)
    new = [a for a in updated_at if a not in own]
    if new:
        whole = size // _count(own, mesh)
        yield collective("all-gather", new, whole, leaf.dtype.itemsize, 1)


def _axes(place: NamedSharding) -> list[str]:
    entries = (entry if isinstance(entry, tuple) else (entry,) for entry in place.spec if entry)
    return [axis for entry in entries for axis in entry]


def _count(axes: Iterable[str], mesh: AnyMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
