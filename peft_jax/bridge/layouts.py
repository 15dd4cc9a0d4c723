"""Which axes of a kernel its function sums over, which it keeps, and which are layers: read off a trace.

The interpreter runs once more, abstractly, with every parameter followed as an array of unknown axes.  What it meets is
noted and not computed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from peft_jax.bridge.follow import Axis, Followed, NotFollowed, Nothing
from peft_jax.bridge.interpret import Interpreter
from peft_jax.core import Path, Spec, dotted
from peft_jax.views import View
from peft_jax.weights import Leaf, static

# The last words of a path that a matrix's name leaves out, as it leaves out "kernel" and "embedding".
PLAIN = ("weight", "w")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Probed(Followed):
    """A parameter of unknown axes, and without numbers; `sliced` are the axes taken out by layers so far, and `loop`
    what took them."""

    sliced: tuple[int, ...] = static(default=())
    loop: int = static(default=0)

    def array(self) -> Array:
        return jnp.zeros(self.shape, self.dtype)

    def layer(self, axis: Axis, take: Callable[[Array, int], Array]) -> "Followed":
        return self._without(axis, 0)

    def step(self, eqn: Any) -> "Followed":
        if len(self.dims[0]) != 1 or len(self.dims[0][0].place) != 1:
            raise NotFollowed("it is sliced along no axis of its own")
        return self._without(self.dims[0][0], id(eqn))

    def without(self, axis: Axis) -> "Followed":
        return self.to(tuple(tuple(a for a in dim if a != axis) for dim in self.dims))

    def _without(self, axis: Axis, loop: int) -> "Followed":
        if len(self.dims[0]) == 1 and self.dims[0][0] == axis:
            dims = self.dims[1:] if loop else ((), *self.dims[1:])
        else:
            dims = tuple(tuple(a for a in dim if a != axis) for dim in self.dims)
        return self.to(dims, sliced=(*self.sliced, axis.place[0]), loop=loop)


class Use(NamedTuple):
    """One use of a parameter: its own axes that are layers, that are summed over or looked up, and that are kept."""

    kind: str  # "product", "rows" or "other"
    layers: tuple[int, ...]
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    loop: int = 0


class Layout(NamedTuple):
    """How a parameter is used.  Without `inputs` it is no matrix."""

    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    rows: bool
    loop: int


Note = Callable[[Followed, Use], None]


def prober(uses: dict[str, list[Use]]) -> Interpreter:
    """An interpreter that notes the uses of `Probed` parameters, by path."""

    def note(value: Any, kind: str, layers: Sequence[Axis] = (), sums: Sequence[Axis] = (), keeps: Sequence[Axis] = ()):
        own = lambda axes: tuple(sorted({axis.place[0] for axis in axes}))  # noqa: E731
        use = Use(kind, (*value.sliced, *own(layers)), own(sums), own(keeps), value.loop)
        uses.setdefault(value.path, []).append(use)

    def give_up(where: Sequence[Any], value: Followed, why: str) -> None:
        note(value, "other")

    def product(eqn: Any, values: list[Any]) -> list[Any]:
        contracted, batched = eqn.params["dimension_numbers"]
        for side, value in enumerate(values):
            if isinstance(value, Probed):
                axes = lambda dims, value=value: [axis for i in dims for axis in value.dims[i]]  # noqa: E731
                taken = (*batched[side], *contracted[side])
                free = [i for i in range(len(value.dims)) if i not in taken]
                note(value, "product", axes(batched[side]), axes(contracted[side]), axes(free))
        return nothing_of(eqn)

    def gather(eqn: Any, values: list[Any]) -> list[Any]:
        table, places = values
        cut = [i for i, size in enumerate(eqn.params["slice_sizes"]) if isinstance(table, Probed) and size == 1]
        cut = [i for i in cut if table.shape[i] > 1]
        if isinstance(places, Probed) or len(cut) != 1:
            raise NotFollowed("")
        note(table, "rows", (), table.dims[cut[0]], [a for i, d in enumerate(table.dims) if i != cut[0] for a in d])
        return nothing_of(eqn)

    def cut_out(eqn: Any, values: list[Any]) -> list[Any]:
        value, *starts = values
        if not isinstance(value, Probed) or any(isinstance(start, Probed) for start in starts):
            raise NotFollowed("")
        cut = [i for i, size in enumerate(eqn.outvars[0].aval.shape) if size != value.shape[i]]
        if len(cut) != 1 or eqn.outvars[0].aval.shape[cut[0]] != 1 or len(value.dims[cut[0]]) != 1:
            raise NotFollowed("")
        if sum(len(dim) for dim in value.dims) == 2 and starts:
            # One row of a matrix, or one layer of stacked vectors: a matrix's place is most often a number of its own.
            note(value, "rows", (), value.dims[cut[0]], [a for i, d in enumerate(value.dims) if i != cut[0] for a in d])
            return nothing_of(eqn)
        return [value.layer(value.dims[cut[0]][0], lambda x, at: x)]

    using = {"dot_general": product, "gather": gather, "dynamic_slice": cut_out, "slice": cut_out}
    return Interpreter(give_up, using, lambda eqn, values: nothing_of(eqn))


def nothing_of(eqn: Any) -> list[Any]:
    """Results of an equation's types."""

    def zeros(of: Any) -> Array:
        x = jnp.zeros(of.shape, of.dtype)
        varying = tuple(of.manual_axis_type.varying)
        return jax.lax.pcast(x, varying, to="varying") if varying else x

    return [zeros(v.aval) for v in eqn.outvars]


