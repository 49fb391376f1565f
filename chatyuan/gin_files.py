"""Reads gin files and `--gin.` flags into bindings that remember where they were written.

Nothing is imported, checked or built here (see `gin_check`), and nothing of gin's global state is
touched: gin lends its grammar only. T5X's names are translated while reading.
"""

import dataclasses
import os
import pathlib
import re
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence

from chatyuan.errors import UserError, did_you_mean
from gin import config_parser

REQUIRED = "gin.REQUIRED"
MAX_SYNTAX_ERRORS = 5  # per file; after that the parser is most likely lost

# T5X's macros -> ours, where both mean the same.
T5X_MACROS = {
    "MIXTURE_OR_TASK_NAME": "MIXTURE",
    "INITIAL_CHECKPOINT_PATH": "INIT_FROM",
    "CHECKPOINT_PATH": "INIT_FROM",
    "EVAL_OUTPUT_DIR": "MODEL_DIR",
    "INFER_OUTPUT_DIR": "MODEL_DIR",
    "RANDOM_SEED": "SEED",
}
T5X_LENGTHS = "TASK_FEATURE_LENGTHS"
# T5X's macros without a counterpart -> why nothing uses them here.
T5X_WITHOUT_COUNTERPART = {
    "LOSS_NORMALIZING_FACTOR": "T5X's macro has no counterpart: losses are per target token.",
    "MIXTURE_OR_TASK_MODULE": "T5X's macro is cache.Config.task_modules = ('MODULE',) here.",
    "USE_CACHED_TASKS": "T5X's macro has no counterpart: tasks are always read from CACHE_DIR.",
}


@dataclasses.dataclass(frozen=True)
class Macro:
    """`%NAME` in a value."""

    name: str


@dataclasses.dataclass(frozen=True)
class Reference:
    """`@scope/module.Name` in a value; with `()`, `evaluate` is true."""

    scope: str
    selector: str
    evaluate: bool


@dataclasses.dataclass(eq=False)
class GinFile:
    """One file, or all the flags of a command line, with the files that it includes."""

    name: str
    path: pathlib.Path | None = None
    imports: list[config_parser.ImportStatement] = dataclasses.field(default_factory=list)
    bindings: list["Binding"] = dataclasses.field(default_factory=list)
    includes: list["GinFile"] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator["GinFile"]:
        """Yields this file and everything that it includes, each once."""
        seen: set[int] = set()
        queue = [self]
        while queue:
            file = queue.pop(0)
            if id(file) not in seen:
                seen.add(id(file))
                yield file
                queue.extend(file.includes)


@dataclasses.dataclass(eq=False)
class Binding:
    """`scope/selector.parameter = value`, or a macro when `selector` is empty."""

    scope: str
    selector: str
    parameter: str
    value: object
    place: str
    file: GinFile

    @property
    def written(self) -> str:
        """The left side as the user wrote it."""
        name = f"{self.selector}.{self.parameter}" if self.selector else self.parameter
        return f"{self.scope}/{name}" if self.scope else name


class _Delegate(config_parser.ParserDelegate):
    """Keeps references and macros as they are written."""

    def configurable_reference(self, scoped_configurable_name: str, evaluate: bool) -> Reference:
        scope, _, selector = scoped_configurable_name.rpartition("/")
        return Reference(scope, selector, evaluate)

    def macro(self, macro_name: str) -> Macro:
        return Macro(macro_name)


def binding(key: str, value: object, place: str, file: GinFile) -> Binding:
    """Splits `key`, written as on the left of a gin binding, and returns the binding."""
    scope, selector, parameter = config_parser.parse_binding_key(key)
    return _make_binding(scope, selector, parameter, value, place, file)


def _make_binding(
    scope: str, selector: str, parameter: str, value: object, place: str, file: GinFile
) -> Binding:
    if not parameter:  # a macro: its scope belongs to its name
        name = f"{scope}/{selector}" if scope else selector
        return Binding("", "", name, value, place, file)
    return Binding(scope, selector, parameter, value, place, file)


