"""Configuration: gin files and flags in, one frozen dataclass out, or one list of all mistakes.

`load` reads, checks and builds; `save_run` writes what was built next to the run and
`check_same_run` refuses to continue a run under another configuration; `load_saved` reads a part of
it back; `explain` and `stage_help` print. This module and its `gin_*` parts alone know gin.
"""

import dataclasses
import enum
import functools
import importlib
import inspect
import json
import math
import os
import pathlib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import chatyuan
from chatyuan.errors import UserError, did_you_mean
from chatyuan.gin_check import Checker, full_name
from chatyuan.gin_files import (
    REQUIRED,
    Binding,
    GinFile,
    Macro,
    Reader,
    Reference,
    binding,
    mapped,
    parse_word,
    print_notes,
    report,
    show,
)
from chatyuan.gin_types import MISSING, describe

ROOT = pathlib.Path(chatyuan.__file__).resolve().parents[1]
STAGES = "chatyuan.stages"
GIN_NAME = "config.gin"
JSON_NAME = "config.json"

T = TypeVar("T")

# The gin text of every configuration built by this process, by the identity of the configuration,
# which is kept so that its identity stays its own.
_OPERATIVE: dict[int, tuple[object, str]] = {}


def stage_module(stage: str) -> types.ModuleType:
    """Imports and returns the module of a stage (that of `import`, a keyword, is `import_`)."""
    return importlib.import_module(f"{STAGES}.{stage}{'_' if stage == 'import' else ''}")


def load(
    stage: str,
    gin_files: Sequence[str] = (),
    bindings: Sequence[str] | Mapping[str, object] = (),
    *,
    arguments: Sequence[str] = (),
    flags: Mapping[str, str | None] | None = None,
    search_paths: Sequence[str] = (),
) -> Any:
    """Builds the frozen `Config` of a stage.

    Args:
        stage: the stage's name; its defaults, gin/stages/STAGE.gin, are read first.
        gin_files: further files, each overriding those before it; relative paths are looked for in
            the current directory, in the repository and in `search_paths`.
        bindings: `NAME=VALUE` strings as on the command line, or a mapping of names to Python
            values. They override every file.
        arguments: words for the stage's `Config.arguments`.
        flags: the stage's own flags: `{"precompile": None}` sets `Config.precompile` to True.
        search_paths: further directories in which files are looked for.

    Raises:
        UserError: everything that is wrong, in one message; nothing was built.
    """
    reader = Reader(ROOT, search_paths)
    target = stage_module(stage).Config
    sources = [_stage_defaults(reader, stage)]
    reader.skip = {file.path for file in sources[0].walk() if file.path}
    for name in gin_files:
        source = reader.read(os.fspath(name), f"--gin_file={name}")
        sources += [source] if source else []
    sources.append(reader.read_flags(bindings))
    _add_words(sources[-1], reader, stage, target, arguments, flags or {})
    checker = Checker(sources, reader.problems, stage, target)
    config = checker.build(target)
    checker.report_unused()
    if reader.problems:
        raise report(reader.problems)
    print_notes(reader.notes)
    _OPERATIVE[id(config)] = (config, _operative(checker, stage))
    return config


def check_file(name: str) -> list[str]:
    """Returns what is wrong with one gin file by itself: its names, types and double bindings."""
    reader = Reader(ROOT)
    file = reader.read(name, name, rename=False)
    return Checker([file], reader.problems).problems if file else reader.problems


def _stage_defaults(reader: Reader, stage: str) -> GinFile:
    path = ROOT / "gin" / "stages" / f"{stage}.gin"
    source = reader.read(str(path), stage, rename=False) if path.exists() else None
    return source or GinFile(f"gin/stages/{stage}.gin", path)


def _add_words(
    file: GinFile,
    reader: Reader,
    stage: str,
    target: type,
    arguments: Sequence[str],
    flags: Mapping[str, str | None],
) -> None:
    """Turns arguments and the stage's own flags into bindings of its `Config`."""
    owner = f"{target.__module__}.{target.__qualname__}"
    if arguments and "arguments" not in {field.name for field in dataclasses.fields(target)}:
        words = " ".join(arguments)
        remedy = "settings are written --gin.NAME=VALUE."
        reader.problems.append(f"{stage} takes no arguments, got {words}; {remedy}")
    elif arguments:
        place = " ".join(arguments)
        file.bindings.append(binding(f"{owner}.arguments", tuple(arguments), place, file))
    for name, text in flags.items():
        try:
            value = True if text is None else parse_word(text)
            file.bindings.append(binding(f"{owner}.{name}", value, f"--{name}", file))
        except SyntaxError as error:
            reader.problems.append(f"--{name}={text}  {error}")


