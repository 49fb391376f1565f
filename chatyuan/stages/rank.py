"""Serve a local page where people order the answers of several models, as data for `reward`.

1. Answers are shown without their source, in an order of each annotator's own.
2. Every decision is on the disk (annotations.jsonl) before the next prompt is shown; starting again
   in the same MODEL_DIR goes on, with other drafts too.
3. Ctrl-C ends it and writes rankings.jsonl, which `cache` reads as it is, and report.md.
"""

import dataclasses
import pathlib
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from chatyuan import configs
from chatyuan.checkpoint_files import check_writable, disk_reason
from chatyuan.errors import UserError
from chatyuan.ranking import results
from chatyuan.ranking.desk import Desk
from chatyuan.ranking.items import LETTERS, Item, read_items, read_taxonomy, said
from chatyuan.ranking.server import LOCAL, Server
from chatyuan.ranking.store import ANNOTATIONS, AnnotationLog, read_annotations
from chatyuan.text.files import Skipped

_EXPORT_PERIOD = 60.0  # seconds; rankings.jsonl can be trained on while ranking goes on


def _field(help_text: str, unit: str = "", **kwargs: Any) -> Any:
    return dataclasses.field(metadata={"help": help_text, "unit": unit}, **kwargs)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is ranked, and where the page is."""

    model_dir: str = _field("folder for annotations.jsonl, rankings.jsonl and report.md")
    arguments: tuple[str, ...] = _field(
        "FILE of drafts: a folder of `infer`, or JSONL of prompt and answers; one per model",
        default=(),
    )
    answers: int = _field("shown per prompt, at most", default=9)
    taxonomy: str | None = _field("text file of categories, one a line", default=None)
    overlap_period: int = _field(
        "every how many prompts one is given to two annotators; 0 = none", "prompts", default=10
    )
    seed: int = _field("of the choice and the order of answers", default=0)
    host: str = _field("address to listen on; only this machine reaches 127.0.0.1",
                       default="127.0.0.1")  # fmt: skip
    port: int = _field("of the page; 0 = any that is free", default=8765)


def run(config: Config) -> None:
    """Serves until it is interrupted.

    Raises:
        UserError: drafts without two answers, a folder or a port that is in use.
    """
    items, taxonomy = _opened(config)
    folder = pathlib.Path(config.model_dir)
    server = Server(config.host, config.port)
    try:
        with AnnotationLog(folder) as log:
            configs.save_run(config, folder)
            if log.note:
                print(log.note)
            desk = Desk(items, log, seed=config.seed, overlap_period=config.overlap_period,
                        taxonomy=taxonomy)  # fmt: skip
            _tell_of_others(log.by_item, items, folder)
            _serve(server, desk, folder)
            _finish(desk, log, folder)
    finally:
        server.server_close()


def dry_run(config: Config) -> None:
    """Reads the drafts and shows two as they would be asked."""
    items, taxonomy = _opened(config)
    if taxonomy:
        print(f"{len(taxonomy)} categories: {', '.join(taxonomy)}")
    found, note, _ = read_annotations(pathlib.Path(config.model_dir) / ANNOTATIONS)
    if found:
        print(f"{len(found):,} annotations are there already. {note}".rstrip())
    for item in items[:2]:
        print(item.prompt)
        for letter, place in zip(LETTERS, item.shown(config.seed, ""), strict=False):
            print(f"  {letter}  {item.answers[place]}  [{', '.join(item.sources[place])}]")


def _opened(config: Config) -> tuple[list[Item], list[str]]:
    """(items, taxonomy) after the checks that need no folder; says what was read."""
    if not config.arguments:
        raise UserError(
            "rank takes the drafts of one or more models: python run.py rank FILE_OR_FOLDER... "
            "--gin.MODEL_DIR=OUT, each a folder of `infer` or a JSONL file."
        )
    if not 2 <= config.answers <= len(LETTERS):
        raise UserError(
            f"rank.Config.answers = {config.answers} should be 2 to {len(LETTERS)}: a digit each."
        )
    if config.overlap_period < 0:
        raise UserError(f"rank.Config.overlap_period = {config.overlap_period} is below 0.")
    check_writable(pathlib.Path(config.model_dir))
    names = [field.name for field in dataclasses.fields(config)]
    configs.check_same_run(config, config.model_dir, may_change=names)
    taxonomy = read_taxonomy(config.taxonomy) if config.taxonomy else []
    skipped = Skipped()
    items, sources = read_items(config.arguments, config.answers, config.seed, skipped)
    counts = [len(item.answers) for item in items]
    left_out = f"; left out: {said(skipped)}" if skipped else ""
    print(
        f"{len(items):,} prompts with {min(counts)} to {max(counts)} different answers from "
        f"{', '.join(sources)}{left_out}."
    )
    return items, taxonomy


def _tell_of_others(known: results.ByItem, items: list[Item], folder: pathlib.Path) -> None:
    others = len(known.keys() - {item.key for item in items})
    if known:
        print(f"{folder / ANNOTATIONS} holds {len(known):,} prompts already; going on.")
    if others:
        print(f"{others:,} of them have other answers than the drafts now; they are kept.")


def _serve(server: Server, desk: Desk, folder: pathlib.Path) -> None:
    """Until Ctrl-C or SIGTERM."""
    exported, saved = time.monotonic(), desk.saved

    def export() -> None:
        nonlocal exported, saved
        if desk.saved != saved and time.monotonic() - exported > _EXPORT_PERIOD:
            exported, saved = time.monotonic(), desk.saved
            try:
                results.export(folder, desk.snapshot())
            except OSError as error:  # the page goes on; it tells by itself what was not saved
                print(f"{results.RANKINGS} was not written: {disk_reason(error) or error}")

    server.desk, server.between = desk, export
    if server.names.isdisjoint(LOCAL):
        print("Everyone who reaches this address can read the drafts and rank them.")
    with _stoppable():
        print(f"The page: {server.url}\nCtrl-C ends it.", flush=True)
        server.serve_forever()


@contextmanager
def _stoppable() -> Iterator[None]:
    """Ctrl-C and SIGTERM leave the block, as the ordinary end."""
    main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, signal.default_int_handler) if main else None
    try:
        yield
    except KeyboardInterrupt:
        print()
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


def _finish(desk: Desk, log: AnnotationLog, folder: pathlib.Path) -> None:
    """Writes and prints what has come of it."""
    desk.close()
    exported = results.export(folder, log.by_item)
    progress = desk.progress()
    report = results.write_report(folder, log.by_item, log.by_annotator, progress, exported)
    figures = progress["agreement"]
    print(f"{progress['finished']:,} of {progress['items']:,} prompts are finished.")
    if figures["items"]:
        shown = ", ".join(f"{name} {value:,.3g}" if isinstance(value, float) else f"{name} {value}"
                          for name, value in results.said(figures).items())  # fmt: skip
        print(f"Agreement: {shown}.")
    print(f"Written: {folder / results.RANKINGS} ({exported:,} rows), {report}")
    if exported:
        print(f"Next: python run.py cache --gin.MIXTURE=file:{folder / results.RANKINGS} ..., "
              "then python run.py reward")  # fmt: skip
