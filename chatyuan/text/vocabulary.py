"""A SentencePiece vocabulary, read without TensorFlow or seqio.

Nothing about ids is assumed: the piece count, pad, eos, unk and the sentinels come from the file.
Three kinds of file meet here:
1. files that name their sentinels `<extra_id_N>` (ours, Hugging Face exports of mT5);
2. T5's and mT5's original files, whose 100 sentinels are added by the reader (`extra_ids=100`, or
   `spiece.model:100` as a path), `<extra_id_0>` getting the highest id, as seqio does;
3. ChatYuan-large-v1/v2 and LLaMA-style files, which have none.
"""

import functools
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from chatyuan.errors import UserError, did_you_mean
from chatyuan.text import templates

_SENTINEL = re.compile(r"^▁?<extra_id_(\d+)>$")
_USER_DEFINED = 4  # sentencepiece_model.proto: SentencePiece.Type


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def append_sentinels(model: bytes, count: int, size: int) -> bytes:
    """Appends `<extra_id_{count-1}>` .. `<extra_id_0>` to a serialized model of `size` pieces.

    Concatenating protocol buffers appends to their repeated fields and merges the others, so the
    pieces (field 1) and the new trainer_spec.vocab_size (field 2, 4) need no protobuf library.
    """
    tail = bytearray()
    for n in reversed(range(count)):
        name = f"<extra_id_{n}>".encode()
        piece = b"\x0a" + _varint(len(name)) + name + b"\x15\0\0\0\0" + bytes([0x18, _USER_DEFINED])
        tail += b"\x0a" + _varint(len(piece)) + piece
    spec = b"\x20" + _varint(size + count)
    return bytes(model) + bytes(tail) + b"\x12" + _varint(len(spec)) + spec


def split_path(path: str) -> tuple[str, int]:
    """Splits `spiece.model:100` into the path and the number of sentinels to add (else 0)."""
    match = re.fullmatch(r"(.+):(\d+)", path)
    if match and not os.path.exists(path):
        return match.group(1), int(match.group(2))
    return path, 0


def _read_model(path: pathlib.Path) -> bytes:
    if not path.exists():
        near = did_you_mean(path.name, os.listdir(path.parent)) if path.parent.is_dir() else ""
        raise UserError(
            f"VOCABULARY={path}: there is no such file.{near} Give the path of a SentencePiece "
            ".model file, or train one: python run.py tokenizer"
        )
    if path.is_dir():
        raise UserError(
            f"VOCABULARY={path} is a folder; give the SentencePiece .model file inside it."
        )
    data = path.read_bytes()
    if not data:
        raise UserError(f"VOCABULARY={path} is empty; a SentencePiece .model file is needed.")
    return data


