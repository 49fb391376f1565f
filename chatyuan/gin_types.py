"""Does a value written in gin fit an annotation, and what should have been written instead?"""

import ast
import collections.abc
import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping

from chatyuan.errors import did_you_mean
from chatyuan.gin_files import show

MISSING = dataclasses.MISSING


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One thing that can be bound: a dataclass field or a function's argument."""

    name: str
    annotation: object
    default: object = MISSING
    metadata: Mapping[str, object] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Anything:
    """Stands for a value that is not known (an undefined macro): it fits everything."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A reference whose class or function has been found."""

    written: str
    target: Callable[..., object]
    evaluate: bool


def parameters(target: Callable[..., object]) -> tuple[dict[str, Parameter], bool]:
    """Returns what `target` takes, by name, and whether it takes any other name too."""
    hints = _hints(target)
    if dataclasses.is_dataclass(target):
        return {
            field.name: Parameter(
                field.name, hints.get(field.name, typing.Any), _default(field), field.metadata
            )
            for field in dataclasses.fields(target)
            if field.init
        }, False
    found, others = {}, False
    try:
        signature = inspect.signature(target)
    except ValueError:  # built in C, without one
        return {}, True
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            others = True
        elif parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            default = MISSING if parameter.default is parameter.empty else parameter.default
            annotation = hints.get(parameter.name, typing.Any)
            found[parameter.name] = Parameter(parameter.name, annotation, default)
    return found, others


def _default(field: dataclasses.Field) -> object:
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def _hints(target: Callable[..., object]) -> dict[str, object]:
    """Annotations that can be evaluated; those that cannot (type checkers' own) are left out."""
    owner = target.__init__ if inspect.isclass(target) and not _is_data(target) else target
    try:
        return typing.get_type_hints(owner)
    except (NameError, AttributeError, TypeError):
        return {k: v for k, v in inspect.get_annotations(owner).items() if not isinstance(v, str)}


def _is_data(annotation: object) -> bool:
    return inspect.isclass(annotation) and dataclasses.is_dataclass(annotation)


def fits(value: object, annotation: object) -> bool:
    """Whether `value` (literals, `Target`s, `Anything`) may be passed where `annotation` is asked.

    Stricter than Python (True is no int) except that an int is a float.
    """
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(value, Anything) or annotation is typing.Any or annotation is object:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, arm) for arm in arguments)
    if origin is typing.Annotated:
        return fits(value, arguments[0])
    if origin is typing.Literal:
        return any(type(value) is type(choice) and value == choice for choice in arguments)
    if isinstance(value, Target):
        return _target_fits(value, annotation, origin)
    if annotation in (None, type(None)):
        return value is None
    if annotation in (int, float):
        return type(value) is int or type(value) is annotation
    container = origin or annotation
    if not inspect.isclass(container):
        return True  # a type variable or another form that says nothing about values
    if not isinstance(value, container):
        return False
    if container is tuple and arguments and arguments[-1] is not Ellipsis:
        return len(value) == len(arguments) and all(map(fits, value, arguments))
    if isinstance(value, dict) and len(arguments) == 2:
        keys, values = arguments
        return all(fits(k, keys) and fits(v, values) for k, v in value.items())
    if isinstance(value, list | tuple) and arguments:
        return all(fits(item, arguments[0]) for item in value)
    return True


def _target_fits(value: Target, annotation: object, origin: object) -> bool:
    if not value.evaluate:
        return (origin or annotation) in (Callable, collections.abc.Callable, type)
    result = value.target
    if not inspect.isclass(result):
        result = _hints(result).get("return", typing.Any)
        result = typing.get_origin(result) or result
    wanted = origin or annotation
    if not inspect.isclass(result) or not inspect.isclass(wanted):
        return True
    return issubclass(result, wanted) or (wanted is float and result is int)


def describe(annotation: object) -> str:
    """Names an annotation the way a reader of the configuration would."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in (None, type(None)):
        return "None"
    if origin in (typing.Union, types.UnionType):
        return " or ".join(map(describe, arguments))
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(map(repr, arguments))
    if origin in (Callable, collections.abc.Callable):
        return "a function"
    if origin is typing.Annotated:
        return describe(arguments[0])
    if arguments:
        inner = ", ".join("..." if a is Ellipsis else describe(a) for a in arguments)
        return f"{describe(origin)}[{inner}]"
    return getattr(annotation, "__name__", str(annotation))


def complaint(value: object, annotation: object, shell: bool = False) -> str:
    """Says `= VALUE should be TYPE, got TYPE.` and what to write, for a value that does not fit.

    Args:
        value: the value.
        annotation: what it does not fit.
        shell: whether it was typed in a shell, which takes one layer of quotes away.
    """
    got = "" if _choices(annotation) and isinstance(value, str) else f", got {_kind(value)}"
    remedy = _remedy(value, annotation, shell)
    return f"= {_show(value)} should be {describe(annotation)}{got}.{remedy}"


def _kind(value: object) -> str:
    if not isinstance(value, Target):
        return type(value).__name__
    if value.evaluate:
        target = value.target  # its full name, for it may be another class of the same name
        name = f"{target.__module__}.{target.__qualname__}"
        return f"a {name}" if inspect.isclass(target) else "its result"
    return f"the {'class' if inspect.isclass(value.target) else 'function'} itself"


def _show(value: object) -> str:
    if isinstance(value, Target):
        return f"@{value.written}{'()' if value.evaluate else ''}"
    if isinstance(value, tuple) and any(isinstance(item, Target) for item in value):
        return "(" + ", ".join(map(_show, value)) + ")"
    return show(value)


def _remedy(value: object, annotation: object, shell: bool) -> str:
    for other in _alternatives(value):
        if fits(other, annotation):
            text = _show(other)
            return f' Write "{text}".' if shell and "'" in text else f" Write {text}."
    if isinstance(value, str):
        return did_you_mean(value, [c for c in _choices(annotation) if isinstance(c, str)])
    return ""


def _alternatives(value: object) -> Iterator[object]:
    """What people mean when they write `value`, most likely first."""
    if isinstance(value, Target):
        yield dataclasses.replace(value, evaluate=not value.evaluate)
        return
    if isinstance(value, str):
        for text in (value, value.capitalize()):
            try:
                yield ast.literal_eval(text)
            except (ValueError, SyntaxError):
                continue
    if isinstance(value, float) and value.is_integer():
        yield int(value)
    if isinstance(value, list):
        yield tuple(value)
    if isinstance(value, bool | int | float):
        yield str(value)
    if not isinstance(value, tuple | list | dict):
        yield (value,)


def _choices(annotation: object) -> list[object]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return list(arguments)
    if origin in (typing.Union, types.UnionType):
        return [choice for arm in arguments for choice in _choices(arm)]
    return []
