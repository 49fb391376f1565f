"""Examples as people read them: rows with their loss mask, and what the model makes of a prompt."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from chatyuan.data.loader import EvalLoader, Loader
from chatyuan.decode.engine import make_generate
from chatyuan.models import Model
from chatyuan.text.vocabulary import Vocabulary

_WIDTH = 32  # tokens of each rendered feature beyond which the middle is left out


class Samples:
    """The same few held-out prompts at every evaluation, with what was wanted and what came."""

    def __init__(
        self, config: Any, vocabulary: Vocabulary, model: Model, loader: Loader | EvalLoader
    ) -> None:
        """Takes the prompts from the first batches of `loader`, spread over its examples.

        Args:
            config: has `num_samples` and `sample_decoding`.
            vocabulary: decodes.
            model: generates.
            loader: its batches hold the prompts.
        """
        self.vocabulary, self.seed = vocabulary, config.seed
        self.pairs = _pairs(loader, config.num_samples) if config.num_samples else []
        if not self.pairs:
            return
        longest = max(len(prompt) for prompt, _ in self.pairs)
        self.tokens = np.full((len(self.pairs), longest), vocabulary.pad_id, np.int32)
        for row, (prompt, _) in enumerate(self.pairs):
            self.tokens[row, : len(prompt)] = prompt
        self.lengths = np.array([len(prompt) for prompt, _ in self.pairs], np.int32)
        self._generate = make_generate(
            model,
            config.sample_decoding,
            eos_id=vocabulary.eos_id,
            pad_id=vocabulary.pad_id,
            valid_vocab_size=vocabulary.size,
        )

    def __call__(self, params: Any) -> list[dict[str, Any]]:
        """Returns rows {"input", "target", "output"} of text."""
        if not self.pairs:
            return []
        params = _on_one_device(params)
        if jax.process_index() > 0:
            return []  # the first process writes them
        seeds = np.arange(len(self.pairs), dtype=np.uint32) + np.uint32(self.seed)
        output = jax.device_get(self._generate(params, self.tokens, self.lengths, seeds))
        return [
            {
                "input": self._text(prompt),
                "target": self._text(target),
                "output": self._text(output.tokens[row, 0][: output.lengths[row, 0]]),
            }
            for row, (prompt, target) in enumerate(self.pairs)
        ]

    def _text(self, ids: Any) -> str:
        return show(self.vocabulary, ids)


def _on_one_device(params: Any) -> Any:
    """The weights on the first device of each process; all processes must call it."""
    if jax.device_count() == 1:
        return params
    if jax.process_count() == 1:
        return jax.device_put(params, jax.devices()[0])
    place = jax.tree.map(
        lambda leaf: NamedSharding(leaf.sharding.mesh, PartitionSpec()), params
    )
    whole = jax.jit(lambda tree: tree, out_shardings=place)(params)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def show(vocabulary: Vocabulary, ids: Any) -> str:
    """Returns the text of ids, with sentinels visible as <extra_id_N> and no end token."""
    names = {token: f"<extra_id_{n}>" for n, token in enumerate(vocabulary.sentinel_ids)}
    parts: list[str] = []
    run: list[int] = []
    for token in [*(int(i) for i in ids), None]:
        if token in names or token is None:
            parts.append(vocabulary.decode(run))
            parts.append(names.get(token, ""))
            run = []
        elif token not in (vocabulary.eos_id, vocabulary.pad_id):
            run.append(token)
    return "".join(parts)


def _pairs(loader: Loader | EvalLoader, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, target) ids of `count` segments spread over the split (over batch 0 of a stream)."""
    batches = len(loader) if isinstance(loader, EvalLoader) else 1
    chosen = np.unique(np.linspace(0, batches - 1, min(count, batches)).astype(int))
    found = [list(_segments(loader.batch(int(index)))) for index in chosen]
    found = [segments for segments in found if segments]
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for turn in range(count):
        if not found:
            break
        segments = found[turn % len(found)]
        place = turn // len(found)
        if place < len(segments):
            pairs.append(segments[place])
    return pairs


def _segments(batch: Mapping[str, np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, target) of each segment of a batch; segments without a prompt are left out."""
    pairs = []
    segments, weights = batch["decoder_segment_ids"], batch["decoder_loss_weights"]
    for row in range(len(segments)):
        for segment in range(1, int(segments[row].max(initial=0)) + 1):
            here = segments[row] == segment
            target = batch["decoder_target_tokens"][row][here & (weights[row] > 0)]
            if "encoder_segment_ids" in batch:
                prompt = batch["encoder_input_tokens"][row][
                    batch["encoder_segment_ids"][row] == segment
                ]
            else:
                prefix = here & (weights[row] == 0) & (batch["decoder_causal_attention"][row] == 1)
                prompt = batch["decoder_target_tokens"][row][prefix]
            if len(prompt) and len(target):
                pairs.append((prompt, target))
    return pairs


def render_row(vocabulary: Vocabulary, batch: Mapping[str, np.ndarray], row: int) -> str:
    """Returns one row of a batch as text: every segment, learned tokens in [brackets]."""
    lines = [f"row {row}:"]
    sides = [("encoder", "encoder_input_tokens", "encoder_segment_ids", None)]
    sides.append(
        ("decoder", "decoder_target_tokens", "decoder_segment_ids", "decoder_loss_weights")
    )
    for name, tokens, segment_ids, weights in sides:
        if tokens not in batch:
            continue
        segments = batch[segment_ids][row]
        for segment in range(1, int(segments.max(initial=0)) + 1):
            places = np.flatnonzero(segments == segment)
            learned = batch[weights][row][places] > 0 if weights else np.zeros(len(places), bool)
            pieces = [
                f"[{vocabulary.piece(int(t))}]" if on else vocabulary.piece(int(t))
                for t, on in zip(batch[tokens][row][places], learned, strict=True)
            ]
            if len(pieces) > 2 * _WIDTH:
                left_out = f"... {len(pieces) - 2 * _WIDTH} more ..."
                pieces = [*pieces[:_WIDTH], left_out, *pieces[-_WIDTH:]]
            text = " ".join(pieces).replace("\n", "\\n")
            lines.append(f"  {name} segment {segment} ({len(places)} tokens): {text}")
    return "\n".join(lines)
