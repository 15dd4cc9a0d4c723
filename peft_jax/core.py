"""The core: a method is a pair of pure functions, and methods chain.

    params, forward = method(key, params, forward)

`Method.init` replaces leaves of the parameter tree by typed ones (see `peft_jax.weights`); `Method.wrap` rewrites, for
one call, what the forward function is given.  Nothing else is needed for the eleven methods of this library, and
nothing here knows any of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Params = Any  # a pytree of arrays and Weights
Path = tuple[str, ...]  # where a leaf lies in the tree, e.g. ("model", "layers", "self_attn", "q_proj", "kernel")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Inputs:
    """What a language model reads.  Only `tokens` is needed.

    tokens      int32 [batch, time]
    mask        bool [batch, time], False at padding
    positions   int32 [batch, time]; by default each row counts its real tokens from 0
    segments    int32 [batch, time], 0 at padding: tokens of different segments do not see each other (packing)
    types       int32 [batch, time], which of two texts a token belongs to (BERT); by default all to the first
    infix       int32 [batch], the real token of each row before which a prefix's rows stand, counted from 0; by
                default the first.  Earlier tokens keep their positions and, in a causal model, do not see the rows
    decoder_tokens, decoder_mask   as `tokens` and `mask`, of what an encoder-decoder model writes: its outputs are
                these tokens', and the ones above are its source
    cache       a model's key-value cache; with one, a call gives ``(outputs, cache)``
    """

    tokens: Any
    mask: Any = None
    positions: Any = None
    segments: Any = None
    types: Any = None
    infix: Any = None
    decoder_tokens: Any = None
    decoder_mask: Any = None
    cache: Any = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Ports:
    """What a model lets a method touch beside its weights; all optional.

    prompt      [p, d] soft tokens, or [batch, p, d]; an encoder-decoder model's stand before its source
    prefix      (keys, values) of every layer, [layers, l, heads, dim], or [layers, batch, l, heads, dim]; of an
                encoder-decoder model a dict of them, by the names of `Spec.attentions`
    alone       bool [batch], or one for all: the rows that go without prompt and prefix
    attend      the attention function: a module-level function or a frozen dataclass (static: it is compiled in)
    step_key    one key for a whole optimiser step, the same on every micro-batch and device
    micro_key   a fresh key for each micro-batch; its presence turns dropout on
    adapter     int32 [batch]: which adapter each row uses
    """

    prompt: Any = None
    prefix: Any = None
    alone: Any = None
    step_key: Any = None
    micro_key: Any = None
    adapter: Any = None
    attend: Callable[..., Array] | None = dataclasses.field(default=None, metadata={"static": True})


def dotted(path: Path) -> tuple[str, ...]:
    """The name of a leaf in a model that has no other: its own path, without the final ``kernel`` or ``embedding``."""
    return (".".join(path[:-1] if path[-1] in ("kernel", "embedding") and len(path) > 1 else path),)


@dataclasses.dataclass(frozen=True, eq=False)
class Spec:
    """What a model says of itself.

    `names(path)` gives the source model's own names for a leaf (``model.layers.3.self_attn.q_proj``), one for each
    matrix of a stacked leaf; `stacked(path)` says whether the leaf's first axis is layers, `experts(path)` how many
    experts its next axis counts, 0 where it has none, and `looked_up(path)` whether it is a table whose rows are looked
    up.  `tensors` is the source
    checkpoint's table (`peft_jax.models.tensors.Tensor`), empty where there is none; `tied` lists the source's modules
    that reuse an embedding's table, each with that embedding: ``("lm_head", "model.embed_tokens")``.  `embedding` is
    where the tokens' embedding lies, and `embedding_scale` what the model multiplies its rows by; `positions` is what
    is left of them for real tokens; `labels` is how many a head chooses from, 0 where it chooses from the vocabulary.

    An encoder-decoder model has `start`, the tokens that its decoder begins with, `decoder_positions`, and
    `attentions`: (layers, kv_heads, head_dim) of its ``encoder``, its ``decoder`` and its ``cross`` attention, from the
    decoder to the source.
    """

    width: int = 0
    layers: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    vocab: int = 0
    positions: int = 0
    decoder_positions: int = 0
    labels: int = 0
    start: tuple[int, ...] = ()
    attentions: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    ports: frozenset[str] = frozenset()
    names: Callable[[Path], tuple[str, ...]] = dotted
    stacked: Callable[[Path], bool] = lambda path: False
    experts: Callable[[Path], int] = lambda path: 0
    looked_up: Callable[[Path], bool] = lambda path: path[-1] == "embedding"
    tensors: tuple[Any, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    embedding: Path = ()
    embedding_scale: float = 1.0
    cache: Callable[..., Any] | None = None  # cache(batch, length, dtype) -> an empty key-value cache


Rewrite = Callable[[Params, Ports], tuple[Params, Ports]]


@dataclasses.dataclass(frozen=True, eq=False)
class Forward:
    """A pure forward function in two halves: ``forward(params, inputs, ports) == head(params, features(...))``.

    Losses over long vocabularies use the halves, so that full logits never exist.  `features` takes
    ``(params, Inputs, Ports)``, `head` takes ``(params, features, ports)``.
    """

    features: Callable[..., Any]
    head: Callable[..., Any] = lambda params, features, ports: features
    spec: Spec = Spec()

    def __call__(self, params: Params, inputs: Any, ports: Ports = Ports()) -> Any:
        inputs = as_inputs(inputs)
        check_inputs(inputs, self.spec)
        out = self.features(params, inputs, ports)
        if inputs.cache is None:
            return self.head(params, out, ports)
        features, cache = out
        return self.head(params, features, ports), cache

    def rewritten(self, rewrite: Rewrite) -> "Forward":
        """The same model, with `rewrite(params, ports)` applied before each call: what a `Method.wrap` is made of."""

        def features(params: Params, inputs: Any, ports: Ports) -> Any:
            params, ports = rewrite(params, ports)
            return self.features(params, inputs, ports)

        def head(params: Params, features: Any, ports: Ports) -> Any:
            params, ports = rewrite(params, ports)
            return self.head(params, features, ports)

        return dataclasses.replace(self, features=features, head=head)


def as_inputs(inputs: Any) -> Inputs:
    return inputs if isinstance(inputs, Inputs) else Inputs(tokens=jnp.asarray(inputs))


def check_inputs(inputs: Inputs, spec: Spec) -> None:
    """Raises on a sequence longer than the model's positions and, outside jit, on ids beyond the vocabulary; on an
    encoder-decoder model without tokens for its decoder, and on another model with them."""
    if spec.attentions and inputs.decoder_tokens is None:
        raise ValueError(
            "an encoder-decoder model needs Inputs(tokens, decoder_tokens=...): a source, and what it writes"
        )
    if spec.vocab and not spec.attentions and inputs.decoder_tokens is not None:
        raise ValueError("this is no encoder-decoder model, which could read decoder_tokens: give it tokens alone")
    if inputs.tokens is not None:
        check_tokens(inputs.tokens, spec)
    if inputs.decoder_tokens is not None:
        check_tokens(inputs.decoder_tokens, dataclasses.replace(spec, positions=spec.decoder_positions))


def check_tokens(tokens: Any, spec: Spec) -> None:
    """Raises on a sequence longer than the model's positions and, outside jit, on ids beyond the vocabulary."""
    if spec.positions and tokens.shape[-1] > spec.positions:
        raise ValueError(
            f"the sequence has {tokens.shape[-1]} tokens and the model has {spec.positions} positions: "
            "cut the sequence, or load the model with a longer position range"
        )
    if spec.vocab and not isinstance(tokens, jax.core.Tracer) and tokens.size:
        ids = np.asarray(tokens)  # first of all: under jit, even the minimum of a constant is traced
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= spec.vocab:
            raise ValueError(
                f"token id {low if low < 0 else high} is outside the vocabulary of {spec.vocab}: "
                "is this the model's own tokenizer?"
            )


