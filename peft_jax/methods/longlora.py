"""LongLoRA: LoRA on longer texts, trained with shifted sparse attention (Chen et al. 2023, arXiv 2309.12307).

    heads 0 … H/2 − 1     attend inside the groups   [0, g), [g, 2g), …
    heads H/2 … H − 1     attend inside the groups   [0, g/2), [g/2, 3g/2), …

of the text's T tokens, causally; g is T/4 unless told otherwise.  Half of the heads carry across the other half's
borders, and the step costs g/T of full attention.  Beside LoRA on q, k, v and o, embeddings and norms train whole,
without which longer texts are not learnt (section 3.3, table 2).  It is a chain:

    longlora(…) = chain(lora(rank, alpha, select), unfreeze("embed|norm"), shift_attention(group))

Shifted attention is for training alone (section 3.2): it acts in calls whose ports carry a `micro_key`, which those of
`training.make_step` and `training.fit` do, as dropout does.  Every other call (evaluation, generation, merged params in
the model's own forward function) has full attention.  A loop of your own passes ``Ports(micro_key=key)``.

Groups count the slots of the batch's arrays, padding too; who sees whom inside a group is what it is without groups
(padding, packed segments, sliding windows).  g need not divide T: the last group is shorter.

On a mesh whose axis `sequence` splits the tokens (`peft_jax.sharding`) groups are local: each device attends inside
those that it holds, and the shifted heads pass half a group of queries, keys and values to the device before, and half
a group of outputs back.  A device's tokens must be whole groups.

Source: sections 3.2 and 3.3, algorithm 1; dvlab-research/LongLoRA, llama_attn_replace.py (``forward_flashattn`` for the
groups, ``forward_noflashattn`` for the wrapped ones), fine-tune.py (``trainable_params``).

Departures: algorithm 1 rolls the text, so that the shifted heads' last group holds the text's end AND its beginning,
where early tokens see later ones: ``wrap=True`` does so, for comparison.  The default is that of the paper's code with
flash attention, where two halves of a group stand at the ends.  A group that spans the text is full attention in every
head, where the paper would still shift.  g is rounded up where T/4 is no whole number.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Float

from peft_jax.attention import Visible, chunked_attention
from peft_jax.core import Forward, Method, Params, Ports, chain
from peft_jax.methods.lora import lora
from peft_jax.methods.unfreeze import unfreeze
from peft_jax.ports import need
from peft_jax.sharding import ROWS, mesh_of
from peft_jax.trees import Pattern


@dataclasses.dataclass(frozen=True)
class ShiftedAttention:
    """An attention function (`peft_jax.attention`) of groups, which half of the heads have shifted by half of one.

    Groups of one length are the batch of one call of `inner`, so no score and no mask is larger than ``[g, g]``.

    Args:
        group: g: a share of the text's tokens (a float up to 1), or a number of tokens.
        wrap: rolls the text under the shifted heads, so that their last group takes in the text's beginning.
        shift: False for groups that nothing crosses, the paper's "short" attention.
        inner: the attention function inside the groups.

    >>> import jax
    >>> from peft_jax.attention import Visible, plain_attention
    >>> q = k = v = jax.random.normal(jax.random.key(0), (1, 8, 2, 4))
    >>> visible = Visible(jax.numpy.arange(8)[None], jax.numpy.arange(8)[None], plain=True)
    >>> y, full = ShiftedAttention(4)(q, k, v, visible, 0.5), plain_attention(q, k, v, visible, 0.5)
    >>> [[bool(jax.numpy.allclose(y[0, i, head], full[0, i, head], atol=1e-6)) for i in (1, 3, 7)] for head in (0, 1)]
    [[True, True, False], [True, False, False]]
    """

    group: int | float = 1 / 4
    wrap: bool = False
    shift: bool = True
    inner: Callable[..., Array] = chunked_attention

    def size(self, time: int) -> int:
        """g for a text of so many tokens."""
        return self.group if isinstance(self.group, int) else math.ceil(round(self.group * time, 6))

    def __call__(
        self,
        query: Float[Array, "batch time heads dim"],
        key: Float[Array, "batch keys kv_heads dim"],
        value: Float[Array, "batch keys kv_heads dim"],
        visible: Visible,
        scale: float,
    ) -> Float[Array, "batch time heads dim"]:
        time, heads = query.shape[1:3]
        if not visible.causal or visible.bias is not None:
            raise ValueError(
                "shifted sparse attention is for causal models without a bias on scores: leave it out here"
            )
        if key.shape[1] != time:
            raise ValueError(
                f"shifted sparse attention has {time} queries and {key.shape[1]} keys: it trains on whole texts, "
                "without a cache, and does not go with prefix tuning or P-tuning v2"
            )
        if self.size(time) >= time:
            return self.inner(query, key, value, visible, scale)
        if heads < 2:
            raise ValueError("this model has one attention head, of which no half can be shifted: leave it out here")
        if not self.shift:
            return self._grouped(query, key, value, visible, scale, 0)
        first, second = (_heads(query, key, value, part) for part in (slice(heads // 2), slice(heads // 2, heads)))
        still = self._grouped(*first, visible, scale, 0)
        return jnp.concatenate([still, self._grouped(*second, visible, scale, self.size(time) // 2)], 2)

    def _grouped(self, query: Array, key: Array, value: Array, visible: Visible, scale: float, by: int) -> Array:
        """Attention inside groups whose borders lie `by` tokens further on."""
        mesh = mesh_of(query)
        if mesh is not None and mesh.shape.get("sequence", 1) > 1:
            return self._in_pieces(mesh, query, key, value, visible, scale, by)
        batch, time, size = *query.shape[:2], self.size(query.shape[1])
        segments = (visible.query_segments, visible.key_segments)
        rolled = by if self.wrap else 0
        roll = lambda x, by: x if x is None or not by else jnp.roll(x, by, axis=1)  # noqa: E731
        arrays = [roll(x, -rolled) for x in (query, key, value, *segments)]
        head = 0 if self.wrap else by
        whole = (time - head) // size
        # (start, length, how many) of runs of groups of one length: a shorter one at either end
        runs = [(0, head, 1), (head, size, whole), (head + whole * size, time - head - whole * size, 1)]
        found = []
        for start, length, count in runs:
            if not length or not count:
                continue

            def cut(x: Any, start: int = start, length: int = length, count: int = count) -> Any:
                if x is None:
                    return None
                x = jnp.broadcast_to(x, (batch, *x.shape[1:]))[:, start : start + length * count]
                return x.reshape(batch * count, length, *x.shape[2:])

            q, k, v, asking, asked = map(cut, arrays)
            order = jnp.arange(length, dtype=jnp.int32)[None]
            inside = dataclasses.replace(
                visible, query_order=order, key_order=order, query_segments=asking, key_segments=asked
            )
            found.append(self.inner(q, k, v, inside, scale).reshape(batch, length * count, *query.shape[2:]))
        return roll(jnp.concatenate(found, 1), rolled)

    def _in_pieces(
        self, mesh: AbstractMesh, query: Array, key: Array, value: Array, visible: Visible, scale: float, by: int
    ) -> Array:
        """`_grouped`, where each device of the mesh's axis `sequence` holds some whole groups."""
        devices, (batch, time), size = mesh.shape["sequence"], query.shape[:2], self.size(query.shape[1])
        local = time // devices
        if time % devices or local % size:
            raise ValueError(
                f"a text of {time} tokens is split over {devices} devices of the mesh's axis 'sequence', and {local} "
                f"tokens are no whole number of groups of {size}: choose a smaller group, or fewer devices"
            )
        splits = lambda n, *axes: n % math.prod(mesh.shape.get(a, 1) for a in axes) == 0  # noqa: E731
        rows = tuple(a for a in ROWS if a in mesh.shape) if splits(batch, *ROWS) else None
        tensor = "tensor" in mesh.shape and splits(key.shape[2], "tensor") and splits(query.shape[2], "tensor")
        whole = PartitionSpec(rows, "sequence", "tensor" if tensor else None)
        segments = tuple(
            None if x is None else jnp.broadcast_to(x, (batch, time))
            for x in (visible.query_segments, visible.key_segments)
        )
        given = (query, key, value, segments, visible.window, jnp.arange(devices, dtype=jnp.int32))
        specs = (whole, whole, whole, PartitionSpec(rows, "sequence"), PartitionSpec(), PartitionSpec("sequence"))

        def shifted(x: Any, by: int) -> Any:  # so many tokens from the device behind, or before
            step = -1 if by > 0 else 1
            round_about = [(i, (i + step) % devices) for i in range(devices)]
            kept, sent = (x[:, by:], x[:, :by]) if by > 0 else (x[:, :by], x[:, by:])
            parts = [kept, jax.lax.ppermute(sent, "sequence", round_about)]
            return jnp.concatenate(parts[::-step], 1)

        def own(query: Array, key: Array, value: Array, segments: Any, window: Any, index: Array) -> Array:
            arrays: list[Any] = [query, key, value, *segments]
            if by:
                arrays = [x if x is None else shifted(x, by) for x in arrays]

            def attend(start: int, stop: int, group: int) -> Array:
                parts: Any = [x if x is None else x[:, start:stop] for x in arrays]
                q, k, v, asking, asked = parts
                seen = dataclasses.replace(visible, query_segments=asking, key_segments=asked, window=window)
                return dataclasses.replace(self, group=group)._grouped(q, k, v, seen, scale, 0)

            def apart() -> Array:  # the text's end and its beginning, which the last device's last group holds both
                runs = [(0, local - size, size), (local - size, local - by, size - by), (local - by, local, by)]
                return jnp.concatenate([attend(*run) for run in runs if run[0] < run[1]], 1)

            if not by:
                return attend(0, local, size)
            if self.wrap:
                y = attend(0, local, size)
            else:
                y = jax.lax.cond(index[0] == devices - 1, apart, lambda: attend(0, local, size))
            return shifted(y, -by)

        # Each device's own branch: nothing inside one waits for another device.
        return jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=whole, check_vma=False)(*given)


