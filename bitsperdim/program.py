"""What a program does, read from its texts before it runs: arithmetic from the jaxpr, traffic from the compiled HLO.

XLA's own cost analysis counts the body of a loop once, however often it runs; here it counts as often as it does.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jax.extend import core

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "token": 0}  # of types whose names do not end with them
COMPUTATION = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<rest>.*)")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One instruction by which devices exchange arrays."""

    kind: str  # one of KINDS
    bytes: int  # on each device: of its result, or of its operands where they are larger
    times: int  # that a run of the program meets it
    source: str  # where in the traced program it comes from
    shapes: tuple[tuple[int, ...], ...]  # of the arrays of its result: the compiler joins those of many operations


def flops(jaxpr: core.Jaxpr) -> int:
    """Of all matrix products and convolutions, over all devices; a product and its sum are two operations.

    Of a `cond` the most expensive branch counts; of a `while_loop`, whose rounds nobody knows, one round.
    """

    def of_one(name: str, params: Mapping[str, Any], shapes: list[Any]) -> int:
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            return 2 * math.prod(shapes[0].shape[axis] for axis in contracted) * shapes[-1].size
        outputs = shapes[1].shape[params["dimension_numbers"].rhs_spec[0]]
        # Zeros between the inputs, which a gradient of strides has, are no work for a good library.
        skipped = math.prod(params["lhs_dilation"])
        return 2 * (shapes[1].size // outputs) * shapes[-1].size // skipped

    return _over_products(jaxpr, of_one)


def product_bytes(jaxpr: core.Jaxpr) -> int:
    """That all matrix products and convolutions read and write, over all devices; counted as `flops` are.

    What a step moves between chip and memory where everything else is fused into them: the least that it can be.
    """
    size = lambda shape: shape.size * shape.dtype.itemsize
    return _over_products(jaxpr, lambda name, params, shapes: sum(map(size, shapes)))


def _over_products(jaxpr: core.Jaxpr, of_one: Callable[[str, Mapping[str, Any], list[Any]], int]) -> int:
    """The sum of `of_one` (name, parameters, shapes of the inputs and of the output) of each product."""
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name in ("dot_general", "conv_general_dilated"):
            total += of_one(name, params, [value.aval for value in (*equation.invars, *equation.outvars)])
            continue
        inner = [_over_products(inside, of_one) for inside in core.jaxprs_in_params(params)]
        total += params.get("length", 1) * (max(inner, default=0) if name == "cond" else sum(inner))
    return total


def collectives(hlo: str) -> list[Collective]:
    """Those of a compiled program, from its text (`compiled.as_text()`)."""
    computations, entry = _computations(hlo)
    found: list[Collective] = []

    def walk(name: str, times: int) -> None:
        held: dict[str, int] = {}
        for line in computations[name]:
            if (instruction := INSTRUCTION.match(line)) is None:
                continue
            held[instruction["name"]] = result = _num_bytes(instruction["type"])
            kind = instruction["op"].removesuffix("-start")
            if kind in KINDS:
                operands = re.findall(r"%([\w.\-]+)", instruction["rest"].split(")")[0])
                size = max(result, sum(held.get(operand, 0) for operand in operands))
                source = re.search(r'op_name="([^"]*)"', line)
                shapes = tuple(_shape(sizes) for _, sizes in ARRAY.findall(instruction["type"]))
                found.append(Collective(kind, size, times, source[1] if source else "", shapes))
            trips = TRIPS.search(line) if instruction["op"] == "while" else None
            for called in _called(line):
                walk(called, times * int(trips[1]) if trips else times)

    walk(entry, 1)
    return found


def traffic(hlo: str) -> Mapping[str, dict[str, int]]:
    """{kind: {'bytes': on each device in a run of the program, 'count': how often}}, the heaviest kind first."""
    total: dict[str, dict[str, int]] = {}
    for one in collectives(hlo):
        of_kind = total.setdefault(one.kind, {"bytes": 0, "count": 0})
        of_kind["bytes"] += one.bytes * one.times
        of_kind["count"] += one.times
    return dict(sorted(total.items(), key=lambda item: -item[1]["bytes"]))


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the entry."""
    found: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in hlo.splitlines():
        if not line.startswith(" ") and (head := COMPUTATION.match(line)):
            lines = found.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif line.startswith(" "):
            lines.append(line)
    return found, entry


def _called(line: str) -> Iterator[str]:
    yield from CALLED.findall(line)
    for branches in BRANCHES.findall(line):
        yield from re.findall(r"%?([\w.\-]+)", branches)


def _num_bytes(text: str) -> int:
    """Of an array or a tuple of arrays, such as 'f32[8,128]{1,0}'."""
    total = 0
    for name, sizes in ARRAY.findall(text):
        digits = re.search(r"\d+", name)  # f32, bf16, s8, f8e4m3
        bits = BITS[name] if name in BITS else int(digits[0]) if digits else 0
        total += bits * math.prod(_shape(sizes)) // 8
    return total


def _shape(sizes: str) -> tuple[int, ...]:
    """Of '8,128', or of '' for a scalar."""
    return tuple(int(size) for size in sizes.split(",") if size)