class Reader:
    """Finds and reads files; collects every problem in `problems` and every note in `notes`.

    Args:
        root: the repository's root, searched after the current directory.
        search_paths: further directories to search.
    """

    def __init__(self, root: pathlib.Path, search_paths: Sequence[str] = ()) -> None:
        self.root = root
        self.folders = [pathlib.Path.cwd(), root, *map(pathlib.Path, search_paths)]
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.skip: set[pathlib.Path] = set()

    def read(self, name: str, asked_by: str, rename: bool = True) -> GinFile | None:
        """Returns the file `name` and its includes, or None with the reason in `problems`.

        Args:
            name: path as written by the user.
            asked_by: what names the file, for messages.
            rename: whether T5X's macros are translated to ours.
        """
        return self._read(name, asked_by, rename, {}, ())

    def _read(
        self,
        name: str,
        asked_by: str,
        rename: bool,
        loaded: dict[pathlib.Path, GinFile],
        stack: tuple[pathlib.Path, ...],
    ) -> GinFile | None:
        path = self._find(name)
        if path is None:
            near = did_you_mean(name, self._known_files())
            folders = ", ".join(dict.fromkeys(map(str, self.folders)))
            self.problems.append(f"{asked_by}  file {name} not found (in {folders}).{near}")
            return None
        if path in stack:
            self.problems.append(f"{asked_by}  {name} includes itself.")
            return None
        if path in self.skip or path in loaded:
            return loaded.get(path)
        file = loaded[path] = GinFile(self._display(path), path)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            self.problems.append(f"{asked_by}  {name} cannot be read: {error}.")
            return file
        for statement in self._statements(text, file.name):
            place = f"{file.name}:{statement.location.line_num}"
            if isinstance(statement, config_parser.ImportStatement):
                file.imports.append(statement)
            elif isinstance(statement, config_parser.IncludeStatement):
                included = self._read(statement.filename, place, rename, loaded, (*stack, path))
                file.includes += [included] if included else []
            elif isinstance(statement, config_parser.BindingStatement):
                new = _make_binding(
                    statement.scope,
                    statement.selector,
                    statement.arg_name,
                    statement.value,
                    place,
                    file,
                )
                file.bindings += self._from_t5x(new) if rename else [new]
        return file

    def read_flags(self, flags: Sequence[str] | Mapping[str, object]) -> GinFile:
        """Reads `NAME=VALUE` strings as gin text, or a mapping of names to Python values."""
        file = GinFile("--gin")
        if isinstance(flags, Mapping):
            pairs = [(str(name), value, f"--gin.{name}") for name, value in flags.items()]
        else:
            pairs = [pair for flag in flags if (pair := self._split_flag(flag))]
        for name, value, place in pairs:
            if re.fullmatch(r"(\w+/)*[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", name):
                file.bindings += self._from_t5x(binding(name, value, place, file))
            else:
                self.problems.append(f"{place}  {name!r} is not a name; write --gin.NAME=VALUE.")
        return file

    def _split_flag(self, flag: str) -> tuple[str, object, str] | None:
        name, equals, text = flag.partition("=")
        if not equals:
            self.problems.append(f"--gin.{flag}  has no value; write --gin.{flag}=VALUE.")
            return None
        try:
            return name, parse_word(text), f"--gin.{name}"
        except SyntaxError as error:
            self.problems.append(f"--gin.{name}  = {text} is not gin: {_first_line(error)}")
            return None

    def _from_t5x(self, new: Binding) -> list[Binding]:
        """Translates a binding from T5X's macros to ours; leaves the others alone."""
        new.value = _rename_macros(new.value)
        if new.selector or new.parameter not in (*T5X_MACROS, T5X_LENGTHS):
            return [new]
        if new.parameter != T5X_LENGTHS:
            ours = T5X_MACROS[new.parameter]
            self.notes.append(f"{new.place}: T5X's {new.parameter} is read as {ours}.")
            new.parameter = ours
            return [new]
        if not isinstance(new.value, dict) or set(new.value) - {"inputs", "targets"}:
            self.problems.append(
                f"{new.place}  {T5X_LENGTHS} = {show(new.value)} should be "
                "{'inputs': LENGTH, 'targets': LENGTH}; or set INPUT_LENGTH and TARGET_LENGTH."
            )
            return []
        ours = {"inputs": "INPUT_LENGTH", "targets": "TARGET_LENGTH"}
        names = " and ".join(ours.values())
        self.notes.append(f"{new.place}: T5X's {T5X_LENGTHS} is read as {names}.")
        return [
            dataclasses.replace(new, parameter=ours[key], value=length)
            for key, length in new.value.items()
        ]

    def _statements(self, text: str, name: str) -> Iterator[tuple]:
        """Yields what the parser makes of `text`, going on after a syntax error."""
        errors = 0
        try:
            parser = config_parser.ConfigParser(text, _Delegate())
            while errors < MAX_SYNTAX_ERRORS:
                try:
                    statement = parser.parse_statement()
                except SyntaxError as error:
                    if isinstance(error, IndentationError):
                        raise
                    errors += 1
                    self._syntax_problem(error, name)
                    parser.advance_one_line()
                    continue
                if statement is None:
                    return
                yield statement
        except (SyntaxError, tokenize.TokenError) as error:
            self._syntax_problem(error, name)
        except StopIteration:  # the error was on the last line
            return

    def _syntax_problem(self, error: Exception, name: str) -> None:
        if isinstance(error, SyntaxError):
            line, content = error.lineno, (error.text or "").strip()
        else:  # tokenize: (message, (line, column))
            line, content = error.args[1][0], ""
        shown = f"  [{content}]" if content else ""
        self.problems.append(f"{name}:{line}  {_first_line(error)}{shown}")

    def _find(self, name: str) -> pathlib.Path | None:
        for folder in self.folders:
            path = folder / os.path.expanduser(name)
            if path.is_file():
                return path.resolve()
        return None

    def _known_files(self) -> list[str]:
        folders = [folder / "gin" for folder in dict.fromkeys(self.folders)]
        files = [path for folder in folders for path in folder.glob("**/*.gin")]
        return [self._display(path) for path in files]

    def _display(self, path: pathlib.Path) -> str:
        """The shortest path that the user can open."""
        for folder in (self.root, pathlib.Path.cwd()):
            if path.is_relative_to(folder.resolve()):
                return str(path.relative_to(folder.resolve()))
        return str(path)


