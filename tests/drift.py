"""Hold what the course calls in other libraries against the installed versions, without running the course.

    python tests/drift.py    prints what would fail, and exits with 1 if anything would

Names are imported, arguments bound to signatures, and minimum versions read in the source of the called function. What
a name holds is followed through assignments, annotations and calls. A function of the course that is given a dict, or
`**settings`, is read once more for that call, to see which calls take the keys. Nothing is said where that is not
evident, or where a `try` catches the failure.
"""

from __future__ import annotations

import ast
import dis
import functools
import importlib
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections import Counter
from collections.abc import Iterable
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
DISTRIBUTIONS = metadata.packages_distributions()  # what was installed may have another name than its module
FAILURES = {"TypeError", "AttributeError", "ValueError", "ImportError", "ModuleNotFoundError", "Exception", "raises"}
OURS = {  # whose attributes an object has, too: a PeftModel asks its tuner and base, and the course's bases are Llamas
    "PreTrainedModel": [("transformers", "LlamaForCausalLM")],
    "PeftModel": [("peft", "LoraModel"), ("transformers", "LlamaForCausalLM")],
    "PeftMixedModel": [("peft", "LoraModel"), ("transformers", "LlamaForCausalLM")],
    "PreTrainedConfig": [("transformers", "LlamaConfig")],
}
METHODS = types.FunctionType | types.MethodDescriptorType | staticmethod | classmethod
# A name holds one of a list: of the four kinds below, of scopes (our modules), or None (anything).
UNKNOWN: list[Any] = [None]


class Found(NamedTuple):  # a library's module, class or function; `owner`: of a method, the class of its object
    value: Any
    owner: type | None = None


class Instance(NamedTuple):  # an object of a library's class
    cls: type


class Keys(NamedTuple):  # a dict, of which these keys are known
    names: frozenset[str]


class Function(NamedTuple):  # one of the course
    node: ast.FunctionDef
    scope: Scope
    where: str
    returns: list
    bases: list  # of its class, if it is a method


class Miss(NamedTuple):
    library: str
    version: str
    place: str  # a file, or a notebook and [cell], and the line
    what: str

    def __str__(self) -> str:
        return f"{self.library} {self.version}: {self.place}: {self.what}"


class Scope(dict):
    """What each name of a module or function holds; where that is, and the scope around it."""

    def __init__(self, where: str, parent: Scope | None = None) -> None:
        self.where, self.parent = where, parent

    def bind(self, name: str, values: list, maybe: int = 0) -> None:
        self[name] = self.get(name, []) + values if maybe else values

    def look_up(self, name: str) -> list:
        return self[name] if name in self else self.parent.look_up(name) if self.parent else UNKNOWN


@functools.cache
def signature(function: Any) -> inspect.Signature | None:
    """A signature, or None where there is none, as in C, or where a class written in Rust gives a wrong one."""
    if inspect.isclass(function) and not any(map(inspect.isfunction, (function.__init__, function.__new__))):
        return None
    wrapped = getattr(function, "__wrapped__", None)  # a method that was bound twice has lost its first parameter
    try:
        return inspect.signature(wrapped if inspect.ismethod(wrapped) else function)
    except (TypeError, ValueError):
        return None


def refused(callee: Found, positional: int, keywords: set[str], partial: bool) -> set[str]:
    """What a signature says against a call; `partial`: there may be more arguments than these."""
    found, rest, known = set(), dict.fromkeys(keywords), signature(callee.value)
    while known:
        try:
            (known.bind_partial if partial else known.bind)(*[None] * (positional + (callee.owner is not None)), **rest)
            break
        except TypeError as error:
            found.add(f"{name_of(callee.value)}: {error}")
            name = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            if not name:
                break
            del rest[name[1]]
    return found


@functools.cache
def requirements(function: Any) -> list[Requirement]:
    """What a function asks for by `check_NAME_version(minimum)` or `require_version("NAME>=minimum")`."""
    function = inspect.unwrap(function.__init__ if inspect.isclass(function) else function)
    names, found = re.compile(r"check_(\w+)_version|require_version(?:_core)?"), []
    if any(map(names.fullmatch, getattr(getattr(function, "__code__", None), "co_names", ()))):
        for call in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(function)))):
            if isinstance(call, ast.Call) and (name := names.fullmatch(ast.unparse(call.func).split(".")[-1])):
                value = [*call.args, *(keyword.value for keyword in call.keywords)][0]
                text = value.value if isinstance(value, ast.Constant) else function.__globals__.get(ast.unparse(value))
                found += [Requirement(f"{name[1]}>={text}" if name[1] else text)] if isinstance(text, str) else []
    return found