def probe(path: str, shape: Sequence[int], dtype: Any) -> Probed:
    dims = tuple((Axis("own", (i,), size),) for i, size in enumerate(shape))
    return Probed(Nothing(), dims, jnp.dtype(dtype), path)


def layout(uses: Sequence[Use], shape: Sequence[int]) -> Layout:
    """What all uses of a parameter agree on."""
    layers = {use.layers for use in uses}
    lead = layers.pop() if len(layers) == 1 else ()
    loop = max((use.loop for use in uses), default=0)
    nothing = Layout(lead if lead == (0,) and loop else (), (), (), False, loop)
    if lead not in ((), (0,)):
        return nothing
    matrices = sorted((use for use in uses if use.kind != "other"), key=lambda use: use.kind == "product")
    if not matrices:
        return nothing
    inputs, outputs = matrices[0].inputs, matrices[0].outputs
    alike = all({use.inputs, use.outputs} == {inputs, outputs} for use in matrices)
    ones = [i for i, size in enumerate(shape) if size == 1 and i not in (*lead, *inputs, *outputs)]  # squeezed away
    outputs = tuple(sorted((*outputs, *ones)))
    if not alike or sorted((*lead, *inputs, *outputs)) != list(range(len(shape))) or not (inputs and outputs):
        return nothing
    return Layout(lead, inputs, outputs, matrices[0].kind == "rows", loop)


def seen_as(path: Path, leaf: Leaf, found: Layout) -> Leaf:
    """The leaf as a matrix: itself where it is one that every method knows, a view of it otherwise."""
    if not found.inputs:
        return leaf
    lead = len(found.layers)
    inputs, outputs = (tuple(axis - lead for axis in axes) for axes in (found.inputs, found.outputs))
    if path[-1] in ("kernel", "embedding") and (inputs, outputs) == ((0,), (1,)):
        return leaf
    return View(leaf, inputs, outputs, tuple(leaf.shape[lead:]))


def described(spec: Spec, found: Mapping[Path, Layout], shapes: Mapping[Path, tuple[int, ...]]) -> Spec:
    """The spec with what a trace has found: names, stacked leaves, and tables looked up by row."""

    def short(path: Path) -> Path:
        whole = path
        if len(path) > 2 and path[-1] == "value" and path[-2] in (*PLAIN, "kernel", "embedding", "bias", "scale"):
            path = path[:-1]  # of an nnx.State
        drop = path[-1] in PLAIN and len(path) > 1 and bool(found[whole].inputs)
        return path[:-1] if drop else tuple(dotted(path)[0].split("."))

    names: dict[Path, tuple[str, ...]] = {}
    for path, mine in found.items():
        if not mine.layers:
            names[path] = (".".join(short(path)),)
            continue
        # The layer's number goes behind what all leaves of one loop have in common.
        together = [short(p) for p, its in found.items() if its.layers and its.loop == mine.loop]
        alike = [len(set(words)) == 1 for words in zip(*together, strict=False)]
        at = max(min([*alike, False].index(False), len(short(path)) - 1), 1)
        head, tail = short(path)[:at], short(path)[at:]
        names[path] = tuple(".".join((*head, str(i), *tail)) for i in range(shapes[path][0]))
    stacked = lambda path: bool(path in found and found[path].layers)  # noqa: E731
    rows = lambda path: found[path].rows if path in found else path[-1] == "embedding"  # noqa: E731
    return dataclasses.replace(
        spec,
        names=(lambda path: names[path]) if spec.names is dotted else spec.names,
        stacked=stacked,
        looked_up=rows,
    )