# The operative configuration as gin text.


def _operative(checker: Checker, stage: str) -> str:
    """Everything that was used, defaults included, as one file that gin reads back."""
    settings = _settings(checker)
    aliases = _aliases(checker, [target for _, target, _ in settings])

    def rename(item: object, source: Binding | None) -> object:
        if isinstance(item, Reference) and source:
            target = checker.target(item, source)
            return dataclasses.replace(item, selector=".".join(aliases[target]))
        return item

    lines = ["from __gin__ import dynamic_registration", ""]
    modules = {checker.aliases[t][0]: alias for t, (alias, _) in aliases.items()}
    for module, alias in sorted(modules.items()):
        package, _, name = module.rpartition(".")
        lines.append(
            f"from {package} import {name}" + (f" as {alias}" if alias != name else "")
            if package
            else f"import {module}" + (f" as {alias}" if alias != module else "")
        )
    lines += ["", "# Macros"]
    for name in sorted(checker.used_macros):
        source = checker.macros[name]
        lines.append(f"{name} = {show(mapped(source.value, lambda v, s=source: rename(v, s)))}")
    owner = None
    for (scope, target, parameter), (value, source) in settings.items():
        if target is not owner:
            owner = target
            lines += ["", f"# {full_name(target)}"]
        left = ".".join((*aliases[target], parameter))
        value = mapped(value, lambda v, s=source: rename(v, s))
        lines.append(f"{scope + '/' if scope else ''}{left} = {show(value)}")
    head = f"# All settings of this run; `python run.py {stage} --gin_file=THIS_FILE` repeats it."
    return "\n".join([head, *lines, ""])


def _settings(checker: Checker) -> dict[tuple, tuple[object, Binding | None]]:
    """(scope, target, parameter) -> value and the binding it comes from (None: a default)."""
    settings: dict[tuple, tuple[object, Binding | None]] = {}
    for node in checker.nodes:
        keys = {name: checker.keys[id(source)] for name, source in node.bound.items()}
        scope = max((key[0] for key in keys.values()), key=len, default="")
        for parameter in checker.parameters(node.target)[0].values():
            if parameter.name in node.bound:
                source = node.bound[parameter.name]
                settings[keys[parameter.name]] = (source.value, source)
            elif node.called and parameter.default is not MISSING and _literal(parameter.default):
                settings.setdefault((scope, node.target, parameter.name), (parameter.default, None))
        for name, source in node.bound.items():  # those that only **kwargs takes
            settings[keys[name]] = (source.value, source)
    order = {id(node.target): i for i, node in reversed(list(enumerate(checker.nodes)))}
    return dict(sorted(settings.items(), key=lambda item: (order[id(item[0][1])], item[0][0])))