@functools.cache
def attributes(cls: type) -> set[str]:
    """What an object has beside its class's own: what methods of the class or its bases set, or annotations name."""
    methods = [inspect.unwrap(m) for c in cls.__mro__ for m in vars(c).values() if inspect.isfunction(m)]
    names = {step.argval for m in methods for step in dis.get_instructions(m) if step.opname == "STORE_ATTR"}
    return names.union(*(inspect.get_annotations(c) for c in cls.__mro__))


@functools.cache
def relatives(cls: type) -> list[type]:
    """The class and those of OURS; none if its objects may have attributes that no class shows."""
    if cls.__name__ in OURS:
        return [cls, *(getattr(importlib.import_module(module), name) for module, name in OURS[cls.__name__])]
    hidden = cls.__name__.startswith("_") or hasattr(cls, "__getattr__") or not inspect.isfunction(cls.__init__)
    return [] if hidden else [cls]


def name_of(value: Any) -> str:
    return getattr(value, "__qualname__", None) or getattr(value, "__name__", repr(value))


def library_of(value: Any) -> str:
    """The top module of what a library has; "" for Python's own."""
    name = value.__name__ if inspect.ismodule(value) else getattr(value, "__module__", None) or ""
    return "" if name.split(".")[0] in sys.stdlib_module_names else name.split(".")[0]


