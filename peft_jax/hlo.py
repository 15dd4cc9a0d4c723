"""What devices say to each other in a compiled program, read off its text.

    for c in sharding.collectives(step.lower(state, frozen, batch).compile()):
        print(c.kind, c.arrays, c.times * c.bytes)

A program for a mesh is one for each device, into which the compiler has put collectives.  Those in a loop (the layers
of a scanned model) run as often as it does, which the program's text says.
"""

import collections
import math
import re
from typing import Any, NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_OP = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(KINDS)})(-start|-done)?\(")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")
_CALL = re.compile(r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')


class Collective(NamedTuple):
    """One collective of a program.

    kind      'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute' or 'collective-broadcast'
    arrays    what each device has of it afterwards: ``("u8[64,2048]",)``; several where the compiler has joined some
    bytes     of these
    times     how often it runs in one call of the program
    devices   how many take part in one exchange
    where     the place in the traced program, the parts between slashes that name it
    """

    kind: str
    arrays: tuple[str, ...]
    bytes: int
    times: int
    devices: int
    where: str


def collectives(compiled: Any) -> list[Collective]:
    """The collectives of a compiled program (`jax.stages.Compiled`, or its text), in its order.

    A loop whose length the compiler does not know counts once.

    >>> import jax, jax.numpy as jnp
    >>> from peft_jax import sharding
    >>> sharding.collectives(jax.jit(lambda x: x + 1).lower(jnp.ones(8)).compile())
    []
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    lines: list[tuple[str, str]] = []  # the computation that a line is in, and the line
    inside = entry = ""
    for line in text.splitlines():
        if line.rstrip().endswith("{") and "->" in line:
            inside = line.removeprefix("ENTRY ").strip().lstrip("%").split(" ", 1)[0]
            entry = inside if line.startswith("ENTRY ") else entry
        lines.append((inside, line))
    calls: dict[str, list[tuple[str, int]]] = collections.defaultdict(list)
    for caller, line in lines:
        trips = int(found[1]) if (found := _TRIPS.search(line)) else 1
        called = _CALL.findall(line) + [
            n.strip().lstrip("%") for n in ",".join(_BRANCHES.findall(line)).split(",") if n
        ]
        calls[caller] += [(name, trips) for name in called]
    times: dict[str, int] = collections.defaultdict(int)

    def visit(name: str, often: int) -> None:
        times[name] += often
        for inner, trips in calls[name]:
            visit(inner, often * trips)

    visit(entry, 1)
    return [_read(line, times[inside]) for inside, line in lines if (m := _OP.search(line)) and m[3] != "-start"]


def _read(line: str, times: int) -> Collective:
    found = _OP.search(line)
    assert found is not None
    arrays = _ARRAY.findall(found[1])
    size = sum(math.prod(int(n) for n in shape.split(",") if n) * _bits(kind) for kind, shape in arrays) // 8
    name = _NAME.search(line)
    return Collective(
        found[2],
        tuple(f"{kind}[{shape}]" for kind, shape in arrays),
        size,
        times,
        _group(line),
        name[1] if name else "",
    )


def _bits(kind: str) -> int:
    return 8 if kind == "pred" else int(re.sub(r"^[a-z]+(\d+).*", r"\1", kind))


def _group(line: str) -> int:
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(iota[1])
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", line):
        return listed[1].count(",") + 1
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):  # a part of an axis: 'a':(1)2
        sizes = dict(re.findall(r"('\w+')=(\d+)", named[1]))
        return math.prod(int(part or sizes[axis]) for axis, part in re.findall(r"('\w+')(?::\(\d+\)(\d+))?", named[2]))
    return 2 if "source_target_pairs" in line else 0
