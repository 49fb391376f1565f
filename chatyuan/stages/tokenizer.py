"""Train a SentencePiece vocabulary on the training texts of a mixture.

Only the train split is read: what is held out for evaluation shapes no piece.
"""

import dataclasses
import pathlib
from typing import Any

from chatyuan.checkpoint_files import check_writable
from chatyuan.errors import UserError
from chatyuan.text.tokenizer import TokenizerConfig, train_tokenizer


def _field(help_text: str, **kwargs: Any) -> Any:
    return dataclasses.field(metadata={"help": help_text}, **kwargs)


@dataclasses.dataclass(frozen=True)
class Config:
    """Where the text is from, what is trained, where it goes."""

    mixture: str = _field("seqio task or mixture, or file:PATH, that the text is from")
    vocabulary: str = _field("the .model file to write")
    tokenizer: TokenizerConfig = _field("size and kind", default=TokenizerConfig())
    task_modules: tuple[str, ...] = _field("modules that register tasks", default=("tasks",))
    overwrite: bool = _field("replace a vocabulary that exists", default=False)


def run(config: Config) -> None:
    """Trains and writes VOCABULARY and VOCABULARY.json.

    Raises:
        UserError: the file exists, cannot be written, or there is no text.
    """
    from chatyuan.data.seqio_build import iter_texts

    path = _checked(config)
    texts = iter_texts(config.mixture, split="train", task_modules=config.task_modules)
    stats = train_tokenizer(texts, path, config.tokenizer, source=config.mixture)
    print(
        f"{path}: {stats['pieces']:,} pieces from {stats['documents']:,} texts "
        f"({stats['characters']:,} characters); {stats['chars_per_token']:.2f} characters and "
        f"{stats['bytes_per_token']:.2f} bytes per token on lines left out of training."
    )


def _checked(config: Config) -> pathlib.Path:
    path = pathlib.Path(config.vocabulary)
    if path.exists() and not config.overwrite:
        raise UserError(
            f"VOCABULARY = {path} exists; every cache and checkpoint made with it would become "
            "unreadable. Choose another name or pass --gin.tokenizer.Config.overwrite=True."
        )
    check_writable(path.parent, "VOCABULARY")
    return path


def dry_run(config: Config) -> None:
    """Opens the source and shows what would be trained on."""
    from chatyuan.data.seqio_build import iter_texts

    _checked(config)
    texts = list(iter_texts(config.mixture, split="train", task_modules=config.task_modules))
    if not texts:
        raise UserError(f"MIXTURE = {config.mixture} holds no training text.")
    print(f"{len(texts):,} texts, {sum(map(len, texts)):,} characters. The first two:")
    for text in texts[:2]:
        print(f"  {text[:200]}")
