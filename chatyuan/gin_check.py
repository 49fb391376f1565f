"""Checks bindings against the code they name, all at once, and builds the configuration.

gin itself misses silently: a mistyped macro, a wrong type, a forgotten `()`, a double binding, two
included files binding one parameter. So gin lends its grammar (`gin_files`) and the rest is here,
in three passes over one list of problems:

1. resolve: import what the files import and find each class and parameter;
2. rank: decide which of several bindings counts (stage default < included file < the file that
   includes it < a later --gin_file < --gin. flags), and refuse those that nothing ranks;
3. build: from the stage's `Config` down, noting what is reached, so that what is set and used by
   nothing is reported too.
"""

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence

from chatyuan.errors import did_you_mean, missing_package
from chatyuan.gin_files import (
    REQUIRED,
    T5X_WITHOUT_COUNTERPART,
    Binding,
    GinFile,
    Macro,
    Reference,
    mapped,
    show,
)
from chatyuan.gin_types import (
    MISSING,
    Anything,
    Parameter,
    Target,
    complaint,
    fits,
    parameters,
)

Builder = Callable[..., object]
# What a binding is about: (scope, class or function, parameter), or ("", None, macro's name).
Key = tuple[str, Builder | None, str]


class _Broken:
    """What could not be built; whatever needs it cannot be built either."""


BROKEN = _Broken()


@dataclasses.dataclass
class Node:
    """One class or function as used in one scope, with the bindings it took.

    `called` is false for one that is passed on without being called.
    """

    scope: str
    target: Builder
    bound: dict[str, Binding]
    called: bool