def _heads(query: Array, key: Array, value: Array, part: slice) -> tuple[Array, Array, Array]:
    """Some query heads with their key heads, which are repeated where the cut falls between those that share one."""
    share = query.shape[2] // key.shape[2]
    if (part.start in (None, 0) and part.stop % share == 0) or (part.start and part.start % share == 0):
        shared = slice((part.start or 0) // share, part.stop // share)
        return query[:, :, part], key[:, :, shared], value[:, :, shared]
    whose = jnp.arange(query.shape[2])[part] // share
    return query[:, :, part], key[:, :, whose], value[:, :, whose]


def shift_attention(group: int | float = 1 / 4, *, wrap: bool = False, shift: bool = True) -> Method:
    """Shifted sparse attention in training calls (those whose ports carry a `micro_key`), full attention in others.

    A call whose ports bring an attention function of their own has it inside the groups.

    Args:
        group: g: a share of the text's tokens (a float in (0, 1]), or a number of tokens (an int, 1 or more).
        wrap: the groups of algorithm 1, where early tokens see later ones through the shifted heads.
        shift: False for groups that nothing crosses, the "short" attention of the paper's ablation.

    Raises:
        ValueError: on a group out of range; on a forward function without the port `attend`, an encoder or an
            encoder-decoder model; in a call, on a prefix; where a second one is chained.

    >>> import jax, transformers, peft_jax as pj
    >>> from peft_jax import methods, models
    >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    >>> model = models.from_config(transformers.LlamaConfig(**sizes), jax.random.key(1))
    >>> params, forward = methods.shift_attention(group=1/4)(jax.random.key(0), model.params, model.forward)
    >>> tokens, full = jax.numpy.arange(16)[None], model.forward(model.params, jax.numpy.arange(16)[None])
    >>> trained = forward(params, tokens, pj.Ports(micro_key=jax.random.key(2)))
    >>> bool((forward(params, tokens) == full).all()), bool((trained == full).all())
    (True, False)
    """
    right = group >= 1 if isinstance(group, int) else 0 < group <= 1
    if isinstance(group, bool) or not right:
        raise ValueError(f"group is {group}: give a share of the text in (0, 1], as 1/4, or a number of tokens")
    attend = ShiftedAttention(group, wrap, shift)

    def check(forward: Forward) -> None:
        need("attend", forward, 0)
        if forward.spec.attentions:
            raise ValueError("shifted sparse attention is for causal models, and this is an encoder-decoder model")

    def init(key: Array, params: Params, forward: Forward) -> Params:
        check(forward)
        return params

    def wrapped(forward: Forward) -> Forward:
        check(forward)

        def fill(params: Params, ports: Ports) -> tuple[Params, Ports]:
            if ports.micro_key is None:
                return params, ports
            if isinstance(ports.attend, ShiftedAttention):
                raise ValueError("shifted sparse attention is there already: chain shift_attention or longlora once")
            inside = attend if ports.attend is None else dataclasses.replace(attend, inner=ports.attend)
            return params, dataclasses.replace(ports, attend=inside)

        return forward.rewritten(fill)

    return Method(init, wrapped)


def longlora(
    rank: int = 8,
    alpha: float | None = 16,
    select: Pattern = "(q|k|v|o)_proj",
    *,
    group: int | float = 1 / 4,
    wrap: bool = False,
    train: Pattern | None = "embed|norm",
    dropout: float = 0.0,
    dtype: Any = jnp.float32,
    name: str = "longlora",
) -> Method:
    """LoRA, with embeddings and norms trained whole and shifted sparse attention in training.

    Longer positions come with the model: ``models.load(..., rope_scaling=...)``.  Recipe: AdamW, 2e-5 (1e-5 at 70B),
    constant after 20 steps of warm-up, no weight decay, 1000 steps of 64 texts, bf16 (section 4.1).

    Args:
        rank: r.
        alpha: α; None for `rank`.
        select: what LoRA adapts, a pattern over the model's names (see `pj.select`).
        group: g: a share of the text's tokens (a float in (0, 1]), or a number of tokens (an int, 1 or more).
        wrap: the groups of algorithm 1, where early tokens see later ones through the shifted heads.
        train: what trains whole; None for nothing.  A tied head trains with its embedding.
        dropout: the rate on the adapters' input, active when a call's ports carry a `micro_key` (training).
        dtype: of a and b.
        name: what tells this method from another of its kind in one chain; also seeds its draws.

    Raises:
        ValueError: as `lora`, `unfreeze` and `shift_attention` do.

    >>> import jax, transformers, peft_jax as pj
    >>> from peft_jax import methods, models
    >>> sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=50)
    >>> model = models.from_config(transformers.LlamaConfig(**sizes), jax.random.key(1))
    >>> params, forward = methods.longlora(rank=2)(jax.random.key(0), model.params, model.forward)
    >>> pj.count(params).trainable == 4 * 2 * (16 + 16) + 50 * 16 + 3 * 16
    True
    """
    parts = [lora(rank, alpha, select, dropout=dropout, dtype=dtype, name=name)]
    if train is not None:
        parts.append(unfreeze(train, name=f"{name}.whole"))
    return chain(*parts, shift_attention(group, wrap=wrap))
