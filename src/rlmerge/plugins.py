"""Merge methods of one's own: a function with a decorator, or a `Method`, in a file that `--plugin` names.

    from rlmerge.plugins import Parameter, method

    @method("mean", "the mean of the deltas", parameters=[Parameter("weight", "number", 1.0, "share", per_model=True)])
    def mean(base, deltas, weight):
        return base + weight @ deltas / len(deltas)

A plugin is a program and runs with the rights of who merges. So only the command line and Python name one: a recipe,
which people pass on, cannot.
"""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

import xxhash

from rlmerge.errors import PluginError
from rlmerge.methods import METHODS, get_method
from rlmerge.methods.base import Method, Origin, Parameter
from rlmerge.methods.function import FunctionMethod, Sees, keyword_of, place_of
from rlmerge.parameters import check_value
from rlmerge.recipe_checks import TOP_KEYS

WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
CHOICE = re.compile(r"[\w.-]+")
FILES: set[str] = set()
"""Plugins of this process, as their code objects name them."""


# ---- Writing one --------------------------------------------------------------------------------------------------


def method(
    name: str,
    summary: str,
    *,
    parameters: Sequence[Parameter] = (),
    models: tuple[int, int | None] = (1, None),
    sees: Sees = "changed",
    symmetric: bool = False,
    formula: str = "",
    source: str = "",
) -> Callable[[Callable[..., Any]], FunctionMethod]:
    """Makes a merge method of a function f(base, deltas, **parameters) that returns the merged values.

    summary    what it does, as `rlmerge methods` prints it; formula: by default the first line of f's docstring
    parameters what a recipe may say; f gets them by name (`lambda` as `lambda_`), those `per_model` as arrays [K]
    models     how many experts it takes, from and to; a base is always required
    sees       'changed' (default): base fp64[n] and deltas fp64[K, n] at coordinates that some expert changed, each on
               its own, and all others keep the base; 'every': the same for all; 'tensor': whole tensors in their shape
    symmetric  whether the order of the models means nothing; if not, deltas are in the order of the recipe

    f must be a function of its arguments alone: blocks come in any order, from several threads, and again after a
    kill. It may write into `deltas`, not into `base`. Raises PluginError for what cannot be a method.
    """

    def make(function: Callable[..., Any]) -> FunctionMethod:
        if not inspect.isfunction(function):
            raise PluginError(f"@method makes a method of a function, found {type(function).__name__}.")
        made = FunctionMethod(function, name, summary, parameters, models, sees, symmetric, formula, source)
        _check(made, made.place)
        if sees not in ("changed", "every", "tensor"):
            raise PluginError(f"{made.place}: sees={sees!r}: it is 'changed', 'every' or 'tensor'.")
        keywords = {keyword_of(spec): None for spec in made.parameters}
        try:
            inspect.signature(function).bind(None, None, **keywords)
        except TypeError as error:
            wanted = ", ".join(["base", "deltas", *keywords])
            raise PluginError(
                f"{made.place}: {function.__name__} cannot be called with ({wanted}): {error}. Its arguments are base, "
                "deltas, and the method's parameters by name."
            ) from None
        return made

    if not isinstance(name, str):
        raise PluginError("@method needs a name and a summary: @method('mine', 'what it does').")
    return make


def _check(found: Method, place: str) -> None:
    """Raises PluginError for a method that recipes, pages or the engine could not speak of."""

    def refuse(problem: str) -> None:
        raise PluginError(f"{place}: method {found.name!r}: {problem}")

    for attribute in ("name", "summary", "formula", "source"):
        text = getattr(found, attribute, None)
        if not isinstance(text, str) or not text.strip():
            raise PluginError(f"{place}: a method needs `{attribute}`, a text; found {text!r}.")
    if not WORD.fullmatch(found.name):
        refuse("a name has letters, digits and underscores, and begins with a letter.")
    low, high = found.arity.minimum, found.arity.maximum
    if low < 1 or (high is not None and high < low):
        refuse(f"it cannot take {low} to {'any number of' if high is None else high} models.")
    if found.grain not in ("element", "row", "matrix"):
        refuse(f"grain {found.grain!r} is none of element, row, matrix.")
    seen: set[str] = set()
    for spec in found.parameters:
        if not isinstance(spec, Parameter):
            refuse(f"parameters are Parameter('name', 'number', default, 'meaning'), found {spec!r}.")
        if not WORD.fullmatch(spec.name) or spec.name in seen:
            refuse(f"a parameter cannot be called {spec.name!r}" + (" twice." if spec.name in seen else "."))
        if spec.name in TOP_KEYS or spec.name == "int8_mask":
            refuse(f"parameter {spec.name!r} has the name of a key of recipes: take another one.")
        seen.add(spec.name)
        if problem := _misfit(spec):
            refuse(f"parameter {spec.name!r}: {problem}")


def _misfit(spec: Parameter) -> str:
    """What is wrong with a parameter's own definition; '' if nothing."""
    if spec.kind not in ("number", "integer", "flag", "choice"):
        return f"kind {spec.kind!r} is none of number, integer, flag, choice."
    if (spec.kind == "choice") != bool(spec.choices):
        return "a choice has `choices`, and nothing else has."
    if not all(isinstance(choice, str) and CHOICE.fullmatch(choice) for choice in spec.choices):
        return "choices are words of letters, digits, '.', '-' and '_'."
    if not isinstance(spec.doc, str) or not spec.doc.strip():
        return "its meaning is missing: Parameter(name, kind, default, 'meaning')."
    if spec.default is not None:
        try:
            check_value(spec, spec.default)
        except ValueError as error:
            return f"its default is none: {error}."
    return ""


