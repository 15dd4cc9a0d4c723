"""`bridge`: any JAX function of parameters and inputs as a `Forward`, so that every weight method adapts it.

    forward = pj.bridge(lambda params, x: module.apply({"params": params}, x))
    params, forward = methods.lora(8, select="query")(key, params, forward)
    y = forward(params, x)

The function is traced on plain arrays, of which it is a function, and what it does is then done with the typed leaves
in their place (`peft_jax.bridge.interpret`): it knows nothing of them, and need not.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import source_info_util

from peft_jax import trees
from peft_jax.bridge.follow import Followed, start
from peft_jax.bridge.interpret import Interpreter
from peft_jax.core import Forward, Inputs, Params, Ports, Spec, check_inputs
from peft_jax.views import view_of
from peft_jax.weights import Leaf, Weight, is_weight


class Arguments(NamedTuple):
    """What a bridged function reads beside its parameters."""

    positional: tuple[Any, ...]
    named: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class Bridged(Forward):
    """A forward function that takes what its own function takes: ``forward(params, *inputs, **named)``, and `Ports`."""

    def __call__(self, params: Params, *inputs: Any, ports: Ports = Ports(), **named: Any) -> Any:  # type: ignore[override]
        if inputs and isinstance(inputs[-1], Ports):
            *rest, ports = inputs
            inputs = tuple(rest)
        one = len(inputs) == 1 and not named and isinstance(inputs[0], Inputs)
        given = inputs[0] if one else Arguments(inputs, named)
        return self.head(params, self.features(params, given, ports), ports)


def bridge(
    function: Callable[..., Any],
    *,
    materialise: bool | str | Callable[[str], bool] = False,
    spec: Spec = Spec(),
) -> Bridged:
    """Any JAX function of ``(params, *inputs)`` as a forward function that every weight method adapts.

    Args:
        function: of a pytree of arrays, and of whatever else it takes.  It is traced, as by `jax.jit`; inputs that are
            no JAX arrays are given to it as they are.
        materialise: which leaves may be multiplied out where the function uses them in a way that has no rule: True for
            all, or a pattern over their names.  It costs a matrix of the base's size and its gradient.
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
        if isinstance(inputs, Inputs):
            check_inputs(inputs, spec)
            named = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(Inputs)}
            tokens = named.pop("tokens")
            inputs = Arguments((tokens,), {name: x for name, x in named.items() if x is not None})
        return evaluate(function, params, inputs, _may(materialise))

    return Bridged(features, spec=spec)


def _may(materialise: bool | str | Callable[[str], bool]) -> Callable[[str], bool]:
    if callable(materialise):
        return materialise
    if isinstance(materialise, bool):
        return lambda path: bool(materialise)
    return lambda path: re.search(materialise, path) is not None


def evaluate(function: Callable[..., Any], params: Params, arguments: Arguments, may: Callable[[str], bool]) -> Any:
    """``function(params, *arguments)``, with typed leaves among the parameters."""
    if isinstance(params, Mapping):
        params = {name: value for name, value in params.items() if name not in trees.ADDED}

    def give_up(where: Sequence[Any], leaf: Followed, why: str) -> None:
        if not may(leaf.path):
            raise TypeError(refusal(where, leaf, why))

    values = [operand(path, leaf) for path, leaf in trees.leaves(params).items()]
    return trace(function, params, values, arguments, Interpreter(give_up))


def refusal(where: Sequence[Any], leaf: Followed, why: str) -> str:
    lines = [line for eqn in where if (line := source_info_util.summarize(eqn.source_info))]  # JAX's own have none
    what = f"{where[-1].primitive.name!r} at {lines[-1] if lines else 'an unknown line'}" if where else "the function"
    return (
        f"{leaf.path} is adapted, and {what} uses it in a way that is not followed: {why} (leave it out of select, or let "
        "it be multiplied out with pj.bridge(..., materialise=...))"
    )


def operand(path: tuple[str, ...], leaf: Leaf) -> Any:
    """What a leaf is to the interpreter: an array that nothing adapts stays one."""
    view = view_of(leaf)
    if view is leaf and view is not None and not is_weight(view.base):
        return view.base
    return start("/".join(path), leaf) if is_weight(leaf) else leaf


def trace(
    function: Callable[..., Any], params: Params, values: list[Any], arguments: Arguments, interpreter: Interpreter
) -> Any:
    """Interprets the function with `values` for the leaves of its parameters."""
    plain = [jax.ShapeDtypeStruct(v.shape, v.dtype) if isinstance(v, Followed) else v for v in values]
    holder = jax.tree.structure(params, is_leaf=is_weight)
    given, rest = jax.tree.flatten(arguments)
    dynamic = [isinstance(x, jax.Array) for x in given]
    result: list[Any] = []

    def flat(leaves: list[Any], arrays: list[Any]) -> list[Any]:
        them = iter(arrays)
        positional, named = rest.unflatten([next(them) if is_array else x for x, is_array in zip(given, dynamic)])
        out, tree = jax.tree.flatten(function(holder.unflatten(leaves), *positional, **named))
        result.append(tree)
        return out

    arrays = [x for x, is_array in zip(given, dynamic) if is_array]
    jaxpr = jax.make_jaxpr(flat)(plain, arrays)
    results = interpreter.run(jaxpr, [*values, *arrays])
    for value in results:
        if isinstance(value, Followed):
            interpreter.give_up((), value, "it is one of its results")
    return result[0].unflatten([value.array() if isinstance(value, Followed) else value for value in results])
