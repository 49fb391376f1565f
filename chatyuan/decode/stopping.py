"""When an output ends: end tokens on the device, stop strings in the decoded text."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax import Array


def eos_tuple(eos_id: int | Sequence[int]) -> tuple[int, ...]:
    """End token ids as a tuple without duplicates, in the order given."""
    ids = (eos_id,) if isinstance(eos_id, int) else tuple(int(i) for i in eos_id)
    assert ids, "an output needs an end token"
    return tuple(dict.fromkeys(ids))


def is_end(tokens: Array, eos_ids: tuple[int, ...]) -> Array:
    """Whether each token is one of the end tokens; bool of the same shape."""
    ended = tokens == eos_ids[0]
    for eos_id in eos_ids[1:]:
        ended |= tokens == eos_id
    return ended


def after_end(lengths: Array, capacity: int) -> Array:
    """True at the places of `[..., capacity]` that lie past each output's length."""
    return jnp.arange(capacity) >= lengths[..., None]


def cut_at_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Cuts the text before the first occurrence of any stop string, and says whether it did."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)
