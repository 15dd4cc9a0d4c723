"""`bridge`: any JAX function of parameters and inputs as a `Forward`, so that every weight method adapts it.

    forward = pj.bridge(lambda params, x: module.apply({"params": params}, x))
    params, forward = methods.lora(8, select="query")(key, params, forward)
    y = forward(params, x)

The function is traced on plain arrays, of which it is a function, and what it does is then done with the typed leaves
in their place (`peft_jax.bridge.interpret`): it knows nothing of them, and need not.
"""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax.extend import source_info_util

from peft_jax import trees
from peft_jax.bridge.follow import Followed, start
from peft_jax.bridge.interpret import Interpreter
from peft_jax.bridge.layouts import Use, described, layout, probe, prober, seen_as
from peft_jax.core import Forward, Inputs, Params, Ports, Spec, check_inputs
from peft_jax.layers import refuse_unknown_ports
from peft_jax.views import View
from peft_jax.weights import Leaf, is_weight

NONE = Ports()
PLAIN = Spec()


class Arguments(NamedTuple):
    """What a bridged function reads beside its parameters."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Bridged(Forward):
    """A forward function that takes what its own function takes: ``forward(params, *inputs, **named)``, and `Ports`."""

    function: Callable[..., Any] | None = None

    def __call__(self, params: Params, *inputs: Any, ports: Ports = NONE, **named: Any) -> Any:
        if inputs and isinstance(inputs[-1], Ports):
            *rest, ports = inputs
            inputs = tuple(rest)
        one = len(inputs) == 1 and not named and isinstance(inputs[0], Inputs)
        given = inputs[0] if one else Arguments(inputs, named)
        return self.head(params, self.features(params, given, ports), ports)

    def traced(self, params: Params, *inputs: Any, **named: Any) -> tuple[Params, "Bridged"]:
        """The parameters with every kernel seen as a matrix, and the forward function that knows which are layers.

        Before any method, for models whose kernels are not all ``[in, out]`` arrays called kernel or embedding: those
        of more axes (``[width, heads, dim]``), transposed ones, and those stacked by layer.  The function is traced
        once, for shapes alone, to find the axes that it sums over; no array is copied, and `merge` and `strip` give
        back the shapes that were.

        Args:
            params: the model's own tree, of arrays or abstract.
            inputs, named: what the function is called with; shapes (`jax.ShapeDtypeStruct`) do.

        Raises:
            ValueError: if a method has already been applied.

        >>> import jax, jax.numpy as jnp, peft_jax as pj
        >>> forward = pj.bridge(lambda params, x: jnp.einsum("bd,dnh->bnh", x, params["query"]))
        >>> params, forward = forward.traced({"query": jnp.ones((4, 2, 3))}, jnp.ones((1, 4)))
        >>> params["query"].shape
        (4, 6)
        """
        function = self.function
        if function is None or trees.weights(params):
            raise ValueError("there are typed leaves in this tree: trace the model before any method is applied")
        leaves = trees.leaves(params)
        uses: dict[str, list[Use]] = {}
        probes = [probe("/".join(path), leaf.shape, leaf.dtype) for path, leaf in leaves.items()]
        given, tree = jax.tree.flatten(Arguments(inputs, named))

        def run(arrays: list[Any]) -> Any:
            them = iter(arrays)
            arguments = jax.tree.unflatten(tree, [next(them) if is_array(x) else x for x in given])
            return trace(function, params, probes, arguments, prober(uses))

        jax.eval_shape(run, [x for x in given if is_array(x)])
        found = {path: layout(uses.get("/".join(path), ()), leaf.shape) for path, leaf in leaves.items()}
        spec = described(self.spec, found, {path: leaf.shape for path, leaf in leaves.items()})
        seen = trees.map_leaves(lambda path, leaf: seen_as(path, leaf, found[path]), params)
        return seen, dataclasses.replace(self, spec=spec)


def is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | jax.ShapeDtypeStruct)


def bridge(
    function: Callable[..., Any],
    *,
    materialise: bool | str | Callable[[str], bool] = False,
    spec: Spec = PLAIN,
) -> Bridged:
    """Any JAX function of ``(params, *inputs)`` as a forward function that every weight method adapts.

    Args:
        function: of a pytree of arrays, and of whatever else it takes.  It is traced, as by `jax.jit`; inputs that are
            no JAX arrays are given to it as they are.
        materialise: which leaves may be multiplied out where the function uses them in a way that has no rule: True for
            all, or a pattern over their paths.  It costs a matrix of the base's size and its gradient.
        spec: what the model says of itself (names, vocabulary); by default leaves are called by their dotted paths.

    Raises:
        TypeError: in a call, if the function uses an adapted leaf in a way that is not followed: with the primitive,
            the leaf's path and the line.

    >>> import jax, jax.numpy as jnp, peft_jax as pj
    >>> from peft_jax import methods
    >>> forward = pj.bridge(lambda params, x: jnp.tanh(x @ params["up"]["kernel"]) @ params["down"]["kernel"])
    >>> params = {"up": {"kernel": jnp.ones((4, 8))}, "down": {"kernel": jnp.ones((8, 2))}}
    >>> params, forward = methods.lora(2, select="up")(jax.random.key(0), params, forward)
    >>> forward(params, jnp.ones((3, 4))).shape
    (3, 2)
    """

    def features(params: Params, inputs: Any, ports: Ports) -> Any:
        refuse_unknown_ports(ports, spec.ports, "a bridged function")
        if isinstance(inputs, Inputs):
            check_inputs(inputs, spec)
            named = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(Inputs)}
            tokens = named.pop("tokens")
            inputs = Arguments((tokens,), {name: x for name, x in named.items() if x is not None})
        return evaluate(function, params, inputs, _may(materialise))

    return Bridged(features, spec=spec, function=function)


def _may(materialise: bool | str | Callable[[str], bool]) -> Callable[[str], bool]:
    if callable(materialise):
        return materialise
    if isinstance(materialise, bool):
        return lambda path: bool(materialise)
    return lambda path: re.search(materialise, path) is not None


def evaluate(function: Callable[..., Any], params: Params, arguments: Arguments, may: Callable[[str], bool]) -> Any:
    """``function(params, *arguments)``, with typed leaves among the parameters."""
    params = trees.without_added(params)

    def give_up(where: Sequence[Any], leaf: Followed, why: str) -> None:
        if not may(leaf.path):
            raise TypeError(refusal(where, leaf, why))

    values = [operand(path, leaf) for path, leaf in trees.leaves(params).items()]
    return trace(function, params, values, arguments, Interpreter(give_up))


def refusal(where: Sequence[Any], leaf: Followed, why: str) -> str:
    lines = [line for eqn in where if (line := source_info_util.summarize(eqn.source_info))]  # JAX's own have none
    what = f"{where[-1].primitive.name!r} at {lines[-1] if lines else 'an unknown line'}" if where else "the function"
    return (
        f"{leaf.path} is adapted, and {what} uses it in a way that is not followed: {why} (leave it out of select, "
        "or let it be multiplied out with pj.bridge(..., materialise=...))"
    )


def operand(path: tuple[str, ...], leaf: Leaf) -> Any:
    """What a leaf is to the interpreter: an array that nothing adapts stays one."""
    if isinstance(leaf, View) and not is_weight(leaf.base):
        return leaf.base
    return start("/".join(path), leaf) if is_weight(leaf) else leaf


def trace(
    function: Callable[..., Any], params: Params, values: list[Any], arguments: Arguments, interpreter: Interpreter
) -> Any:
    """Interprets the function with `values` for the leaves of its parameters."""
    plain = [jax.ShapeDtypeStruct(v.shape, v.dtype) if isinstance(v, Followed) else v for v in values]
    holder = jax.tree.structure(params, is_leaf=is_weight)
    given, rest = jax.tree.flatten(arguments)
    result: list[Any] = []

    def flat(leaves: list[Any], arrays: list[Any]) -> list[Any]:
        them = iter(arrays)
        positional, named = jax.tree.unflatten(rest, [next(them) if is_array(x) else x for x in given])
        out, tree = jax.tree.flatten(function(jax.tree.unflatten(holder, leaves), *positional, **named))
        result.append(tree)
        return out

    arrays = [x for x in given if is_array(x)]
    jaxpr = jax.make_jaxpr(flat)(plain, arrays)
    results = interpreter.run(jaxpr, [*values, *arrays])
    for value in results:
        if isinstance(value, Followed):
            interpreter.give_up((), value, "it is one of its results")
    return jax.tree.unflatten(result[0], [value.array() if isinstance(value, Followed) else value for value in results])