def _literal(value: object) -> bool:
    if isinstance(value, dict):
        return all(_literal(k) and _literal(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_literal, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or type(value) in (bool, int, str)


def _aliases(checker: Checker, used: Sequence[object]) -> dict[object, tuple[str, str]]:
    """target -> (alias of its module, its name there); no alias means two modules."""
    owners: dict[str, str] = {}
    aliases = {}
    for target in [*used, *checker.aliases]:
        module, alias, attribute = checker.aliases[target]
        while owners.setdefault(alias, module) != module:
            alias += "_"
        aliases[target] = (alias, attribute)
    return aliases


# Saving, and reading back.


def save_run(config: object, model_dir: str | os.PathLike[str]) -> None:
    """Writes config.gin and config.json of a configuration that `load` built into `model_dir`."""
    kept, operative = _OPERATIVE.get(id(config), (None, ""))
    if kept is not config:
        raise AssertionError("save_run takes the configuration that load returned, not a copy")
    save(config, operative, model_dir)


def save(config: object, operative_gin: str, model_dir: str | os.PathLike[str]) -> None:
    """Writes config.gin (reads back with --gin_file) and config.json, each atomically."""
    folder = pathlib.Path(model_dir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(config), indent=2, ensure_ascii=False) + "\n"
    for name, content in ((GIN_NAME, operative_gin), (JSON_NAME, text)):
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, folder / name)


def check_same_run(
    config: object, model_dir: str | os.PathLike[str], may_change: Sequence[str] = ()
) -> None:
    """Refuses to continue the run in `model_dir` under another configuration.

    Args:
        config: the configuration about to run.
        model_dir: the run's folder; nothing is checked when it holds no config.json.
        may_change: dotted names of settings, or of groups of settings, that may differ.
            `model_dir` always may: a folder can be moved.

    Raises:
        UserError: naming each setting that differs, with both values.
    """
    path = pathlib.Path(model_dir) / JSON_NAME
    if not path.exists():
        return
    saved = dict(_flat(_with_defaults(read_saved(model_dir), config)))
    now = dict(_flat(json.loads(json.dumps(to_json(config)))))
    if saved.get("class") != now["class"]:
        differing = [f"{saved.get('class')} ran there, this is {now['class']}"]
    else:
        differing = [
            f"{name}: {saved.get(name)!r} there, {now.get(name)!r} here"
            for name in dict.fromkeys((*saved, *now))
            if saved.get(name) != now.get(name)
            and not any(f"{name}.".startswith(f"{free}.") for free in ("model_dir", *may_change))
        ]
    if differing:
        lines = "\n".join(f"  - {line}" for line in differing)
        raise UserError(
            f"MODEL_DIR {model_dir} holds a run of another configuration:\n{lines}\n"
            "Use a new folder (--gin.MODEL_DIR=...) or set these back."
        )


def read_saved(model_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns config.json of a run's folder: nested dicts, each dataclass with its `class`.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = pathlib.Path(model_dir) / JSON_NAME
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: {model_dir} is not the folder of a run.") from None
    except (ValueError, OSError) as error:
        text = f"{path} cannot be read ({error}); restore it or use a new folder."
        raise UserError(text) from None
    if not isinstance(saved, dict):
        raise UserError(f"{path} is not a configuration; restore it or use a new folder.")
    return saved


def load_saved(model_dir: str | os.PathLike[str], name: str, cls: type[T]) -> T:
    """Rebuilds the setting `name` of a run (`"model"`, say) as the dataclass `cls`.

    Raises:
        UserError: the run has no such setting, or it does not fit `cls`.
    """
    saved = read_saved(model_dir)
    path = pathlib.Path(model_dir) / JSON_NAME
    for part in name.split("."):
        if not isinstance(saved, dict) or part not in saved:
            raise UserError(f"{path} has no setting {name}: it was written by another stage.")
        saved = saved[part]
    try:
        return from_json(cls, saved)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {name} does not fit {cls.__name__}: {error}") from None


def to_json(value: object) -> Any:
    """Turns a configuration into what JSON can hold; functions become their full names."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": full_name(type(value)), **fields}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, functools.partial):
        return {"function": full_name(value.func), **to_json(value.keywords)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return full_name(value) if hasattr(value, "__qualname__") else str(value)


def from_json(annotation: Any, value: Any) -> Any:
    """Undoes `to_json`, or `dataclasses.asdict`, for an annotation.

    Dataclasses, tuples and functions come back; fields that are missing take their defaults.

    Raises:
        UserError: a dataclass of another kind, or a field that the dataclass does not have.
    """
    arms = typing.get_args(annotation)
    origin = typing.get_origin(annotation)
    options = [arm for arm in (annotation, *arms) if dataclasses.is_dataclass(arm)]
    if isinstance(value, dict) and (options or "class" in value):
        named = [arm for arm in options if full_name(arm) == value.get("class")] or options
        if not named:
            raise UserError(f"{value['class']} where {describe(annotation)} is expected.")
        hints = typing.get_type_hints(named[0])
        items = {name: item for name, item in value.items() if name != "class"}
        for name in set(items) - set(hints):
            raise UserError(f"{named[0].__name__} has no {name}.{did_you_mean(name, hints)}")
        return named[0](**{name: from_json(hints[name], item) for name, item in items.items()})
    if origin in (typing.Union, types.UnionType):
        some = [arm for arm in arms if arm is not type(None)]
        return None if value is None else from_json(some[0], value) if len(some) == 1 else value
    if isinstance(value, list) and (origin or annotation) is not list:
        inner = arms if arms and arms[-1] is not Ellipsis else arms[:1] * len(value)
        return tuple(map(from_json, inner or (Any,) * len(value), value))
    if isinstance(value, dict) and len(arms) == 2:
        return {key: from_json(arms[1], item) for key, item in value.items()}
    if isinstance(value, str) and origin is not None and "Callable" in str(origin):
        module, _, name = value.rpartition(".")
        return getattr(importlib.import_module(module), name)
    return value


def _flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _with_defaults(saved: Any, config: object) -> Any:
    """Adds the defaults of fields that did not exist when a run was saved: what it meant then."""
    if not isinstance(saved, dict):
        return saved
    filled = dict(saved)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in saved and dataclasses.is_dataclass(value):
            filled[field.name] = _with_defaults(saved[field.name], value)
        elif field.name not in saved and field.default_factory is not MISSING:
            filled[field.name] = to_json(field.default_factory())
        elif field.name not in saved and field.default is not MISSING:
            filled[field.name] = to_json(field.default)
    return filled


# Printing.


def explain(config: object, indent: str = "") -> str:
    """Lists every setting of a configuration with its value and unit, groups indented."""
    lines = []
    fields = dataclasses.fields(config)
    width = max((len(field.name) for field in fields), default=0)
    for field in fields:
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            lines.append(f"{indent}{field.name}  {type(value).__name__}")
            lines.append(explain(value, indent + "  "))
            continue
        unit = f" {field.metadata['unit']}" if field.metadata.get("unit") else ""
        shown = to_json(value) if callable(value) else value
        lines.append(f"{indent}{field.name:<{width}}  {shown!r}{unit}")
    return "\n".join(lines)


def stage_help(stage: str, flags: Mapping[str, str] | None = None) -> str:
    """Returns what `python run.py STAGE --help` prints: description, usage, table of macros.

    Args:
        stage: its name.
        flags: the stage's own flags -> help.
    """
    module = stage_module(stage)
    reader = Reader(ROOT)
    checker = Checker([_stage_defaults(reader, stage)], reader.problems, stage, module.Config)
    if reader.problems:
        raise report(reader.problems)
    takes = "arguments" in {field.name for field in dataclasses.fields(module.Config)}
    lines = [
        inspect.getdoc(module) or "",
        "",
        f"Usage: python run.py {stage} {'[ARGUMENT...] ' if takes else ''}[--gin_file=FILE]... "
        "[--gin.NAME=VALUE]... [--dry_run]",
    ]
    if takes:
        field = next(f for f in dataclasses.fields(module.Config) if f.name == "arguments")
        lines.append(f"Arguments: {field.metadata.get('help', '')}")
    rows = [("NAME", "TYPE", "DEFAULT", "UNIT", "MEANING"), *_macro_rows(checker)]
    widths = [min(32, max(len(row[i]) for row in rows)) for i in range(4)]
    lines += ["", "Settings (--gin.NAME=VALUE):"]
    for row in rows:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        lines.append(f"  {'  '.join(cells)}  {row[4]}".rstrip())
    if flags:
        width = max(map(len, flags))
        lines += ["", "Flags:", *(f"  --{name:<{width}}  {text}" for name, text in flags.items())]
    groups = ", ".join(f"{checker.alias(target)}" for target in checker.aliases)
    lines += ["", f"Every field of {groups} can be set too: --gin.CLASS.FIELD=VALUE;"]
    lines += ["--dry_run lists them all with their values."]
    return "\n".join(lines)


def _macro_rows(checker: Checker) -> Iterator[tuple[str, str, str, str, str]]:
    """(name, type, default, unit, help) of each macro, from the fields it is bound to."""
    uses: dict[str, tuple] = {}
    for (_, target, name), source in checker.effective.items():
        parameter = checker.parameters(target)[0].get(name) if target else None
        if parameter and isinstance(source.value, Macro):
            uses.setdefault(source.value.name, (parameter, describe(parameter.annotation)))
        elif parameter:
            found: list[object] = []
            mapped(source.value, found.append)
            for macro in (leaf for leaf in found if isinstance(leaf, Macro)):
                uses.setdefault(macro.name, (parameter, ""))
    for name, source in checker.macros.items():
        parameter, kind = uses.get(name, (None, ""))
        metadata = parameter.metadata if parameter else {}
        default = "required" if source.value == Macro(REQUIRED) else show(source.value)
        yield name, kind, default, str(metadata.get("unit", "")), str(metadata.get("help", ""))