class Method(NamedTuple):
    """The uniform interface of every method: ``params, forward = method(key, params, forward)``.

    init    (key, params, forward) -> params: puts typed leaves where the method acts, sharing the base's buffers
    wrap    forward -> forward: hands each call's randomness and ports to those leaves

    >>> import jax, peft_jax as pj
    >>> identity = pj.chain()
    >>> forward = pj.Forward(lambda params, inputs, ports: pj.linear(inputs.tokens, params["kernel"]))
    >>> params, forward = identity(jax.random.key(0), {"kernel": jax.numpy.eye(2)}, forward)
    >>> forward(params, jax.numpy.ones((1, 2))).tolist()
    [[1.0, 1.0]]
    """

    init: Callable[[Array, Params, Forward], Params]
    wrap: Callable[[Forward], Forward] = lambda forward: forward

    def __call__(self, key: Array, params: Params, forward: Forward) -> tuple[Params, Forward]:
        return self.init(key, params, forward), self.wrap(forward)


def chain(*methods: Method) -> Method:
    """One method made of several, applied from left to right.  Associative; ``chain()`` is the identity.

    Every method gets the same key: randomness comes from names (`peft_jax.trees.Site.keys`), so adding a method to a
    chain never reseeds another, and ``chain(a, chain(b, c))`` draws what ``chain(chain(a, b), c)`` draws.
    """

    def init(key: Array, params: Params, forward: Forward) -> Params:
        for method in methods:
            params = method.init(key, params, forward)
        return params

    def wrap(forward: Forward) -> Forward:
        for method in methods:
            forward = method.wrap(forward)
        return forward

    return Method(init, wrap)


Tokens = Int[Array, "batch time"]
Logits = Float[Array, "batch time vocab"]
Mask = Bool[Array, "batch time"]
