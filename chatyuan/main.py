"""The command line: `python run.py STAGE [ARGUMENT...] [--gin_file=F]... [--gin.NAME=VALUE]...`.

Exit status 0: done; 1: the run failed; 2: a mistake of the user, told in one message without a
traceback (unless `--debug`). No stage is imported before the command line itself has been read, so
listing the stages and refusing a bad command take no time.
"""

import ast
import dataclasses
import errno
import os
import pathlib
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

from chatyuan import distributed, supervisor
from chatyuan import stages as stages_package
from chatyuan.errors import RunFailed, UserError, did_you_mean, missing_package

USAGE = "python run.py STAGE [ARGUMENT...] [--gin_file=FILE]... [--gin.NAME=VALUE]... [--dry_run]"
SWITCHES = ("dry_run", "debug", "help")
OPTIONS = ("gin_file", "gin_search_paths")
# Of every stage that trains; absl, which T5X uses, lets the value be the next word.
TRAINING_FLAGS = {**distributed.FLAGS, **supervisor.FLAGS}
VALUED = tuple(name for name in distributed.FLAGS if name not in distributed.SWITCHES)
# T5X's --run_mode -> the stage that does the same.
RUN_MODES = {
    "train": "pretrain",
    "eval": "evaluate",
    "infer": "infer",
    "precompile": "pretrain --precompile",
    "export": "export",
}
INTERRUPTED = 130  # what shells expect after Ctrl-C: 128 + SIGINT


@dataclasses.dataclass
class Command:
    """A command line, taken apart but not checked against its stage."""

    stage: str = ""
    arguments: list[str] = dataclasses.field(default_factory=list)
    gin_files: list[str] = dataclasses.field(default_factory=list)
    bindings: list[str] = dataclasses.field(default_factory=list)
    search_paths: list[str] = dataclasses.field(default_factory=list)
    flags: dict[str, str | None] = dataclasses.field(default_factory=dict)
    switches: set[str] = dataclasses.field(default_factory=set)


def main(argv: Sequence[str]) -> int:
    """Runs one command and returns the process's exit status; see the module's docstring."""
    status, message = _outcome(list(argv))
    if message:
        print(message, file=sys.stderr)
    distributed.finish(status, message)
    return status


def _outcome(argv: list[str]) -> tuple[int, str]:
    """Runs one command; returns the exit status and what there is to say about a failure."""
    debug = "--debug" in argv
    try:
        return _run(argv), ""
    except (UserError, RunFailed) as error:
        if debug:
            traceback.print_exc()
        return (2 if isinstance(error, UserError) else 1), str(error)
    except KeyboardInterrupt:
        return INTERRUPTED, "Interrupted. Starting again in the same MODEL_DIR continues."
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1, ""
    except ModuleNotFoundError as error:
        remedy = missing_package(error)
        if remedy is None or debug:
            traceback.print_exc()
        return (2 if remedy else 1), remedy or f"{error}: this is a bug, please report it."
    except Exception as error:
        return _failed(error, argv)


def _run(argv: list[str]) -> int:
    command = parse(argv)
    known = stages()
    if not command.stage:
        if argv and "help" not in command.switches:
            raise UserError(f"Which stage? Usage: {USAGE}\n`python run.py` lists the stages.")
        print(_overview(known))
        return 0
    if command.stage not in known:
        near = did_you_mean(command.stage, known)
        raise UserError(f"There is no stage {command.stage}.{near} `python run.py` lists them.")
    own_flags, run_flags = stage_flags(command.stage), training_flags(command.stage)
    known_flags = {**own_flags, **run_flags}
    for name in command.flags:
        if name not in known_flags:
            raise UserError(_unknown_flag(name, [*SWITCHES, *OPTIONS, *known_flags], command.stage))
    of_run = {name: command.flags.pop(name) for name in run_flags if name in command.flags}

    from chatyuan import configs  # gin and the stage are needed from here on
    from chatyuan.stages import _host

    _host.configure()  # before anything starts jax's threads
    if "help" in command.switches:
        print(configs.stage_help(command.stage, known_flags))
        return 0
    config = configs.load(
        command.stage,
        command.gin_files,
        command.bindings,
        arguments=command.arguments,
        flags=command.flags,
        search_paths=command.search_paths,
    )
    module = configs.stage_module(command.stage)
    _host.imported()
    if "dry_run" not in command.switches:
        ended = supervisor.supervise(of_run, config)
        if ended is not None:  # this process only watched over others
            return ended
        distributed.connect(of_run)
        module.run(config)
        return 0
    print(configs.explain(config), flush=True)
    if hasattr(module, "dry_run"):
        module.dry_run(config)
    return 0


