"""Token sources made up for tests: every token names its document and its place in it."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np

from chatyuan.data.cache import CacheWriter, Ragged
from chatyuan.data.stream import Source

FIRST = 1000  # ids below are special


@dataclasses.dataclass(frozen=True)
class Ids:
    """A vocabulary as far as the data room looks at it."""

    sentinel_ids: tuple[int, ...] = tuple(range(199, 99, -1))
    eos_id: int = 1
    pad_id: int = 0
    sha256: str = "0" * 64
    path: pathlib.Path = pathlib.Path("made_up.model")
    size: int = 1 << 20

    def id(self, piece: str) -> int | None:
        names = [f"<extra_id_{n}>" for n in range(len(self.sentinel_ids))]
        return self.sentinel_ids[names.index(piece)] if piece in names else None


def documents(lengths: Sequence[int], first: int = FIRST) -> list[np.ndarray]:
    """Documents of the given lengths whose tokens are all different."""
    ends = first + np.cumsum(lengths)
    return [np.arange(end - n, end) for end, n in zip(ends, lengths, strict=True)]


def ragged(rows: Sequence[np.ndarray]) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    flat = np.concatenate([*rows, np.zeros(0, np.int32)]).astype(np.int32)
    return Ragged(flat, offsets)


def source(lengths: Sequence[int], name: str = "text", rate: float = 1.0) -> Source:
    """A plain text source."""
    return Source(name, ragged(documents(lengths)), rate=rate)


def pairs(
    inputs: Sequence[int], targets: Sequence[int], name: str = "pairs", rate: float = 1.0
) -> Source:
    """A source with inputs and targets."""
    return Source(
        name, ragged(documents(targets)), ragged(documents(inputs, FIRST + sum(targets))), rate
    )


def write_cache(folder: pathlib.Path, task: str, given: Source, split: str = "train") -> None:
    """Writes a source as a token cache."""
    features = {"targets": given.targets, **({"inputs": given.inputs} if given.inputs else {})}
    with CacheWriter(folder, task, split, features=list(features), vocabulary=Ids()) as writer:
        writer.write(
            {name: each.tokens for name, each in features.items()},
            {name: each.lengths for name, each in features.items()},
        )
        writer.finish({"documents": len(given.targets)})


def restore(inputs: Sequence[int], targets: Sequence[int], ids: Ids) -> list[int]:
    """The text that span corruption or a split was made from; both sides end with eos."""
    inputs, targets = list(inputs), list(targets)
    assert inputs[-1] == ids.eos_id and targets[-1] == ids.eos_id
    inputs, targets = inputs[:-1], targets[:-1]
    sentinels = set(ids.sentinel_ids)
    if not sentinels & set(targets):
        return inputs + targets
    removed: dict[int, list[int]] = {}
    for token in targets:
        if token in sentinels:
            current = removed.setdefault(token, [])
        else:
            current.append(token)
    text: list[int] = []
    for token in inputs:
        text += removed.pop(token) if token in sentinels else [token]
    assert not any(removed.values()), "a removed span has no place in the inputs"
    return text


def _rows(batch: dict, side: str) -> list[dict[int, slice]]:
    found = []
    for ids in batch[f"{side}_segment_ids"]:
        places = {}
        for segment in range(1, int(ids.max()) + 1):
            where = np.flatnonzero(ids == segment)
            assert len(where) and where[-1] - where[0] + 1 == len(where), "a segment is contiguous"
            places[segment] = slice(int(where[0]), int(where[-1]) + 1)
        used = sum(place.stop - place.start for place in places.values())
        assert (ids[used:] == 0).all(), "padding is at the end"
        found.append(places)
    return found


def pair_segments(batch: dict, ids: Ids) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of every segment of an encoder-decoder batch, its features checked."""
    found = []
    sides = zip(_rows(batch, "encoder"), _rows(batch, "decoder"), strict=True)
    for row, (encoder, decoder) in enumerate(sides):
        assert encoder.keys() == decoder.keys()
        for segment, a in encoder.items():
            b = decoder[segment]
            inputs = batch["encoder_input_tokens"][row, a].tolist()
            targets = batch["decoder_target_tokens"][row, b].tolist()
            assert batch["encoder_positions"][row, a].tolist() == list(range(len(inputs)))
            assert batch["decoder_positions"][row, b].tolist() == list(range(len(targets)))
            shifted = batch["decoder_input_tokens"][row, b].tolist()
            assert shifted == [ids.pad_id, *targets[:-1]]
            assert (batch["decoder_loss_weights"][row, b] == 1).all()
            found.append((inputs, targets))
    padding = batch["decoder_segment_ids"] == 0
    assert (batch["decoder_loss_weights"][padding] == 0).all()
    assert (batch["decoder_target_tokens"][padding] == ids.pad_id).all()
    assert (batch["encoder_input_tokens"][batch["encoder_segment_ids"] == 0] == ids.pad_id).all()
    return found


def single_segments(batch: dict, ids: Ids) -> list[tuple[str, list[int]]]:
    """(kind, restored text) of every segment of a one-stack batch, its features checked."""
    found = []
    for row, places in enumerate(_rows(batch, "decoder")):
        for place in places.values():
            shifted, targets, weights, attention, positions = (
                batch[f"decoder_{name}"][row, place].tolist()
                for name in (
                    "input_tokens", "target_tokens", "loss_weights", "causal_attention", "positions"
                )
            )  # fmt: skip
            assert positions == list(range(len(targets)))
            text = targets[:-1]
            assert targets[-1] == ids.eos_id
            if attention[0] == 2:
                kind = "reverse"
                assert set(attention) == {2} and set(weights) == {1}
                assert shifted == [*targets[1:], ids.pad_id]
            elif attention[-1] == 1:
                kind = "masked"
                assert set(attention) == {1}
                mask = ids.sentinel_ids[0]
                assert [w == 1 for w in weights] == [t == mask for t in shifted]
                kept = zip(shifted, targets, weights, strict=True)
                assert all(s == t for s, t, w in kept if w == 0)
            elif attention[0] == 0:
                kind = "lm"
                assert set(attention) == {0} and set(weights) == {1}
                assert shifted == [ids.pad_id, *targets[:-1]]
            else:
                kind = "prefix"
                prefix = sum(attention) - 1
                assert attention == [1] * (prefix + 1) + [0] * (len(targets) - prefix - 1)
                assert weights == [0] * prefix + [1] * (len(targets) - prefix)
                assert shifted == [ids.pad_id, *targets[:-1]]
                text = restore(targets[:prefix], targets[prefix:], ids)
            found.append((kind, text))
    return found