class Checker:
    """Checks and builds one configuration from `sources`, lowest rank first.

    Args:
        sources: each a file with its includes; the stage's own defaults first, the flags last.
        problems: what is found wrong is appended here.
        stage: the stage's name, for messages.
        target: the stage's `Config`, which flags may name even where no file does.
        defaults: how many of the sources are the stage's own: they may set what nothing uses.
    """

    def __init__(
        self,
        sources: Sequence[GinFile],
        problems: list[str],
        stage: str = "",
        target: Builder | None = None,
        defaults: int = 1,
    ) -> None:
        self.problems = problems
        self.stage = stage
        self.sources = sources
        self.own_files = {id(file) for source in sources[:defaults] for file in source.walk()}
        self.aliases: dict[Builder, tuple[str, str, str]] = {}  # -> module, its alias, attribute
        if target:
            module = target.__module__
            self.aliases[target] = (module, module.split(".")[-1], target.__qualname__)
        # A stage may take what was written for others: their settings are then its own.
        others = getattr(target, "STANDS_FOR", ())
        self._stands_for: dict[Builder, Builder] = dict.fromkeys(others, target)
        self.nodes: list[Node] = []
        self._symbols: dict[int, dict[str, tuple[object, str]]] = {}
        self._parameters: dict[Builder, tuple[dict[str, Parameter], bool]] = {}
        self._lost = bool(problems)  # part of the configuration is unknown
        self._bad: set[int] = set()
        self.used_macros: set[str] = set()
        self._used: set[int] = set()
        self._stack: list[object] = []

        self.keys: dict[int, Key] = {}
        for file in self._files():
            self._symbols[id(file)] = self._import(file)
        for file in self._files():
            self._resolve_file(file)
        self.effective = self._rank()
        self.macros = {key[2]: b for key, b in self.effective.items() if key[1] is None}
        for file in self._files():
            for binding in file.bindings:
                self._check_type(binding)

    # Pass 1: names.

    def _files(self) -> Iterator[GinFile]:
        for source in self.sources:
            yield from source.walk()

    def _problem(self, place: str, text: str, lost: bool = False) -> None:
        self.problems.append(f"{place}  {text}" if place else text)
        self._lost |= lost

    def _import(self, file: GinFile) -> dict[str, tuple[object, str]]:
        """Returns what the file's import statements name -> (module, the module's path)."""
        symbols: dict[str, tuple[object, str]] = {}
        for statement in file.imports:
            place = f"{file.name}:{statement.location.line_num}"
            if statement.module == "__gin__.dynamic_registration":
                continue
            try:
                module = importlib.import_module(statement.module)
            except ModuleNotFoundError as error:
                self._problem(place, _import_problem(statement.module, error), lost=True)
                continue
            if not (statement.is_from or statement.alias):
                module = importlib.import_module(statement.module.split(".")[0])
            symbols[statement.bound_name()] = (module, module.__name__)
        return symbols

    def _resolve_file(self, file: GinFile) -> None:
        is_flags = file.path is None
        for binding in file.bindings:
            mapped(binding.value, lambda item, b=binding: self._resolve_reference(item, b))
            if not binding.selector:
                self.keys[id(binding)] = ("", None, binding.parameter)
                continue
            find = self.find_flag if is_flags else functools.partial(self.find, file=file)
            target = find(binding.selector, place=binding.place)
            if target is None:
                continue
            target = self._stands_for.get(target, target)
            known, others = self.parameters(target)
            if binding.parameter in known or others:
                self.keys[id(binding)] = (binding.scope, target, binding.parameter)
                continue
            near = did_you_mean(binding.parameter, known)
            name = full_name(target)
            self._problem(binding.place, f"{name} has no parameter {binding.parameter}.{near}")

    def _resolve_reference(self, item: object, binding: Binding) -> None:
        if isinstance(item, Reference):
            self._find_target(item, binding)

    def _find_target(self, reference: Reference, binding: Binding) -> Builder | None:
        if binding.file.path is None:
            return self.find_flag(reference.selector, place=binding.place)
        return self.find(reference.selector, place=binding.place, file=binding.file)

    def find(self, selector: str, place: str, file: GinFile) -> Builder | None:
        """Returns the class or function that `selector` names in `file`, or reports it."""
        symbols = self._symbols[id(file)]
        first, *rest = selector.split(".")
        if first not in symbols:
            return self._not_imported(selector, place, file)
        value, module = symbols[first]
        alias, attributes = first, []
        for name in rest:
            if not hasattr(value, name):
                near = did_you_mean(name, _public(value))
                owner = getattr(value, "__name__", first)
                self._problem(place, f"{selector} is unknown: {owner} has no {name}.{near}", True)
                return None
            value = getattr(value, name)
            if inspect.ismodule(value):
                module, alias, attributes = value.__name__, name, []
            else:
                attributes.append(name)
        return self._register(selector, value, module, alias, ".".join(attributes), place)

    def _not_imported(self, selector: str, place: str, file: GinFile) -> None:
        first = selector.split(".")[0]
        imported = {statement.bound_name() for statement in file.imports}
        if first in imported:  # its import failed and was reported
            self._lost = True
            return None
        near = did_you_mean(first, imported)
        remedy = near or f" Add `from ... import {first}` at the top of the file."
        self._problem(place, f"{selector} is unknown: {first} is not imported here.{remedy}", True)
        return None

    def _register(
        self, selector: str, value: object, module: str, alias: str, attribute: str, place: str
    ) -> Builder | None:
        if not (callable(value) and hasattr(value, "__qualname__")):
            self._problem(place, f"{selector} is neither a class nor a function.", lost=True)
            return None
        self.aliases.setdefault(value, (module, alias, attribute))
        return value

    def find_flag(self, selector: str, place: str) -> Builder | None:
        """Returns what `selector` names on the command line: the end of any name in the files."""
        names = {name: t for t in self.aliases for name in (self.alias(t), full_name(t))}
        found = {id(t): t for n, t in names.items() if f".{n}".endswith(f".{selector}")}
        if len(found) == 1:
            return next(iter(found.values()))
        if len(found) > 1:
            options = ", ".join(sorted(map(full_name, found.values())))
            self._problem(place, f"{selector} is ambiguous; write one of {options}.")
            return None
        for file in self._files():
            if selector.split(".")[0] in self._symbols.get(id(file), {}):
                return self.find(selector, place, file)
        module, _, attribute = selector.rpartition(".")
        if module:
            try:
                value = getattr(importlib.import_module(module), attribute, None)
            except ModuleNotFoundError:
                value = None
            if value is not None:
                alias = module.split(".")[-1]
                return self._register(selector, value, module, alias, attribute, place)
        near = did_you_mean(selector, names)
        self._problem(place, f"{selector} is not part of this configuration.{near}")
        return None

    def alias(self, target: Builder) -> str:
        """The short name of a class, as files write it: `module.Class`."""
        _, alias, attribute = self.aliases[target]
        return f"{alias}.{attribute}"

    def parameters(self, target: Builder) -> tuple[dict[str, Parameter], bool]:
        """`gin_types.parameters`, remembered."""
        if target not in self._parameters:
            self._parameters[target] = parameters(target)
        return self._parameters[target]

    # Pass 2: precedence.

    def _rank(self) -> dict[Key, Binding]:
        effective: dict[Key, Binding] = {}
        for source in self.sources:
            groups: dict[Key, list[Binding]] = {}
            for file in source.walk():
                for binding in file.bindings:
                    if id(binding) in self.keys:
                        groups.setdefault(self.keys[id(binding)], []).append(binding)
            for key, group in groups.items():
                effective[key] = self._winner(group)
        return effective

    def _winner(self, group: list[Binding]) -> Binding:
        """The binding of the outermost file; reports two in one file, or in unrelated files."""
        included = {id(f) for b in group for f in list(b.file.walk())[1:]}
        outermost = [b for b in group if id(b.file) not in included] or group
        first, *others = outermost
        for other in others:
            if show(other.value) == show(first.value) and other.file.path is None:
                continue  # the same flag twice, saying the same
            places = f"{first.place} (= {show(first.value)}) and {other.place}"
            if other.file is first.file:
                text = f"{other.written} is set twice: at {places} (= {show(other.value)})."
            else:
                text = (
                    f"{other.written} is set by two included files: {places} "
                    f"(= {show(other.value)}); set it in the file that includes both."
                )
            self._problem(other.place, text)
        return first

    # Types.

    def _check_type(self, binding: Binding) -> None:
        key = self.keys.get(id(binding))
        if key is None or key[1] is None:
            return
        known, _ = self.parameters(key[1])
        annotation = known[key[2]].annotation if key[2] in known else object
        value = self._known(binding.value, binding, ())
        if fits(value, annotation):
            return
        self._bad.add(id(binding))
        name = f"{full_name(key[1])}.{key[2]}"
        source = binding
        while isinstance(source.value, Macro) and source.value.name in self.macros:
            source = self.macros[source.value.name]
        text = complaint(value, annotation, shell=source.file.path is None)
        if source is binding:
            self._problem(binding.place, f"{name} {text}")
        else:
            self._problem(source.place, f"{source.parameter} {text} (It sets {name}.)")

    def _known(self, value: object, binding: Binding, trail: tuple[str, ...]) -> object:
        """Replaces macros by their values and references by what they name."""

        def leaf(item: object) -> object:
            if isinstance(item, Macro):
                macro = self.macros.get(item.name)
                if macro is None or item.name in trail:
                    return Anything()
                return self._known(macro.value, macro, (*trail, item.name))
            if isinstance(item, Reference):
                target = self.target(item, binding)
                return Target(item.selector, target, item.evaluate) if target else Anything()
            return item

        return mapped(value, leaf)

    def target(self, reference: Reference, binding: Binding) -> Builder | None:
        """The reference's target; problems were reported when the file was resolved."""
        count, lost = len(self.problems), self._lost
        target = self._find_target(reference, binding)
        del self.problems[count:]
        self._lost = lost
        return target

    # Pass 3: building.

    def build(self, target: Builder, scope: str = "") -> object:
        """Calls `target` with what is bound to it in `scope`; BROKEN if a problem forbids it."""
        arguments, broken = self._arguments(target, scope, called=True)
        known, _ = self.parameters(target)
        for parameter in known.values():
            if parameter.name not in arguments and parameter.default is MISSING:
                broken = True
                self._problem("", self._must_be_set(target, parameter))
        if broken:
            return BROKEN
        try:
            return target(**arguments)
        except ValueError as error:
            self._problem("", f"{full_name(target)}: {error}")
            return BROKEN

    def _arguments(
        self, target: Builder, scope: str, called: bool
    ) -> tuple[dict[str, object], bool]:
        bound = self.bound(target, scope)
        self.nodes.append(Node(scope, target, bound, called))
        self._stack.append((target, scope))
        arguments, broken = {}, False
        for name, binding in bound.items():
            self._used.add(id(binding))
            value = self._value(binding.value, binding, scope)
            arguments[name] = value
            broken |= id(binding) in self._bad or _contains_broken(value)
        self._stack.pop()
        return arguments, broken

    def bound(self, target: Builder, scope: str) -> dict[str, Binding]:
        """The bindings that count for `target` in `scope`: an inner scope's over an outer one's."""
        parts = scope.split("/") if scope else []
        found: dict[str, Binding] = {}
        for i in range(len(parts) + 1):
            prefix = "/".join(parts[:i])
            for (where, what, name), binding in self.effective.items():
                if what is target and where == prefix:
                    found[name] = binding
        return found

    def _value(self, value: object, binding: Binding, scope: str) -> object:
        def leaf(item: object) -> object:
            if isinstance(item, Macro):
                return self._macro(item, binding)
            if isinstance(item, Reference):
                return self._reference(item, binding, scope)
            return item

        return mapped(value, leaf)

    def _macro(self, macro: Macro, used_by: Binding) -> object:
        if macro.name == REQUIRED:
            self._problem("", self._required(used_by))
            return BROKEN
        if macro.name not in self.macros:
            near = did_you_mean(macro.name, self.macros)
            self._problem(used_by.place, f"%{macro.name} is used but never set.{near}")
            return BROKEN
        if macro in self._stack:
            self._problem(used_by.place, f"%{macro.name} is set to itself.")
            return BROKEN
        self.used_macros.add(macro.name)
        source = self.macros[macro.name]
        self._stack.append(macro)
        if source.value == Macro(REQUIRED):
            self._problem("", self._macro_must_be_set(macro.name, used_by))
            value = BROKEN
        else:
            value = self._value(source.value, source, macro.name)
        self._stack.pop()
        return value

    def _reference(self, reference: Reference, binding: Binding, scope: str) -> object:
        target = self.target(reference, binding)
        if target is None:
            return BROKEN
        scope = reference.scope or scope
        if (target, scope) in self._stack:
            self._problem(binding.place, f"{show(reference)} needs itself.")
            return BROKEN
        if reference.evaluate:
            return self.build(target, scope)
        arguments, broken = self._arguments(target, scope, called=False)
        if broken:
            return BROKEN
        return functools.partial(target, **arguments) if arguments else target

    # What is missing, and what nothing uses.

    def _macro_must_be_set(self, name: str, used_by: Binding) -> str:
        key = self.keys.get(id(used_by))
        known = self.parameters(key[1])[0] if key and key[1] else {}
        help_text = known[key[2]].metadata.get("help", "") if key and key[2] in known else ""
        what = f": {help_text.rstrip('.')}" if help_text else ""
        where = used_by.file.name.removeprefix("gin/").removesuffix(".gin")
        return f"{name} must be set (used by {where}{what}): pass --gin.{name}=... ."

    def _required(self, binding: Binding) -> str:
        return f"{binding.written} must be set: pass --gin.{binding.written}=... ."

    def _must_be_set(self, target: Builder, parameter: Parameter) -> str:
        flag = f"{self.alias(target)}.{parameter.name}"
        help_text = str(parameter.metadata.get("help", "")).rstrip(".")
        what = f" ({help_text})" if help_text else ""
        return f"{full_name(target)}.{parameter.name} must be set{what}: pass --gin.{flag}=... ."

    def report_unused(self) -> None:
        """Reports macros and bindings of the user that had no effect on what was built."""
        mentioned = set(_macros_in(self._files()))
        for name, binding in self.macros.items():
            own = id(binding.file) in self.own_files
            if name in self.used_macros or (own and name in mentioned):
                continue
            hint = self._unused_hint(name)
            if hint or not self._lost:
                self._problem(binding.place, f"{name} is set but nothing uses it.{hint}")
        groups: dict[tuple, list[Binding]] = {}
        for key, binding in self.effective.items():
            unused = key[1] is not None and id(binding) not in self._used
            if unused and not self._lost and id(binding.file) not in self.own_files:
                groups.setdefault((binding.file.name, key[0], key[1]), []).append(binding)
        for (_, scope, _), group in groups.items():
            name = group[0].selector if not scope else f"{scope}/{group[0].selector}"
            more = f" (nor its {len(group) - 1} other settings)" if len(group) > 1 else ""
            text = f"{name}.{group[0].parameter} is set{more} but {self.stage} builds no {name}."
            self._problem(group[0].place, text)

    def _unused_hint(self, name: str) -> str:
        if name in T5X_WITHOUT_COUNTERPART:
            return f" {T5X_WITHOUT_COUNTERPART[name]}"
        for node in self.nodes:
            if name.lower() in self.parameters(node.target)[0]:
                path = f"{self.alias(node.target)}.{name.lower()}"
                if not isinstance(getattr(node.bound.get(name.lower()), "value", None), Macro):
                    return f" Did you mean {path}?"
        overridden = [
            b for f in self._files() for b in f.bindings if Macro(name) in _leaves(b.value)
        ]
        if overridden:
            key = self.keys.get(id(overridden[0]))
            over = self.effective.get(key) if key else None
            if over and over is not overridden[0]:
                return f" {overridden[0].written} would, but {over.place} sets that."
        known = self.used_macros | set(_macros_in(self._files()))
        return did_you_mean(name, known) or did_you_mean(name.upper(), known)


