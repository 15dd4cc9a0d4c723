"""Paged optimiser state: where it lies, that nothing but its place changes, and what a GPU would be told."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checks import close, copied, same, without_compiling
from jax.sharding import AxisType
from toy import Nudge

import peft_jax as pj
from peft_jax import methods, training
from peft_jax.training import paging
from peft_jax.training.step import shardings_of

pytestmark = pytest.mark.usefixtures("quick_compiles")

KEY = jax.random.key(4)
MIN = 64  # numbers: what each factor of the wide adapter has


def forwarded(params: Any, inputs: pj.Inputs, ports: pj.Ports) -> jax.Array:
    return pj.linear(jnp.tanh(pj.linear(inputs.tokens, params["wide"])), params["narrow"])


def squares(forward: Any, params: Any, batch: Any, ports: Any) -> Any:
    return jnp.sum((forward(params, batch["x"]) - 1) ** 2), jnp.float32(len(batch["x"]))


FORWARD = pj.Forward(forwarded)


def tree() -> Any:
    """Two adapters, whose factors are above the threshold and below it."""
    rng = np.random.default_rng(7)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    wide, narrow = Nudge(draw(16, 16), draw(16, 4), draw(4, 16)), Nudge(draw(16, 8), draw(16, 1), draw(1, 8))
    return {"wide": wide, "narrow": narrow}


def batch(step: int) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng([5, step]).standard_normal((4, 16)).astype(np.float32)}


def optimiser(paged: bool) -> Any:
    tx = optax.adamw(1e-2)
    return training.page(tx, MIN) if paged else tx


def places(tree: Any) -> list[str]:
    return [x.sharding.memory_kind for x in jax.tree.leaves(tree)]


def test_large_states_lie_on_the_host_and_every_bit_is_the_same() -> None:
    params, ends = tree(), []
    for paged in (False, True):
        tx = pj.freeze(optimiser(paged), params)
        state, frozen = training.init_state(params, tx, KEY)
        step = training.make_step(FORWARD, tx, squares, accumulate=2, clip=0.5)
        before = places(state)
        for i in range(3):
            call = (step, state, frozen, batch(i))
            state, metrics = without_compiling(*call) if i else step(*call[1:])
            assert places(state) == before
        ends.append(copied((state, metrics)))
        for name in ("mu", "nu"):
            moments = optax.tree.get(state.opt_state, name)
            assert places(moments["wide"]) == ["pinned_host" if paged else "device"] * 2
            assert places(moments["narrow"]) == ["device"] * 2
        assert set(places((state.trainables, frozen, state.step))) == {"device"}
    assert same(*ends)


def test_a_step_that_is_not_finite_leaves_the_state_where_and_as_it_was() -> None:
    tx = optimiser(True)
    state, frozen = training.init_state(tree(), tx, KEY)
    before = copied(state)
    state, metrics = training.make_step(FORWARD, tx, squares)(
        state, frozen, {"x": np.full((4, 16), np.nan, np.float32)}
    )
    assert not metrics["finite"]
    assert places(state.opt_state).count("pinned_host") == 4
    assert same(copied(state), before)


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_adalora_under_a_paged_optimiser(order: str) -> None:
    """Inside `allocate_rank` or round it: its own state is kept and seen either way."""
    forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["q_proj"]["kernel"]))
    params = {"q_proj": {"kernel": jax.random.normal(jax.random.key(1), (16, 8))}}
    params, forward = methods.adalora(2, 4, "q_proj", initial_rank=3)(KEY, params, forward)
    budget: dict[str, Any] = {"initial_steps": 0, "final_steps": 1, "orthogonality": 0.1}
    allocated = lambda tx: methods.allocate_rank(tx, 4, **budget)  # noqa: E731
    page = lambda tx: training.page(tx, 20)  # noqa: E731
    adam, ends = optax.adam(1e-2), []
    for tx in (allocated(adam), allocated(page(adam)) if order == "inside" else page(allocated(adam))):
        state, frozen = training.init_state(params, tx, KEY)
        step = training.make_step(forward, tx, squares)
        for i in range(3):
            state, _ = step(state, frozen, batch(i))
        ends.append(state)
    assert "pinned_host" in places(ends[1].opt_state)
    assert same(*map(copied, ends))


def test_fit_resumes_a_paged_run_bit_for_bit(tmp_path: Any) -> None:
    """And a run that was saved unpaged: a checkpoint does not say where the state lay."""

    def run(folder: str, steps: int, paged: bool) -> Any:
        options: dict[str, Any] = {"checkpoints": tmp_path / folder, "save_every": 2, "progress": False}
        return training.fit(FORWARD, tree(), optimiser(paged), batch, steps, loss=squares, **options)

    straight = run("straight", 4, True)
    assert places(straight.opt_state).count("pinned_host") == 4
    for folder, paged in (("paged", True), ("plain", False)):
        run(folder, 2, paged)
        resumed = run(folder, 4, True)
        assert places(resumed.opt_state) == places(straight.opt_state)
        assert same(copied(resumed[:2]), copied(straight[:2]))


def test_a_state_on_a_mesh_is_paged_shard_by_shard() -> None:
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    columns, ends = jax.NamedSharding(mesh, jax.P(None, "data")), []
    for meshed in (False, True):
        params, tx = tree(), optimiser(meshed)
        if meshed:
            params = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
            params["wide"] = dataclasses.replace(params["wide"], b=jax.device_put(params["wide"].b, columns))
        state, frozen = training.init_state(params, tx, KEY)
        before = [x.sharding for x in jax.tree.leaves(state)]
        step = training.make_step(FORWARD, tx, squares, shardings=shardings_of(state))
        for i in range(2):
            call = (step, state, frozen, batch(i))
            state, _ = without_compiling(*call) if i else step(*call[1:])
        assert [x.sharding for x in jax.tree.leaves(state)] == before
        ends.append(copied(state))
    assert optax.tree.get(state.opt_state, "mu")["wide"].b.sharding == columns.with_memory_kind("pinned_host")
    close(*ends, atol=1e-5)  # two devices add up in another order


def test_a_gpu_is_told_to_move_what_is_paged_and_nothing_else() -> None:
    """Lowered for CUDA without one: each of the four moments goes to the device once, and back once."""
    counts = {}
    for paged in (False, True):
        tx = optimiser(paged)
        state, frozen = training.init_state(tree(), tx, KEY)
        traced = training.make_step(FORWARD, tx, squares).trace(state, frozen, batch(0))
        lines = traced.lower(lowering_platforms=("cuda",)).as_text().splitlines()
        moves = [line for line in lines if "@annotate_device_placement" in line]
        head = next(line for line in lines if "@main" in line)
        arguments = head.split("->")[0].split("%arg")[1:]
        held = [a for a in arguments if 'memory_kind = "pinned_host"' in a and "tf.aliasing_output" in a]
        to = [sum(f'_xla_buffer_placement = "{kind}"' in m for m in moves) for kind in ("device", "pinned_host")]
        counts[paged] = (*to, len(held))
    assert counts == {False: (0, 0, 0), True: (4, 4, 4)}, "moved there, moved back, donated"


def test_what_cannot_be_paged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="min_size is -1"):
        training.page(optax.adam(1e-2), -1)
    tx = optimiser(True)
    with pytest.raises(ValueError, match=r"many runs keep .* without training.page"):
        training.fit_many(FORWARD, {"one": tree()}, tx, batch, 1, loss=squares, progress=False)
    monkeypatch.setattr(paging, "KIND", "far_host")
    with pytest.raises(
        RuntimeError, match=r"paging needs a backend with far_host memory, and cpu has device, pinned_h"
    ):
        tx.init(pj.partition(tree())[0])
