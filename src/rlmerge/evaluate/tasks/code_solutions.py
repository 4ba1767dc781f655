"""What is asked of the functions of `code_functions`, and solutions: loops, comprehensions, steps or one expression."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

from rlmerge.evaluate.tasks.code_functions import Spec, evaluate
from rlmerge.evaluate.tasks.splits import END


def asked(spec: Spec, name: str, random: Random) -> str:
    """The description of the function."""
    what = {"number": _ask_number, "condition": _ask_condition, "over": _ask_over, "string": _ask_string}[spec[0]]
    start = random.choice(("Write a function f({}):", "Write f({}):", "Define f({}):"))
    return f"{start.format(name)} {what(spec, name)}"


def solution(spec: Spec, name: str, random: Random) -> str:
    """One of many right solutions, with its working in comments or in named steps."""
    write = {"number": _number, "condition": _condition, "over": _over, "string": _string}[spec[0]]
    lines = write(spec, name, random)
    comments = [f"# {plan}" for plan in _plan(spec, name, random)]
    return "\n".join([*comments, f"def f({name}):", *(f"    {line}" for line in lines)]) + END


def shortest(spec: Spec, name: str) -> str:
    """The function as one expression, without comments: the control."""
    if spec[0] == "number":
        body = _nested(spec[1:], name)
    elif spec[0] == "condition":
        body = f"{_expression(spec[2], name)} if {name} > {spec[1]} else {_expression(spec[3], name)}"
    elif spec[0] == "over":
        body = f"sum({_shown(spec)} for a in {name} if {_test(spec, 'a')}) + {spec[5]}"
    else:
        body = name
        for edit in spec[1:]:
            body = _edited(edit, f"({body})" if "+" in body and edit[0] == "replace" else body)
    return f"def f({name}):\n    return {body}{END}"


def _plan(spec: Spec, name: str, random: Random) -> list[str]:
    """Comment lines: what to do, or what an example comes to; at times both."""
    if spec[0] == "over":
        words = {"odd": "a % 2 is 1", "even": "a % 2 is 0"}.get(spec[2], _test(spec, "a"))
        plans = [
            f"keep a where {words}, then {spec[1]}, then + {spec[5]}",
            f"go through {name}, take what fits, then + {spec[5]}",
        ]
        return [random.choice(plans)]
    if spec[0] == "string":
        example = random.choice(("ab", "xyz", "code", "tree"))
        return [f"{example} becomes {evaluate(spec, example)}"]
    if spec[0] == "condition":
        high, low = spec[1] + random.randint(1, 9), random.randint(0, spec[1])
        shown = [f"f({high}) = {_worked(spec[2], high)}", f"f({low}) = {_worked(spec[3], low)}"]
        return random.choice((shown, shown[::-1], [", ".join(shown)]))
    value, equations = random.randint(1, 9), []
    start = value
    for operation in spec[1:]:
        equations.append(_worked(operation, value))
        value = evaluate(["number", operation], value)
    return [f"f({start}): {', '.join(equations)}"]


def _worked(operation: Sequence[Any], value: int) -> str:
    return f"{value} {operation[0]} {operation[1]} = {evaluate(['number', operation], value)}"


def _ask_number(spec: Spec, name: str) -> str:
    return f"take {name}, " + ", then ".join(_told(operation) for operation in spec[1:]) + ". Return the result."


def _told(operation: Sequence[Any]) -> str:
    return {"+": "add {}", "-": "subtract {}", "*": "multiply by {}"}[operation[0]].format(operation[1])


def _ask_condition(spec: Spec, name: str) -> str:
    above, other = (f"{name} {operator} {constant}" for operator, constant in spec[2:])
    return f"if {name} is greater than {spec[1]}, return {above}, otherwise {other}."


def _ask_over(spec: Spec, name: str) -> str:
    _, reduce, test, value, mapped, last = spec
    which = {">": f"greater than {value}", "<": f"less than {value}", "multiple": f"multiples of {value}"}.get(
        test, test
    )
    each = f", each {mapped[0]} {mapped[1]}" if mapped else ""
    return (
        f"{'count' if reduce == 'count' else 'add up'} the numbers in {name} that are {which}{each}. Then add {last}."
    )


def _ask_string(spec: Spec, name: str) -> str:
    told = []
    for kind, *rest in spec[1:]:
        if kind == "replace":
            told.append(f'replace every "{rest[0]}" with "{rest[1]}"')
        else:
            told.append(f'put "{rest[0]}" at the {kind}')
    return f"take the text {name}, " + ", then ".join(told) + ". Return it."


def _number(spec: Spec, name: str, random: Random) -> list[str]:
    if random.random() < 0.3:
        return [f"return {_nested(spec[1:], name)}"]
    target = name if random.random() < 0.3 else random.choice("yr")
    *before, last = spec[1:]
    lines, current = [], name
    for operation in before:
        lines.append(f"{target} = {_expression(operation, current, random)}")
        current = target
    return [*lines, f"return {_expression(last, current, random)}"]


def _expression(operation: Sequence[Any], name: str, random: Random | None = None) -> str:
    operator, constant = operation
    if random and operator != "-" and random.random() < 0.2:
        return f"{constant} {operator} {name}"
    return f"{name} {operator} {constant}"


def _nested(operations: Sequence[Sequence[Any]], name: str) -> str:
    text, loose = name, False
    for operator, constant in operations:
        text = f"({text})" if loose and operator == "*" else text
        text, loose = f"{text} {operator} {constant}", operator != "*"
    return text


def _condition(spec: Spec, name: str, random: Random) -> list[str]:
    limit = spec[1]
    above, other = (_expression(operation, name, random) for operation in spec[2:])
    style = random.randrange(4)
    if style == 0:
        return [f"return {above} if {name} > {limit} else {other}"]
    if style == 1:
        return [f"if {name} > {limit}:", f"    return {above}", f"return {other}"]
    if style == 2:
        return [f"if {name} <= {limit}:", f"    return {other}", f"return {above}"]
    return [f"if {name} > {limit}:", f"    r = {above}", "else:", f"    r = {other}", "return r"]


def _over(spec: Spec, name: str, random: Random) -> list[str]:
    last = spec[5]
    if random.random() < 0.35:
        return [f"return sum({_shown(spec)} for a in {name} if {_test(spec, 'a')}) + {last}"]
    if random.random() < 0.4:
        kept = f"r = [{_shown(spec) if spec[1] == 'sum' else 'a'} for a in {name} if {_test(spec, 'a')}]"
        return [kept, f"return {'sum' if spec[1] == 'sum' else 'len'}(r) + {last}"]
    start, after = (last, "r") if random.random() < 0.5 else (0, f"r + {last}")
    return [
        f"r = {start}",
        f"for a in {name}:",
        f"    if {_test(spec, 'a')}:",
        f"        r += {_shown(spec)}",
        f"return {after}",
    ]


def _shown(spec: Spec) -> str:
    """What one kept number adds."""
    return "1" if spec[1] == "count" else _expression(spec[4], "a") if spec[4] else "a"


def _test(spec: Spec, name: str) -> str:
    test, value = spec[2:4]
    if test in "<>":
        return f"{name} {test} {value}"
    return f"{name} % {value if test == 'multiple' else 2} == {1 if test == 'odd' else 0}"


def _edited(edit: Sequence[str], name: str) -> str:
    kind, *rest = edit
    if kind == "replace":
        return f'{name}.replace("{rest[0]}", "{rest[1]}")'
    return f'{name} + "{rest[0]}"' if kind == "end" else f'"{rest[0]}" + {name}'


def _string(spec: Spec, name: str, random: Random) -> list[str]:
    if random.random() < 0.4:
        return shortest(spec, name).split("\n")[1].strip().split("\n")
    target = name if random.random() < 0.4 else random.choice("rt" if name == "s" else "rs")
    lines, current = [], name
    for edit in spec[1:]:
        lines.append(f"{target} = {_edited(edit, current)}")
        current = target
    return [*lines, f"return {current}"]