def full_name(target: Builder) -> str:
    """`package.module.Class` of a class or function."""
    return f"{target.__module__}.{target.__qualname__}"


def _leaves(value: object) -> list[object]:
    found: list[object] = []
    mapped(value, lambda item: found.append(item))
    return found


def _macros_in(files: Iterable[GinFile]) -> Iterator[str]:
    for file in files:
        for binding in file.bindings:
            leaves = _leaves(binding.value)
            yield from (leaf.name for leaf in leaves if isinstance(leaf, Macro))


def _contains_broken(value: object) -> bool:
    return any(leaf is BROKEN for leaf in _leaves(value))


def _public(value: object) -> list[str]:
    return [name for name in dir(value) if not name.startswith("_")]


def _import_problem(module: str, error: ModuleNotFoundError) -> str:
    """Why `import module` failed: it does not exist, or it needs a package that is missing."""
    missing = error.name or module
    if not (module == missing or module.startswith(f"{missing}.")):
        return f"module {module} cannot be imported: {missing_package(error) or error}"
    root = module.split(".")[0]
    if root in ("t5x", "t5", "seqio"):
        return f"module {module} is not installed; README's table gives T5X's names and ours."
    parent, _, name = missing.rpartition(".")
    siblings: list[str] = []
    if parent:
        paths = getattr(importlib.import_module(parent), "__path__", [])
        siblings = [info.name for info in pkgutil.iter_modules(paths)]
    return f"module {missing} does not exist.{did_you_mean(name, siblings)}"