def parse_word(text: str) -> object:
    """Reads the value of a flag: gin where it is gin, otherwise the bare word itself.

    Raises:
        SyntaxError: the value opens a bracket, a quote, a reference or a macro and is not gin.
    """
    text = text.strip()
    if text[:1] not in tuple("{([@%'\""):
        if text == "~" or text.startswith("~/"):  # the shell expands it only after a space
            return os.path.expanduser(text)
        if not text or "#" in text or "\n" in text:
            return text
    try:
        parser = config_parser.ConfigParser(text, _Delegate())
        value = parser.parse_value()
        parser._skip_whitespace_and_comments()  # what gin.parse_value does too
        if parser.current_token.type not in (tokenize.NEWLINE, tokenize.ENDMARKER):
            raise SyntaxError("something follows the value.")
        return _rename_macros(value)
    except (SyntaxError, tokenize.TokenError) as error:
        if text[0] in "{([@%'\"":
            raise SyntaxError(_first_line(error)) from error
        return text


def show(value: object) -> str:
    """Formats a value as gin would read it."""
    if isinstance(value, Macro):
        return f"%{value.name}"
    if isinstance(value, Reference):
        scope = f"{value.scope}/" if value.scope else ""
        return f"@{scope}{value.selector}{'()' if value.evaluate else ''}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{show(k)}: {show(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(show, value)) + "]"
    if isinstance(value, tuple):
        return "(" + ", ".join(map(show, value)) + ("," if len(value) == 1 else "") + ")"
    return repr(value)


def mapped(value: object, leaf: Callable[[object], object]) -> object:
    """Applies the function `leaf` to everything in `value` that is not a container."""
    if isinstance(value, dict):
        return {mapped(k, leaf): mapped(v, leaf) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(mapped(item, leaf) for item in value)
    return leaf(value)


def print_notes(notes: Sequence[str]) -> None:
    """Prints notes on stderr, one line each."""
    for note in notes:
        print(f"Note: {note}", file=sys.stderr)


def report(problems: Sequence[str]) -> UserError:
    """Returns one error with every problem on a line of its own."""
    return UserError("\n".join(["Bad gin config:", *(f"  - {p}" for p in dict.fromkeys(problems))]))


def _rename_macros(value: object) -> object:
    def leaf(item: object) -> object:
        return Macro(T5X_MACROS.get(item.name, item.name)) if isinstance(item, Macro) else item

    return mapped(value, leaf)


def _first_line(error: Exception) -> str:
    token = re.search(r"Failed to parse token '(.*)'$", str(error.args[0]), re.DOTALL)
    if token:
        return f"{token.group(1)} is not a value; a string needs quotes."
    message = str(error.args[0]).strip().split("\n")[0].rstrip(" .")
    return f"{message}."
