"""Which collectives a compiled program runs, and with how many bytes, read from its HLO text.

XLA decides the communication, so this is what holds a statement about it to account. Instructions
inside loops count as often as the loop runs, which XLA writes down for loops of a fixed number of
iterations; for any other it is not knowable and `Collective.times` counts one iteration. (The loop
over microbatches has a fixed number unless the batch grows.)
"""

import math
import re
from collections.abc import Iterator, Mapping

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from chatyuan.sharding.communication import KINDS, Collective

_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8, "s4": 4, "u4": 4}
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*)$")
_COLLECTIVE = re.compile(rf"(?P<type>.*?) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\(")
_CALLED = re.compile(r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}")
_NAMED = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


def read_collectives(hlo_text: str, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """Returns the collectives of a program compiled for this mesh, in no particular order.

    Args:
        hlo_text: of `jax.jit(...).lower(...).compile().as_text()`.
        mesh: whose device order numbers the partitions.
    """
    computations = dict(_computations(hlo_text))
    entry = next(name for name in computations if name.startswith("ENTRY "))
    found: list[Collective] = []
    _visit(entry, 1, computations, tuple(mesh.shape.items()), found)
    return found


def _visit(
    name: str,
    times: int,
    computations: Mapping[str, list[str]],
    sizes: tuple[tuple[str, int], ...],
    found: list[Collective],
) -> None:
    for line in computations.get(name, ()):
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        text = match.group(1)
        collective = _COLLECTIVE.match(text)
        if collective:
            # A TPU's reduce-scatter is a fusion of this name around an all-reduce.
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else None
            found += _read(collective, text, times, sizes, kind)
            continue
        if " async-done(" in text or " async-update(" in text:
            continue  # counted where it starts
        trips = _TRIPS.search(text)
        inner = times * (int(trips.group(1)) if trips and " while(" in text else 1)
        called = _CALLED.findall(text)
        for branches in _BRANCHES.findall(text):
            called += [branch.strip().lstrip("%") for branch in branches.split(",")]
        for other in called:
            _visit(other, inner, computations, sizes, found)


def _read(
    match: re.Match,
    text: str,
    times: int,
    sizes: tuple[tuple[str, int], ...],
    fused: str | None,
) -> Iterator[Collective]:
    """One collective; several arrays reduced together are one with the sum of their bytes."""
    kind = match.group("kind")
    arrays = [_bytes(*array) for array in _ARRAY.findall(match.group("type"))]
    if match.group("start") and kind != "all-reduce":
        # (operands, results, ...) of what goes on in the background.
        arrays = arrays[1:2] if kind == "collective-permute" else arrays[len(arrays) // 2 :]
    groups = _groups(text, math.prod(size for _, size in sizes))
    names, shape = tuple(name for name, _ in sizes), tuple(size for _, size in sizes)
    places = np.stack(np.unravel_index(groups, shape), axis=-1)  # [groups, devices, axes]
    varying = (places != places[:, :1]).any(axis=(0, 1))
    axes = tuple(name for name, varies in zip(names, varying, strict=True) if varies)
    devices = groups.shape[1]
    if devices == 1:
        return
    payload = sum(arrays) * (devices if kind == "reduce-scatter" else 1)
    yield Collective(fused or kind, axes, payload, devices, times)


def _groups(text: str, count: int) -> np.ndarray:
    """Partition ids [groups, devices of a group]; pairs (from, to) of a permutation."""
    iota = _IOTA.search(text)
    if iota:
        shape, dimensions, order = (
            tuple(map(int, part.split(","))) if part else None for part in iota.groups()
        )
        ids = np.arange(math.prod(dimensions)).reshape(dimensions)
        return (ids.transpose(order) if order else ids).reshape(shape)
    named = _NAMED.search(text)
    if named:
        return _named_groups(*named.groups(), count)
    listed = _LISTED.search(text)
    if listed is None:
        return np.arange(count).reshape(1, count)
    groups = re.findall(r"\{([\d,]+)\}", listed.group(1))
    return np.asarray([[int(i) for i in group.split(",")] for group in groups])


def _named_groups(
    written: str, dimensions: str | None, order: str | None, over: str, count: int
) -> np.ndarray:
    """Groups over axes of a mesh that XLA has named itself, `'a':(2)4` being a part of axis a.

    The part of size 4 after 2 outer ones: the axis is cut into 2, 4 and the rest.
    """
    axes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", written)}
    ids = np.arange(count)
    if dimensions:
        ids = ids.reshape([int(size) for size in dimensions.split(",")])
        ids = ids.transpose([int(axis) for axis in order.split(",")]) if order else ids
    taken = {
        name: (int(before or 1), int(size or axes[name]))
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", over)
    }
    shape, chosen = [], []
    for name, size in axes.items():
        before, part = taken.get(name, (1, 1))
        chosen.append(len(shape) + 1)
        shape += [before, part, size // before // part]
    return np.moveaxis(
        ids.reshape(shape), chosen, range(len(shape) - len(chosen), len(shape))
    ).reshape(-1, math.prod(part for _, part in taken.values()))


def _bytes(dtype: str, shape: str) -> int:
    bits = _BITS.get(dtype) or int(re.search(r"\d+", dtype).group())
    return math.prod(int(size) for size in shape.split(",") if size) * bits // 8


def _computations(hlo_text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, lines) of every computation; the entry's name begins with `ENTRY `."""
    name, lines = None, []
    for line in hlo_text.splitlines():
        if name is None:
            head = re.match(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$", line)
            if head and not line.startswith("HloModule"):
                name, lines = (head.group(1) or "") + head.group(2), []
        elif line.startswith("}"):
            yield name, lines
            name = None
        else:
            lines.append(line)