def parse(argv: Sequence[str]) -> Command:
    """Takes a command line apart.

    Raises:
        UserError: a flag lacks its value, or is T5X's `--run_mode`.
    """
    command = Command()
    words = iter(argv)
    for word in words:
        if word == "--":  # only words follow
            for rest in words:
                _add_word(command, rest)
        elif word == "-h":
            command.switches.add("help")
        elif not word.startswith("-") or word == "-":
            _add_word(command, word)
        elif not word.startswith("--"):
            raise UserError(f"{word} is unknown; flags have two dashes: -{word}.")
        else:
            name, equals, value = word[2:].partition("=")
            if name.startswith("gin."):
                command.bindings.append(word.removeprefix("--gin."))
            elif name in OPTIONS:
                value = value if equals else _next_word(words, name)
                target = command.gin_files if name == "gin_file" else command.search_paths
                target += [value] if name == "gin_file" else value.split(",")
            elif name == "run_mode":
                mode = value if equals else _next_word(words, name)
                raise UserError(_run_mode(mode))
            elif name in SWITCHES:
                if equals and value.lower() not in ("true", "false"):
                    raise UserError(f"--{name}={value} should be --{name}, without a value.")
                command.switches |= set() if value.lower() == "false" else {name}
            elif name in VALUED and not equals:
                command.flags[name] = _next_word(words, name)
            else:
                command.flags[name] = value if equals else None
    return command


def _add_word(command: Command, word: str) -> None:
    if command.stage:
        command.arguments.append(word)
    else:
        command.stage = word


def _next_word(words: Iterator[str], name: str) -> str:
    value = next(words, "")
    if not value or value.startswith("--"):
        raise UserError(f"--{name} has no value; write --{name}=VALUE.")
    return value


def _run_mode(mode: str) -> str:
    stage = RUN_MODES.get(mode)
    if stage is None:
        modes = ", ".join(f"{mode} is {stage}" for mode, stage in RUN_MODES.items())
        return f"--run_mode={mode} is unknown; T5X's modes are stages here ({modes})."
    return (
        f"T5X's --run_mode={mode} is a stage here: python run.py {stage} --gin_file=... "
        "(README has the table of T5X's names and ours)."
    )


def _unknown_flag(name: str, known: Sequence[str], stage: str) -> str:
    if name.isupper():
        return f"--{name} is unknown; settings are written --gin.{name}=VALUE."
    near = did_you_mean(name, known).replace("mean ", "mean --")
    return f"{stage} has no flag --{name}.{near} `python run.py {stage} --help` lists its flags."


# The stages, read without importing them.


def stages() -> dict[str, str]:
    """Returns the name of each stage -> the first line of its docstring, in alphabetical order."""
    found = {}
    for folder in stages_package.__path__:
        for path in sorted(pathlib.Path(folder).glob("[a-z]*.py")):
            found[path.stem.rstrip("_")] = _summary(path)
    return found


def stage_flags(stage: str) -> dict[str, str]:
    """Returns the stage's own flags -> help: its literal `FLAGS`, read from the source."""
    return _literal(stage, "FLAGS") or {}


def training_flags(stage: str) -> dict[str, str]:
    """Returns the flags of processes and restarts of a stage that says `TRAINS = True`."""
    own = stage_flags(stage)
    return {n: t for n, t in TRAINING_FLAGS.items() if n not in own and _literal(stage, "TRAINS")}


def _literal(stage: str, name: str) -> Any:
    for folder in stages_package.__path__:
        path = pathlib.Path(folder) / f"{stage}{'_' if stage == 'import' else ''}.py"
        if path.exists():
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                targets = getattr(node, "targets", [getattr(node, "target", None)])
                if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                    return ast.literal_eval(node.value)
    return None


def _summary(path: pathlib.Path) -> str:
    """The first line of a module's docstring; parsing whole modules would take longer than gin."""
    with path.open(encoding="utf-8") as file:
        return file.readline().strip().removeprefix('"""').removesuffix('"""')


def _overview(known: dict[str, str]) -> str:
    width = max(map(len, known), default=0)
    return "\n".join(
        [
            f"Usage: {USAGE}",
            "",
            "Stages:",
            *(f"  {name:<{width}}  {summary}" for name, summary in known.items()),
            "",
            "`python run.py STAGE --help` lists the settings of a stage.",
        ]
    )


# Failures.


def _failed(error: Exception, argv: Sequence[str]) -> tuple[int, str]:
    """Reports an exception: exit status 1, or 2 for a full disk, which only the user can empty."""
    for link in _chain(error):
        full = isinstance(link, OSError) and link.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(link):
            if "--debug" in argv:
                traceback.print_exc()
            where = f" while writing {link.filename}" if getattr(link, "filename", None) else ""
            return 2, (
                f"The disk is full{where}. Files take their names only when complete, so what was "
                "finished is intact: free some space and start again in the same MODEL_DIR."
            )
    traceback.print_exc()
    name = next((word for word in argv if not word.startswith("-")), "")
    first = str(error).strip().splitlines()
    line = f"{name} failed: {type(error).__name__}{': ' + first[0] if first else ''}"
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        line += "\nOut of memory: raise --gin.MICROBATCHES, or lower BATCH_SIZE or the lengths."
    return 1, line


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yields an exception and those it was raised from."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
