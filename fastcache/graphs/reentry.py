# SPDX-License-Identifier: Apache-2.0
"""Whether a model's forward may be entered twice in one step, as far as its source shows. No torch.

`fastcache.compile` enters it twice where FirstBlock decides, and what comes before the first block then happens
twice: a counter there would count double, a random draw would differ between the two.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Collection, Iterator

DRAWS = (
    "bernoulli",
    "dropout",
    "multinomial",
    "normal",
    "poisson",
    "rand",
    "randint",
    "randn",
    "randperm",
)


CHANGES = (
    "append",
    "clear",
    "extend",
    "insert",
    "pop",
    "popitem",
    "remove",
    "setdefault",
    "update",
)


def happens_twice(function: Callable, lists: Collection[str]) -> list[str] | None:
    """What `function` changes or draws before it first reads one of the block `lists`, as lines of source.

    None where that is not known: no source, or no such list in it. Called modules are not looked into.
    """
    plain = inspect.unwrap(function)
    try:
        lines, first = inspect.getsourcelines(plain)
        body = ast.parse(textwrap.dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(body, ast.FunctionDef):
        return None
    names = {name.rpartition(".")[2] for name in lists}
    given = {a.arg for a in (*body.args.posonlyargs, *body.args.args, *body.args.kwonlyargs)}
    held = given if plain is function else {"self"}  # diffusers' decorators hand in copies of dicts
    found: list[str] = []
    for statement in _until(body.body, names):
        if statement is None:
            return found
        if any(_outlives(node, given, held) for node in _own(statement)):
            found.append(
                f"line {first + statement.lineno - 1}: {lines[statement.lineno - 1].strip()}"
            )
        # a name that is bound anew no longer means what the caller gave
        given -= {n.id for n in _targets(statement) if isinstance(n, ast.Name)}
    return None


def _until(body: list[ast.stmt], names: set[str]) -> Iterator[ast.stmt | None]:
    """Statements in the order they stand, those inside others after their head; None at the first block."""
    for statement in body:
        if any(_enters(node, names) for node in _own(statement)):
            yield None
        yield statement
        for part in ("body", "orelse", "finalbody"):
            yield from _until(getattr(statement, part, []), names)


def _enters(node: ast.AST, names: set[str]) -> bool:
    """Whether a node loops over a block list or picks from it; asking for its length is neither."""
    part = {ast.For: "iter", ast.comprehension: "iter", ast.Subscript: "value"}.get(type(node))
    read = ast.walk(getattr(node, part)) if part else ()
    return any(isinstance(n, ast.Attribute) and n.attr in names for n in read)


def _own(statement: ast.stmt) -> Iterator[ast.AST]:
    """The nodes of a statement without the statements inside it."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.stmt)]


def _targets(statement: ast.stmt) -> list[ast.expr]:
    if isinstance(statement, ast.Assign | ast.Delete):
        flat = [t.elts if isinstance(t, ast.Tuple | ast.List) else [t] for t in statement.targets]
        return [t for targets in flat for t in targets]
    return [statement.target] if isinstance(statement, ast.AnnAssign | ast.AugAssign) else []


def _outlives(node: ast.AST, given: set[str], held: set[str]) -> bool:
    """Whether a node changes the model or an argument, or draws random numbers.

    given: arguments that are still what the caller gave. held: those of them whose containers are the caller's.
    """
    if isinstance(node, ast.Assign | ast.AnnAssign | ast.Delete):
        return any(not isinstance(t, ast.Name) and _root(t) in given for t in _targets(node))
    if isinstance(node, ast.AugAssign):
        return _root(node.target) in given
    if not isinstance(node, ast.Call):
        return False
    root = _root(node.func)
    called = node.func.attr if isinstance(node.func, ast.Attribute) else root
    if called.removesuffix("_like").rstrip("_") in DRAWS:
        return root != "self"  # a module's dropout rests outside training
    if called in CHANGES:
        return root in given & held
    return called.endswith("_") and not called.startswith("_") and root in given


def _root(node: ast.AST) -> str:
    """`a` of `a.b[0].c`, "" where it starts with something else."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