# ---- Loading -------------------------------------------------------------------------------------------------------


class Registry(Mapping[str, Method]):
    """All methods by name: rlmerge's own, imported when they are asked for, and those of plugins."""

    def __init__(self, own: Mapping[str, Method]) -> None:
        self.own = dict(own)

    def __getitem__(self, name: str) -> Method:
        if name in self.own:
            return self.own[name]
        if name in METHODS:
            return get_method(name)
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted({*self.own, *METHODS}))

    def __len__(self) -> int:
        return len({*self.own, *METHODS})


def load_plugins(*files: Path | str) -> Registry:
    """Runs these Python files. All methods by name, theirs and rlmerge's: for `methods=` of `load_recipe` and others.

    Raises PluginError, with file and line, for what cannot be run and for a name that is taken.
    """
    own: dict[str, Method] = {}
    homes: dict[str, str] = {}
    for file in dict.fromkeys(map(str, files)):
        module, digest = _run(file)
        for found in _methods_of(module, file):
            if found.name in METHODS or found.name in own:
                whose = homes.get(found.name, "rlmerge")
                raise PluginError(
                    f"{file}: method {found.name!r} is there already, in {whose}: a recipe could not say which of them "
                    "it means. Give it another name."
                )
            found.origin = Origin(Path(file).name, digest)
            own[found.name], homes[found.name] = found, file
    return Registry(own)


def _run(file: str) -> tuple[ModuleType, str]:
    """The file as a module, and the hash of its bytes."""
    try:
        source = Path(file).read_bytes()
    except (OSError, ValueError) as error:
        raise PluginError(f"--plugin {file}: cannot be read: {getattr(error, 'strerror', error)}.") from None
    digest = xxhash.xxh3_128_hexdigest(source)
    module = ModuleType(f"rlmerge_plugin_{digest}")
    module.__file__ = file
    sys.modules[module.__name__] = module  # dataclasses look their module up
    linecache.checkcache(file)
    FILES.add(file)
    try:
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    except PluginError:
        raise
    except (SyntaxError, ValueError) as error:  # ValueError: a null byte, before Python 3.12
        if place := place_of(error, {file}):
            raise PluginError(f"{place}: the plugin cannot be run: {type(error).__name__}: {error}") from error
        line = getattr(error, "lineno", None)
        raise PluginError(f"{file}:{line or 1}: this is no Python: {getattr(error, 'msg', error)}.") from None
    except (Exception, SystemExit) as error:
        place = place_of(error, {file}) or file
        raise PluginError(f"{place}: the plugin cannot be run: {type(error).__name__}: {error}") from error
    return module, digest


def _methods_of(module: ModuleType, file: str) -> list[Method]:
    """What a plugin defines; methods of rlmerge that it merely uses are none of its own."""
    values = list({id(value): value for value in vars(module).values()}.values())
    found = [value for value in values if isinstance(value, Method)]
    found = [value for value in found if value.name not in METHODS or get_method(value.name) is not value]
    for value in found:
        _check(value, file)
    if not found:
        classes = [value.__name__ for value in values if isinstance(value, type) and issubclass(value, Method)]
        own = [name for name in classes if getattr(module, name).__module__ == module.__name__]
        hint = f"write METHOD = {own[0]}()" if own else "decorate a function with @method (from rlmerge.plugins)"
        raise PluginError(f"{file}: defines no merge method: {hint}.")
    return found


class BesidePlugins:
    """A standard output of which plugins see nothing: what they print goes to stderr, whoever calls them, so that
    what a command prints stays what it says it is.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        try:
            frame = sys._getframe(1)
        except ValueError:  # the interpreter itself, at its end
            frame = None
        while frame is not None:
            if frame.f_code.co_filename in FILES:
                return getattr(sys.stderr, name)
            frame = frame.f_back
        return getattr(self._stream, name)


# ---- What became of one --------------------------------------------------------------------------------------------


def origin_of(found: Method) -> Origin | None:
    """Where a method comes from that is not rlmerge's own, and the hash of its source; None for rlmerge's."""
    if found.origin is not None or (found.name in METHODS and get_method(found.name) is found):
        return found.origin
    code = found.function if isinstance(found, FunctionMethod) else type(found)
    try:
        text = inspect.getsource(code)
    except (OSError, TypeError):  # made at a prompt
        inner = getattr(code, "__code__", None)
        text = f"{code.__qualname__} {inner and (inner.co_code, inner.co_names)}"
    return Origin("", xxhash.xxh3_128_hexdigest(text.encode()))


def blame(error: BaseException) -> str:
    """The message for an error that a plugin's code raised or led to; '' if none did."""
    place = place_of(error, FILES)
    if not place:
        return ""
    file, _, line = place.rpartition(":")
    return f"{place}: {type(error).__name__}: {error}\n  {linecache.getline(file, int(line)).strip()}"