class Vocabulary:
    """Text to token ids and back. Immutable; safe to share between threads; pickles as its path."""

    def __init__(
        self, path: str | os.PathLike[str], *, extra_ids: int = 0, codec: str | None = None
    ) -> None:
        """Reads `path`.

        Args:
          path: a SentencePiece model file; `:N` at its end is the same as `extra_ids=N`.
          extra_ids: how many sentinels to add above the file's own pieces.
          codec: a name from `templates.CODECS`. None takes it from the json beside the file, and
            without one uses "chatyuan" when the file cannot spell a newline, else "none".

        Raises:
          UserError: no such file, not a SentencePiece model, unknown codec, or sentinels both in
            the file and in `extra_ids`.
        """
        name, added = split_path(os.fspath(path))
        self.path = pathlib.Path(name)
        self.extra_ids = extra_ids or added
        data = _read_model(self.path)
        self._processor = self._load(data)
        named = self._named_sentinels()
        if self.extra_ids and named:
            raise UserError(
                f"VOCABULARY={self.path} already holds {len(named)} <extra_id_N> pieces; "
                f"extra_ids={self.extra_ids} would add them twice. Leave it out."
            )
        if self.extra_ids:
            size = self._processor.get_piece_size()
            self._processor = self._load(append_sentinels(data, self.extra_ids, size))
            named = self._named_sentinels()
        self.sentinel_ids: tuple[int, ...] = tuple(named)
        digest = hashlib.sha256(data)
        if self.extra_ids:
            digest.update(f":{self.extra_ids}".encode())
        self.sha256: str = digest.hexdigest()
        self.codec: str = self._choose_codec(codec)
        self._codec = templates.CODECS[self.codec]

    def _load(self, data: bytes) -> sentencepiece.SentencePieceProcessor:
        processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = processor.LoadFromSerializedProto(data)
        except (RuntimeError, TypeError, ValueError):
            loaded = False
        if not loaded or processor.get_piece_size() == 0:
            raise UserError(
                f"VOCABULARY={self.path} ({len(data)} bytes) is not a SentencePiece model; give "
                "the .model file written by SentencePiece (not a .vocab list or tokenizer.json)."
            )
        return processor

    def _named_sentinels(self) -> list[int]:
        found: dict[int, int] = {}
        for index in range(self._processor.get_piece_size()):
            match = _SENTINEL.match(self._processor.id_to_piece(index))
            if match:
                found[int(match.group(1))] = index
        # A gap would make "the next sentinel" undefined: only the run from 0 is usable.
        return [found[n] for n in itertools.takewhile(found.__contains__, itertools.count())]

    def _choose_codec(self, codec: str | None) -> str:
        beside = pathlib.Path(f"{self.path}.json")
        if codec is None and beside.exists():
            try:
                codec = json.loads(beside.read_text(encoding="utf-8")).get("codec")
            except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
                raise UserError(f"{beside} is not valid json ({error}); remove it.") from error
        if codec is None:
            codec = "chatyuan" if self.unk_id in self._processor.encode("\n") else "none"
        if codec not in templates.CODECS:
            raise UserError(
                f"codec={codec!r} is not one of {', '.join(templates.CODECS)}."
                + did_you_mean(codec, templates.CODECS)
            )
        return codec

    def __reduce__(self) -> tuple:
        """Pickles by path, so that loader workers read the file themselves."""
        build = functools.partial(Vocabulary, extra_ids=self.extra_ids, codec=self.codec)
        return build, (str(self.path),)

    def __repr__(self) -> str:
        """Names what identifies a vocabulary."""
        return f"Vocabulary({str(self.path)!r}, size={self.size}, sha256={self.sha256[:12]})"

    @property
    def size(self) -> int:
        """Number of pieces including sentinels; a model may pad its embedding above it."""
        return self._processor.get_piece_size()

    @property
    def pad_id(self) -> int:
        """The padding id of the file; 0, T5's, where the file has none."""
        return max(self._processor.pad_id(), 0)

    @property
    def eos_id(self) -> int:
        """The end-of-sequence id of the file; UserError where it has none."""
        value = self._processor.eos_id()
        if value < 0:
            raise UserError(f"VOCABULARY={self.path} has no end-of-sequence piece; one is needed.")
        return value

    @property
    def unk_id(self) -> int:
        """The id of the unknown piece."""
        return self._processor.unk_id()

    @property
    def serialized(self) -> bytes:
        """The model as bytes, with added sentinels: what an export writes as spiece.model."""
        return self._processor.serialized_model_proto()

    def piece(self, token: int) -> str:
        """The spelling of one token id."""
        return self._processor.id_to_piece(int(token))

    def id(self, piece: str) -> int | None:
        """The id of a piece, or None when the vocabulary does not hold it."""
        index = self._processor.piece_to_id(piece)
        return index if self._processor.id_to_piece(index) == piece else None

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without end-of-sequence."""
        return self._processor.encode(self._codec.escape(text))

    def encode_batch(self, texts: Sequence[str], *, threads: int | None = None) -> list[list[int]]:
        """Token ids of each text on `threads` cores (None: all), without end-of-sequence."""
        if self.codec != "none":
            texts = [self._codec.escape(text) for text in texts]
        return self._processor.encode(list(texts), num_threads=threads or os.cpu_count() or 1)

    def encode_flat(
        self, texts: Sequence[str], *, threads: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """All tokens one after another, int32 [sum], and each text's length, int64 [texts]."""
        rows = self.encode_batch(texts, threads=threads)
        lengths = np.fromiter((len(row) for row in rows), np.int64, count=len(rows))
        flat = np.fromiter(itertools.chain.from_iterable(rows), np.int32, count=int(lengths.sum()))
        return flat, lengths

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids` up to the first end-of-sequence; padding is skipped.

        Ids above the last piece (rows that only pad an embedding) decode as the unknown piece.
        """
        eos = self._processor.eos_id()
        kept = []
        for token in ids:
            token = int(token)
            if token == eos:
                break
            if token == self.pad_id:
                continue
            kept.append(token if 0 <= token < self.size else self.unk_id)
        return self._codec.unescape(self._processor.decode(kept))

    def decode_batch(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """`decode` of every row."""
        return [self.decode(row) for row in rows]
