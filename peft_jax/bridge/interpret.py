"""A narrow interpreter of jaxprs: equations that meet a typed leaf go by the rules, all others are bound untouched.

So whatever knows nothing of the leaves stays whole: attention kernels, custom derivatives, collectives, loops.  What
has a leaf for an operand and a function inside is entered, with the leaf: jit, scan, while, cond, remat, custom_jvp,
custom_vjp, shard_map.  (Derivatives are then taken of what is inside: a custom rule knows no leaf.)

After JAX's own guide, "Writing custom Jaxpr interpreters in JAX".
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import source_info_util
from jax.extend.core import Literal

from peft_jax import trees, versions
from peft_jax.bridge.follow import Followed, NotFollowed
from peft_jax.bridge.rules import REARRANGING, REFUSED, USING, Rule, bind
from peft_jax.bridge.shards import SHARDED, a_part, can_shard, shard_specs

# (the equation and those around it, leaf, why): raises, or lets the leaf be multiplied out
GiveUp = Callable[[Sequence[Any], Followed, str], None]


@dataclasses.dataclass(frozen=True)
class Interpreter:
    """`using` are the rules of what is not a mere rearrangement; `give_up` decides where there is none, and `otherwise`
    computes what it lets pass; `inside` are the equations that have been entered."""

    give_up: GiveUp
    using: Mapping[str, Rule] = dataclasses.field(default_factory=lambda: USING)
    otherwise: Rule = dataclasses.field(default_factory=lambda: bind)
    inside: tuple[Any, ...] = ()

    def run(self, closed: Any, operands: Sequence[Any]) -> list[Any]:
        jaxpr, consts = versions.opened(closed)
        found = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, operands, strict=True))
        read = lambda v: v.val if isinstance(v, Literal) else found[v]  # noqa: E731
        for eqn in _live(jaxpr):
            info = eqn.source_info
            stack = source_info_util.current_name_stack() + info.name_stack
            with source_info_util.user_context(info.traceback, name_stack=stack), eqn.ctx.manager:
                values = [read(v) for v in eqn.invars]
                results = self.apply(eqn, values) if any(map(_is_followed, values)) else bind(eqn, values)
            found.update(zip(eqn.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def apply(self, eqn: Any, values: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        try:
            if name in ENTERED:
                return ENTERED[name](dataclasses.replace(self, inside=(*self.inside, eqn)), eqn, values)
            rule = self.using.get(name) or REARRANGING.get(name)
            if rule is None:
                raise NotFollowed(REFUSED.get(name, "no rule follows it there"))
            return rule(eqn, values)
        except NotFollowed as error:
            return self.otherwise(eqn, self.plain(eqn, values, str(error)))

    def step(self, eqn: Any, value: Any) -> Any:
        """What a loop slices by its first axis, as one step has it, but for the leaf's arrays."""
        try:
            return value.step(eqn) if _is_followed(value) else value
        except NotFollowed as error:
            return self.plain(eqn, [value], str(error))[0]

    def plain(self, eqn: Any, values: Sequence[Any], why: str) -> list[Any]:
        """The values with leaves multiplied out, where that is allowed."""
        for value in values:
            if _is_followed(value):
                self.give_up((*self.inside, eqn), value, why)
        return [value.array() if _is_followed(value) else value for value in values]


def _is_followed(value: Any) -> bool:
    return isinstance(value, Followed)


def _live(jaxpr: Any) -> list[Any]:
    """The equations that something depends on: a leaf may be cast, say, and never used."""
    needed, live = {v for v in jaxpr.outvars if not isinstance(v, Literal)}, list[Any]()
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            live.append(eqn)
            needed |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return live[::-1]


# -- equations that hold functions -------------------------------------------------------------------------------------