def instances(kind: Any, owner: type | None = None) -> list:
    """What a value of this type holds; Self or a type variable is the class of the method's object."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        return [value for part in typing.get_args(kind) for value in instances(part, owner)]
    if owner and (isinstance(kind, typing.TypeVar) or "Self" in str(kind)):
        return [Instance(owner)]
    known = inspect.isclass(kind) and library_of(kind)
    return [] if kind is types.NoneType else [Instance(kind)] if known else UNKNOWN


def result(callee: Any) -> list:
    """What a call of this returns."""
    if isinstance(callee, Function) or not isinstance(callee, Found):
        return callee.returns if isinstance(callee, Function) else UNKNOWN
    if inspect.isclass(callee.value):
        return instances(callee.value)
    owner = callee.owner or getattr(callee.value, "__self__", None)
    if name_of(owner).startswith("AutoModel"):  # its annotations do not say it
        return [Instance(importlib.import_module("transformers").PreTrainedModel)]
    kind = getattr(callee.value, "__annotations__", {}).get("return")
    try:
        kind = eval(kind, inspect.unwrap(callee.value).__globals__) if isinstance(kind, str) else kind
    except Exception:  # a name that is imported for type checkers only
        return UNKNOWN
    # Of another library's class a function may return a relative, whatever it promises.
    values = instances(kind, owner if inspect.isclass(owner) else None)
    return [v if v and (v.cls is owner or library_of(v.cls) == library_of(callee.value)) else None for v in values]


def together(*several: list) -> list:
    """The dicts among these values, as one."""
    known = [value.names for values in several for value in values if isinstance(value, Keys)]
    return [Keys(frozenset().union(*known))] if known else UNKNOWN


def parameters(node: ast.FunctionDef) -> list[ast.arg]:
    """The parameters that an argument may name, those that may be positional first."""
    return [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]


class Drift:
    """The `misses` of what was read: `course(name)` a module, `notebook(path)` its cells, and then `finish()`."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root
        self.modules: dict[Path, Scope] = {}
        self.written: dict[str, Scope] = {}  # by %%writefile, in the notebook that is read
        self.later: list[Function] = []  # a function's names are looked up when all is read
        self.misses: dict[Miss, None] = {}
        self.checked: set[str] = set()
        self.left_out: Counter[str] = Counter()
        self.caught = self.maybe = 0  # how deep in a `try` that catches failures, and in an `if`
        self.given: frozenset[str] = frozenset()  # while a function is read for one call: the keys in question,
        self.given_at = ""  # where that call is,
        self.readers: list[ast.FunctionDef] = []  # and the functions on the way

    def notebook(self, path: Path) -> None:
        scope, self.written = Scope(""), {}
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source, here = "".join(cell["source"]), scope
            raises = "raises-exception" in cell["metadata"].get("tags", [])
            if cell["cell_type"] != "code" or raises:
                self.left_out["cells that raise"] += raises
                continue
            if file := re.match(r"%%writefile (?:-a )?\S*?(\w+)\.py\n", source):
                here = self.written.setdefault(file[1], Scope(""))
            here.where = f"{path.relative_to(self.root).as_posix()} [{cell['execution_count']}]"
            self.read(ast.parse(re.sub(r"(?m)^( *)[%!].*", r"\1pass", source)), here)

    def finish(self) -> None:
        while self.later:
            self.body(self.later.pop(), {})

    def body(self, function: Function, given: dict[str, list]) -> None:
        """Read what a function does; its parameters hold what is `given`, or what their annotations say."""
        scope, node = Scope(function.where, function.scope), function.node
        for arg in filter(None, [*parameters(node), node.args.vararg, node.args.kwarg]):
            scope.bind(arg.arg, given.get(arg.arg) or self.kinds(arg.annotation, scope))
        if function.bases and node.args.args:
            scope.bind(node.args.args[0].arg, [*function.bases, None])
        self.each(node.body, scope)

    def follow(self, function: Function, args: list, named: dict, keys: frozenset[str], place: str) -> None:
        """Read a function for one call, which gives it these keys, and maybe dicts as arguments."""
        names = [arg.arg for arg in parameters(function.node)]
        given = {name: together(values) for name, values in [*zip(names, args, strict=False), *named.items()]}
        if rest := function.node.args.kwarg:
            given[rest.arg] = [Keys(keys.difference(names))]
        given = {name: values for name, values in given.items() if values != UNKNOWN}
        asked = frozenset().union(*(known.names for (known,) in given.values()))
        asked = asked & self.given if self.given else asked
        if asked and function.node not in self.readers:
            before = self.given, self.given_at, self.maybe
            self.given, self.given_at, self.maybe = asked, self.given_at or place, 0
            self.readers.append(function.node)
            self.body(function, given)
            self.readers.pop()
            self.given, self.given_at, self.maybe = before

    def miss(self, library: str, place: str, what: str) -> None:
        if library and not self.caught:
            package = DISTRIBUTIONS.get(library, [library])[0]
            self.misses[Miss(package, metadata.version(package), place, what)] = None

    def each(self, nodes: Iterable[ast.AST], scope: Scope) -> None:
        for node in nodes:
            self.read(node, scope)

    def read(self, node: ast.AST, scope: Scope) -> list:
        """Return what an expression holds. A statement binds its names, and each call on the way is checked."""
        place = f"{scope.where}, line {getattr(node, 'lineno', 0)}"
        match node:
            case ast.Import(names=names):
                for name in names:
                    whole, top = self.module(name.name, place), name.name.split(".")[0]
                    scope.bind(name.asname or top, whole if name.asname else self.module(top, place), self.maybe)
            case ast.ImportFrom(module=module, names=names):
                for name in names:
                    ours = self.course(f"{module}.{name.name}")
                    values = ours or self.attribute(self.module(module, place), name.name, place)
                    scope.bind(name.asname or name.name, values, self.maybe)
            case ast.FunctionDef():
                self.function(node, scope, [])
            case ast.ClassDef(name=name, bases=bases, body=body):
                bases = [Instance(v.value) for base in bases for v in self.read(base, scope) if isinstance(v, Found)]
                for part in body:
                    if isinstance(part, ast.FunctionDef):
                        self.function(part, scope, bases or UNKNOWN)
                    else:
                        self.read(part, Scope(scope.where, scope))
                scope.bind(name, UNKNOWN, self.maybe)
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                scope.bind(name, self.read(value, scope), self.maybe)
            case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation, value=ast.expr() as value):
                values = self.read(value, scope)
                scope.bind(name, self.kinds(annotation, scope) if None in values else values, self.maybe)
            case ast.Assign(targets=[ast.Subscript(value=settings, slice=ast.Constant(value=str(key)))], value=value):
                self.read(value, scope)
                if (known := together(self.read(settings, scope))) != UNKNOWN:
                    scope.bind(ast.unparse(settings), together(known, [Keys(frozenset({key}))]))
            case ast.AugAssign(target=ast.Name(id=name), op=ast.BitOr(), value=value):
                scope.bind(name, together(scope.look_up(name), self.read(value, scope)), self.maybe)
            case ast.If(test=test, body=body, orelse=orelse):
                self.read(test, scope)
                self.maybe += 1
                self.each([*body, *orelse], scope)
                self.maybe -= 1
            case ast.Try(handlers=outside) | ast.With(items=outside):
                names = re.findall(r"\w+", " ".join(ast.unparse(part).split("\n")[0] for part in outside))
                caught = not FAILURES.isdisjoint(names) or names == ["except"]
                self.each(outside if isinstance(node, ast.With) else (), scope)
                self.caught += caught
                self.each(node.body, scope)
                self.caught -= caught
                self.each([*outside, *node.orelse, *node.finalbody] if isinstance(node, ast.Try) else (), scope)
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():  # the names first
                self.each(sorted(ast.iter_child_nodes(node), key=lambda part: isinstance(part, ast.expr)), scope)
            case ast.arg(arg=name) | ast.Name(id=name, ctx=ast.Store()):
                scope.bind(name, UNKNOWN, self.maybe)
            case ast.Name(id=name):
                return scope.look_up(name)
            case ast.Attribute(value=value, attr=name, ctx=ast.Load()):
                return self.attribute(self.read(value, scope), name, place)
            case ast.IfExp(test=test, body=body, orelse=orelse):
                self.read(test, scope)
                return self.read(body, scope) + self.read(orelse, scope)
            case ast.Dict(keys=keys, values=values):
                held = [self.read(value, scope) for value in values]
                known = Keys(frozenset(key.value for key in keys if isinstance(key, ast.Constant)))
                return together([known], *(value for key, value in zip(keys, held, strict=True) if key is None))
            case ast.BinOp(left=left, op=ast.BitOr(), right=right) | ast.BoolOp(op=ast.Or(), values=[left, right]):
                return together(self.read(left, scope), self.read(right, scope))
            case ast.Call():
                return self.call(node, scope, place)
            case _:
                self.each(ast.iter_child_nodes(node), scope)
        return UNKNOWN

    def function(self, node: ast.FunctionDef, scope: Scope, bases: list) -> None:
        """Bind a function; `bases`: of its class, if it is a method."""
        self.each([*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)], scope)
        returns = self.kinds(node.returns, scope)
        dicts = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and isinstance(n.value, ast.Dict)]
        if dicts and returns == UNKNOWN:
            returns = [Keys(frozenset(k.value for d in dicts for k in d.keys if isinstance(k, ast.Constant)))]
        function = Function(node, scope, scope.where, returns, bases)
        if not bases:
            scope.bind(node.name, [function], self.maybe)
        if self.given:
            self.body(function, {})
        else:
            self.later.append(function)

    def kinds(self, node: ast.expr | None, scope: Scope) -> list:
        """What a name or a result with this annotation holds."""
        match node:
            case ast.BinOp(left=left, right=right):
                return self.kinds(left, scope) + self.kinds(right, scope)
            case ast.expr() if not isinstance(node, ast.Constant):
                known = [v.value if isinstance(v, Found) else None for v in self.read(node, scope)]
                return [one for kind in known for one in (instances(kind) if kind else UNKNOWN)]
        return [] if node else UNKNOWN

    def course(self, name: str) -> list:
        """A module of the course, which is read and not imported."""
        path = self.root / name.replace(".", "/")
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if name in self.written or name.split(".")[0] != "helpers" or not path.exists():
            return [self.written[name]] if name in self.written else []
        if path not in self.modules:
            self.modules[path] = scope = Scope(path.relative_to(self.root).as_posix())
            self.read(ast.parse(path.read_text(encoding="utf-8")), scope)
        return [self.modules[path]]

    def module(self, name: str, place: str) -> list:
        if ours := self.course(name):
            return ours
        if util.find_spec(name.split(".")[0]) is None:
            self.left_out[f"not installed: {name.split('.')[0]}"] += 1
            return UNKNOWN
        try:
            return [Found(importlib.import_module(name))]
        except Exception as error:  # such as a library that does not go with another one
            self.miss(name.split(".")[0], place, f"import {name}: {type(error).__name__}: {error}")
            return UNKNOWN

    def attribute(self, values: list, name: str, place: str) -> list:
        """What an attribute holds; a miss if all that it may be asked of lack it."""
        held, gone = [], []
        for value in values:
            if isinstance(value, Found) and hasattr(value.value, name):
                held.append(Found(getattr(value.value, name)))
            elif isinstance(value, Found):
                inner = f"{value.value.__name__}.{name}" if hasattr(value.value, "__path__") else "helpers.none"
                held += self.module(inner, place) if inspect.ismodule(value.value) and util.find_spec(inner) else []
                gone.append(value.value)
            elif isinstance(value, Instance):
                classes = relatives(value.cls)
                cls = next((cls for cls in [value.cls, *classes] if hasattr(cls, name)), None)
                raw = inspect.getattr_static(cls, name) if cls else None
                if isinstance(raw, METHODS):
                    owner = None if isinstance(raw, staticmethod | classmethod) else value.cls
                    held.append(Found(getattr(cls, name), owner))
                elif cls or not classes or any(name in attributes(cls) for cls in classes):
                    held += UNKNOWN
                gone.append(value.cls)
            else:
                held += value.get(name, UNKNOWN) if isinstance(value, Scope) else UNKNOWN
        if gone and not held:
            self.miss(library_of(gone[0]), place, f"{name_of(gone[0])} has no {name}")
        return held or UNKNOWN

    def call(self, node: ast.Call, scope: Scope, place: str) -> list:
        callees, args = self.read(node.func, scope), [self.read(arg, scope) for arg in node.args]
        held = [(keyword.arg, self.read(keyword.value, scope)) for keyword in node.keywords]
        named = {name: values for name, values in held if name}
        unpacked = [values for name, values in held if name is None]
        (known,) = together([Keys(frozenset(() if self.given else named))], *unpacked)
        partial = bool(unpacked) or any(isinstance(arg, ast.Starred) for arg in node.args)
        given = sum(not isinstance(arg, ast.Starred) for arg in node.args)
        applied = bool(args) and any(isinstance(c, Found) and c.value is functools.partial for c in callees)
        if applied:
            callees, args, given, partial = args[0], args[1:], given - 1, True
        self.arguments(callees, given, known.names, partial, place)
        functions = [callee for callee in callees if isinstance(callee, Function)]
        for function in functions if not self.caught else ():
            self.follow(function, args, named, known.names, place)
        if applied:
            return functions or UNKNOWN
        return [value for callee in callees for value in result(callee)] or UNKNOWN

    def arguments(self, callees: list, positional: int, keywords: frozenset, partial: bool, place: str) -> None:
        """Check a call: a miss if all that it may be refuse it, or if one asks for another version."""
        if self.given:  # of a body that is read once more only these keys are new
            positional, keywords, partial, place = 0, keywords & self.given, True, self.given_at
            if not keywords:
                return
        against = []
        for callee in callees:
            value = callee.value if isinstance(callee, Found) and callable(callee.value) else None
            if not library_of(value) or not type(value).__hash__:
                against.append(set())
                continue
            self.left_out["calls in a try"] += bool(self.caught)
            self.left_out["calls without a signature"] += signature(value) is None
            self.checked.add(f"{place} {name_of(value)}")
            against.append({(library_of(value), what) for what in refused(callee, positional, keywords, partial)})
            for needs in requirements(value) if not self.given else ():
                if not needs.specifier.contains(there := metadata.version(needs.name), prereleases=True):
                    self.miss(library_of(value), place, f"{name_of(value)} needs {needs}, and {there} is installed")
        for library, what in sorted(set().union(*against)) if all(against) else ():
            self.miss(library, place, what)


def drift(root: Path = ROOT) -> Drift:
    """Read the whole course."""
    found = Drift(root)
    for path in sorted((root / "helpers").rglob("*.py")):
        found.course(".".join(path.relative_to(root).with_suffix("").parts))
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        found.notebook(path)
    found.finish()
    return found


if __name__ == "__main__":
    course = drift()
    print(*course.misses, sep="\n")
    print(f"{len(course.misses)} misses in {len(course.checked)} calls. Left out: {dict(course.left_out)}")
    sys.exit(bool(course.misses))
