"""Trains a SentencePiece vocabulary for Chinese: deterministic, written aside and renamed.

Defaults are Baichuan 2's public recipe with T5's ids: byte fallback, digits split, no dummy prefix,
whitespace kept, coverage .9999, identity normalisation (the text is normalised before, see
`chatyuan.text.normalize`: SentencePiece's own default drops full-width punctuation). Newline and
tab are pieces, so text round-trips exactly. Sentinels are the last pieces, `<extra_id_0>` highest.
"""

import dataclasses
import hashlib
import io
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece

from chatyuan.errors import UserError, did_you_mean
from chatyuan.text.vocabulary import Vocabulary, append_sentinels

_MODEL_TYPES = ("bpe", "unigram")
_NORMALIZATIONS = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
_LONGEST = 1 << 16  # bytes of one training line; longer ones are cut, not dropped


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """What to train."""

    vocab_size: int = dataclasses.field(
        default=8192, metadata={"help": "pieces, sentinels included", "unit": "pieces"}
    )
    model_type: str = dataclasses.field(default="bpe", metadata={"help": "bpe or unigram"})
    extra_ids: int = dataclasses.field(
        default=100, metadata={"help": "sentinels <extra_id_N>", "unit": "pieces"}
    )
    character_coverage: float = dataclasses.field(
        default=0.9999, metadata={"help": "share of characters that get a piece of their own"}
    )
    byte_fallback: bool = dataclasses.field(
        default=True, metadata={"help": "spell unknown characters as bytes instead of <unk>"}
    )
    split_digits: bool = dataclasses.field(default=True, metadata={"help": "one piece per digit"})
    normalization: str = dataclasses.field(
        default="identity", metadata={"help": "SentencePiece's normalisation rule"}
    )
    max_piece_length: int = dataclasses.field(
        default=16, metadata={"help": "longest piece", "unit": "characters"}
    )
    heldout_every: int = dataclasses.field(
        default=50, metadata={"help": "every Nth line only measures compression", "unit": "lines"}
    )

    def __post_init__(self) -> None:
        """Checks the choices."""
        for name, value, choices in (
            ("model_type", self.model_type, _MODEL_TYPES),
            ("normalization", self.normalization, _NORMALIZATIONS),
        ):
            if value not in choices:
                raise UserError(
                    f"TokenizerConfig.{name}={value!r} is not one of {', '.join(choices)}."
                    + did_you_mean(value, choices)
                )
        least = self.extra_ids + 5 + (256 if self.byte_fallback else 0)
        if self.vocab_size <= least:
            raise UserError(
                f"TokenizerConfig.vocab_size={self.vocab_size} leaves no room for text: "
                f"{least} pieces are sentinels, bytes and control symbols. Use 8192 or more."
            )
        if not 0.9 <= self.character_coverage <= 1.0:
            raise UserError(
                f"TokenizerConfig.character_coverage={self.character_coverage} must be in [0.9, 1]."
            )


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in re.split(r"[\n\t]+", text):
            data = line.encode("utf-8", "ignore")
            for start in range(0, len(data), _LONGEST):
                # Cutting inside a character loses that character only.
                piece = data[start : start + _LONGEST].decode("utf-8", "ignore")
                if piece.strip():
                    yield piece


def _train(lines: Iterable[str], config: TokenizerConfig) -> bytes:
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.model_type,
            vocab_size=config.vocab_size - config.extra_ids,
            character_coverage=config.character_coverage,
            byte_fallback=config.byte_fallback,
            split_digits=config.split_digits,
            max_sentencepiece_length=config.max_piece_length,
            max_sentence_length=_LONGEST + 1,
            normalization_rule_name=config.normalization,
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"],
            # A space must be a piece even where the text has none (`train_tokenizer` adds one):
            # spelled as the bytes of ▁ it would be decoded as that character.
            required_chars="▁",
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            eos_piece="</s>",
            unk_piece="<unk>",
            # Unigram sums expectations per thread: the count is fixed so that the result is too.
            num_threads=2,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), config)) from error
    return model.getvalue()


def _explain(message: str, config: TokenizerConfig) -> str:
    needed = re.search(r"required_chars\. (\d+) vs (\d+)", message)
    if needed:
        least = int(needed.group(2)) + config.extra_ids
        return (
            f"TokenizerConfig.vocab_size={config.vocab_size} cannot hold every character that "
            f"character_coverage={config.character_coverage} asks for: {least} pieces are needed. "
            "Raise vocab_size or lower character_coverage."
        )
    most = re.search(r"value <= (\d+)", message)
    if most:
        return (
            f"TokenizerConfig.vocab_size={config.vocab_size} is too high for this much text; "
            f"at most {int(most.group(1)) + config.extra_ids} is possible. Use more text or fewer."
        )
    return f"SentencePiece could not train a {config.model_type} vocabulary: {message.strip()}"


def train_tokenizer(
    texts: Iterable[str],
    path: str | os.PathLike[str],
    config: TokenizerConfig | None = None,
    *,
    source: str = "",
) -> dict[str, Any]:
    """Trains a vocabulary on `texts` and writes `path` and `path.json`.

    Args:
      texts: documents; newlines and tabs inside them separate training lines.
      path: the .model file to write.
      config: what to train; defaults are the quickstart's.
      source: where the text is from, kept in the json.

    Returns:
      Statistics: documents, lines, characters, chars_per_token and bytes_per_token on lines left
      out of training, pieces, sha256, codec. The same as in the json.

    Raises:
      UserError: no text, or a size that this text cannot fill or that cannot hold its characters.
    """
    config = config or TokenizerConfig()
    path = pathlib.Path(path)
    counts = {"documents": 0, "lines": 0, "characters": 0}
    heldout: list[str] = []

    def counted() -> Iterator[str]:
        for text in texts:
            counts["documents"] += 1
            yield text

    training: list[str] = []
    for line in _lines(counted()):
        counts["lines"] += 1
        counts["characters"] += len(line)
        out = config.heldout_every and counts["lines"] % config.heldout_every == 0
        (heldout if out else training).append(line)
    if not training:
        raise UserError(
            f"There is no text to train VOCABULARY={path} on: {source or 'the source'} gave "
            f"{counts['documents']} documents, all empty."
        )
    training[0] += " "  # see required_chars
    size = config.vocab_size - config.extra_ids
    model = append_sentinels(_train(training, config), config.extra_ids, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_bytes(model)
    try:
        stats = {**counts, **_measure(temporary, heldout or training[:1000])}
    except BaseException:
        temporary.unlink()
        raise
    stats |= {"sha256": hashlib.sha256(model).hexdigest(), "codec": "none", "source": source}
    described = json.dumps({**stats, "config": dataclasses.asdict(config)}, indent=1)
    beside = path.with_name(f"{path.name}.json.tmp{os.getpid()}")
    beside.write_text(described + "\n", encoding="utf-8")
    beside.replace(path.with_name(f"{path.name}.json"))
    temporary.replace(path)
    return stats


def _measure(path: pathlib.Path, lines: list[str]) -> dict[str, Any]:
    vocabulary = Vocabulary(path, codec="none")
    tokens, _ = vocabulary.encode_flat(lines)
    characters = sum(map(len, lines))
    size = sum(len(line.encode()) for line in lines)
    return {
        "pieces": vocabulary.size,
        "chars_per_token": round(characters / len(tokens), 4),
        "bytes_per_token": round(size / len(tokens), 4),
        "unknown_rate": round(float((tokens == vocabulary.unk_id).mean()), 6),
    }