def _call(this: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    p = eqn.params
    values = [_placed(x, sharding) for x, sharding in _pairs(values, p.get("in_shardings"))]
    results = this.run(p["jaxpr"] if "jaxpr" in p else p["call_jaxpr"], values)
    return [_placed(x, sharding) for x, sharding in _pairs(results, p.get("out_shardings"))]


def _pairs(values: Sequence[Any], shardings: Sequence[Any] | None) -> list[tuple[Any, Any]]:
    return [(x, None) for x in values] if shardings is None else list(zip(values, shardings, strict=True))


def _placed(x: Any, sharding: Any) -> Any:
    """What jit's own shardings ask for; a leaf's arrays have theirs."""
    asked = isinstance(sharding, jax.sharding.Sharding) and not _is_followed(x)
    return jax.lax.with_sharding_constraint(x, sharding) if asked else x


def _remat(this: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    p = eqn.params
    run = lambda *values: this.run(p["jaxpr"], values)  # noqa: E731
    return jax.checkpoint(run, prevent_cse=p["prevent_cse"], policy=p["policy"])(*values)


def _scan(this: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    p = eqn.params
    consts, carry, sliced = versions.scan_operands(p, values)
    carry = this.plain(eqn, carry, "it is carried from step to step, where it could change")
    steps = [this.step(eqn, value) for value in sliced]
    # What layers share has no axis to slice.
    parts = [trees.unshare(v.leaf) if _is_followed(v) else (v, {}) for v in steps]
    xs, shared = [x for x, _ in parts], [share for _, share in parts]

    def body(carry: Any, xs: Any) -> Any:
        layers = [
            v.to(v.dims, leaf=trees.fill(x, share)) if _is_followed(v) else x
            for v, x, share in zip(steps, xs, shared, strict=True)
        ]
        results = this.plain(eqn, this.run(p["jaxpr"], [*consts, *carry, *layers]), "it comes out of the loop")
        return results[: len(carry)], results[len(carry) :]

    rest = {name: p[name] for name in ("length", "reverse", "unroll", "_split_transpose") if name in p}
    carry, ys = jax.lax.scan(body, carry, xs, **rest)
    return [*carry, *ys]


def _while(this: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    p, n = eqn.params, eqn.params["cond_nconsts"]
    asked, consts, carry = values[:n], values[n : n + p["body_nconsts"]], values[n + p["body_nconsts"] :]
    carry = this.plain(eqn, carry, "it is carried from step to step, where it could change")
    check = lambda carry: this.run(p["cond_jaxpr"], [*asked, *carry])[0]  # noqa: E731
    body = lambda carry: this.plain(eqn, this.run(p["body_jaxpr"], [*consts, *carry]), "it comes out of the loop")  # noqa: E731
    return jax.lax.while_loop(check, body, carry)


def _cond(this: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    (index,) = this.plain(eqn, values[:1], "it is used as an index")

    def branch(jaxpr: Any) -> Callable[..., Any]:
        return lambda *values: this.plain(eqn, this.run(jaxpr, values), "it comes out of a branch")

    return jax.lax.switch(index.astype(jnp.int32), [branch(jaxpr) for jaxpr in eqn.params["branches"]], *values[1:])


def _shard_map(this: Interpreter, eqn: Any, values: list[Any]) -> list[Any]:
    p = eqn.params
    given = [
        (v, spec) if not _is_followed(v) or can_shard(v, spec) else (this.plain(eqn, [v], SHARDED)[0], spec)
        for v, spec in zip(values, p["in_specs"], strict=True)
    ]
    specs = [shard_specs(v, spec) if _is_followed(v) else spec for v, spec in given]

    def run(*values: Any) -> list[Any]:
        parts = [
            a_part(v, inner.aval.shape) if _is_followed(v) and any(spec) else v
            for v, (_, spec), inner in zip(values, given, versions.opened(p["jaxpr"])[0].invars, strict=True)
        ]
        return this.plain(eqn, this.run(p["jaxpr"], parts), "it comes out of the map")

    mapped = jax.shard_map(
        run,
        mesh=p["mesh"],
        in_specs=tuple(specs),
        out_specs=list(p["out_specs"]),
        check_vma=p["check_vma"],
        axis_names=p["newly_manual_axes"],
    )
    return mapped(*(v for v, _ in given))


ENTERED: dict[str, Callable[[Interpreter, Any, list[Any]], list[Any]]] = {
    "jit": _call,
    "pjit": _call,
    "closed_call": _call,
    "core_call": _call,
    "custom_jvp_call": _call,
    "custom_vjp_call": _call,
    "remat2": _remat,
    "checkpoint": _remat,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
