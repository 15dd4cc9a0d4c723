"""The engine: the host's bookkeeping and the device's step, one round of scheduling at a time.

    engine = Engine(model, rows=20_000)
    engine.load("fr", "adapters/fr")
    number = engine.submit(tokens, Sampling(max_tokens=32), adapter="fr")
    while engine.busy:
        for event in engine.step():
            print(event.text, end="")

Not thread-safe: one thread calls it.  All that is slow elsewhere, the reading of adapters, has threads of its own; the
transfer of those that will be needed next is started while the device computes.
"""

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from peft_jax.interop.hf_peft import files
from peft_jax.serving import packing, pool, tensor
from peft_jax.serving.events import Event, TokenLogprob, Usage
from peft_jax.serving.policies import Policy
from peft_jax.serving.prefixes import PrefixCache
from peft_jax.serving.requests import Finish, Refused, Request, Sampling
from peft_jax.serving.rounds import Limits, Plan
from peft_jax.serving.rows import Allocator
from peft_jax.serving.scheduler import Scheduler
from peft_jax.serving.step import MOST_LOGPROBS, Batch, Chosen, Device, Shapes, fit
from peft_jax.serving.store import AdapterInfo, AdapterStore
from peft_jax.serving.text import Text

FINISHES: tuple[Finish, ...] = ("stop", "length", "cancelled", "aborted", "error")
KEPT = 4096  # requests whose gaps are remembered
IDLE = 0.002  # seconds for which a round that can compute nothing waits for an adapter to be read


class Bounds(NamedTuple):
    """What a request is held to."""

    context: int


class Placed(NamedTuple):
    """Where an adapter lies: its rank, its rows at each target, and the tables made of them so far, by rank."""

    rank: int
    ids: Any
    tables: dict[int, np.ndarray]


class Engine:
    """Serves requests for one base and any number of adapters.

    Args:
        model: of `models.load`, its layers stacked; its base may be in few bits.
        rows: of the pool.
        mesh: devices that share the model and the pool, on its axis ``tensor`` (`peft_jax.sharding.mesh`).
        name: what the base is called.
        dtype: of the pool: keys, values and adapters.
        context: tokens of prompt and answer together; by default the model's positions, if the shapes have them.
        shapes: the sizes that batches are filled up to.
        policy, limits: who comes next, and the bounds of a round; what the shapes bound is taken from them.
        host_bytes: of the copies of adapters in host memory.
        prefix_block: tokens in a block of the prefix cache; 0 for no cache.
        clock: seconds.
        seed: of the requests that bring none.

    Raises:
        ValueError: if the model cannot be served: no cache, layers that are not stacked, positions that lack, key heads
            that the mesh does not divide.
    """

    def __init__(
        self,
        model: Any,
        *,
        rows: int,
        mesh: Mesh | None = None,
        name: str = "base",
        dtype: Any = jnp.float32,
        context: int | None = None,
        shapes: Shapes = Shapes(),  # noqa: B008 (frozen)
        policy: Policy | None = None,
        limits: Limits = Limits(),  # noqa: B008 (frozen)
        host_bytes: int = 1 << 30,
        prefix_block: int = 16,
        clock: Callable[[], float] = time.monotonic,
        seed: int = 0,
    ) -> None:
        spec = model.forward.spec
        if spec.cache is None or spec.attentions:
            raise ValueError("only decoders are served: this model has no key-value cache of its own")
        longest = shapes.context[-1] + 1
        self.limits = Bounds(min(longest, spec.positions or longest) if context is None else context)
        if self.limits.context > min(longest, spec.positions or longest):
            raise ValueError(
                f"context={context}: the model has {spec.positions} positions and the largest shape {longest} tokens"
            )
        self.model_name, self.tokenizer, self.shapes, self.clock = name, model.tokenizer, shapes, clock
        self.vocabulary = spec.vocab
        tensor.check(spec, model.params, mesh)
        self.targets = pool.targets_of(model.forward, model.params, mesh)
        self.device = Device(model.forward, model.params, self.targets, rows, dtype, mesh)
        allocator, width = Allocator(rows), self.device.width

        def read(directory: str) -> packing.Packed:
            return packing.read(directory, model, self.targets, width, jnp.dtype(dtype))

        self.store = AdapterStore(allocator, read, self._put, host_bytes)
        self.scheduler = Scheduler(
            allocator,
            self.store,
            PrefixCache(allocator, prefix_block),
            policy=policy,
            limits=dataclasses.replace(
                limits,
                max_batch=min(limits.max_batch, shapes.rows[-1]),
                prefill_rows=shapes.prompts,
                chunk=shapes.chunk,
            ),
        )
        self._ends = _ends_of(model)
        self._texts = dict[int, Text]()
        self._random = np.random.default_rng(seed)
        self._seeds = dict[int, int]()
        self._last = 0
        self._finished = dict.fromkeys(FINISHES, 0)
        self._counted = {"tokens_prompt_total": 0, "tokens_generated_total": 0, "steps_total": 0}
        self.gaps: dict[int, float] = {}
        """Of the latest requests, the smallest distance of the two largest logits at their tokens: near-ties."""

    # -- what is asked of it ------------------------------------------------------------------------------------------

    @property
    def busy(self) -> bool:
        return self.scheduler.busy

    def submit(self, prompt: Sequence[int], sampling: Sampling, adapter: str | None = None, priority: int = 0) -> int:
        """Takes a request into the queue, and gives its number.

        Raises:
            Refused: if it can never be served (an unknown adapter, too long), or the queue is full.
        """
        if not len(prompt):
            raise Refused("the prompt is empty: give one token or more")
        if len(prompt) + sampling.max_tokens > self.limits.context:
            raise Refused(
                f"a prompt of {len(prompt)} tokens and {sampling.max_tokens} new ones exceed the {self.limits.context} "
                "tokens that a request has: shorten the prompt or lower max_tokens"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.vocabulary:
            raise Refused(f"the prompt has a token that is not in the vocabulary of {self.vocabulary}")
        if (sampling.logprobs or 0) > MOST_LOGPROBS:
            raise Refused(f"logprobs is {sampling.logprobs}: {MOST_LOGPROBS} are told at most")
        request = Request(self._last + 1, prompt, sampling, adapter, self.clock(), priority)
        self.scheduler.add(request, request.arrived)
        self._last = request.id
        self._texts[request.id] = Text(self.tokenizer, prompt, sampling.stop)
        seed = self._random.integers(1 << 32) if sampling.seed is None else sampling.seed
        self._seeds[request.id] = int(seed) % (1 << 32)
        return request.id

    def cancel(self, request_id: int) -> None:
        """Gives up a request and what it holds; nothing where it is unknown or finished."""
        request = self.scheduler.cancel(request_id, self.clock())
        if request is not None:
            self._end(request)

    def load(self, name: str, directory: str | os.PathLike[str]) -> int:
        """Registers the adapter of a directory, which is read when a request wants it; gives the load's identity.

        One that has the name already serves the requests that it has, and is then gone.

        Raises:
            Refused: if the name is the base's.
            FileNotFoundError, ValueError: if the directory holds no adapter in HF PEFT's format.
        """
        if name == self.model_name:
            raise Refused(f"{name!r} is the base's name: load the adapter under another", 409)
        files.read_config(Path(directory))
        return self.store.register(name, directory)

    def unload(self, name: str) -> None:
        """Takes no more requests for an adapter; it is gone once its last one is done."""
        self.scheduler.unload(name)

    def adapters(self) -> list[AdapterInfo]:
        return self.store.infos()

    def stats(self) -> dict[str, float]:
        """Counters, whose names end in ``_total``, and gauges."""
        return {
            "requests_running": len(self.scheduler.running),
            "requests_waiting": len(self.scheduler.waiting),
            **{f"requests_finished_total{{{finish}}}": n for finish, n in self._finished.items()},
            **self._counted,
            **self.scheduler.rows(),
            **self.store.counts,
            "adapter_loads_total": self.store.puts,
            "adapter_evictions_total": self.store.evictions,
            "preemptions_total": self.scheduler.preemptions,
            "prefix_hit_tokens_total": self.scheduler.hit_tokens,
            "compilations_total": len(self.device.programs),
        }

    def close(self) -> None:
        self.store.close()

    # -- one round ----------------------------------------------------------------------------------------------------

    def step(self) -> list[Event]:
        """One round of scheduling and computing; what came of it, request by request."""
        plan = self.scheduler.plan(self.clock())
        events = [self._last_event(dropped.request) for dropped in plan.aborted]
        if not plan.fed:
            self.store.wait(IDLE)
            return events
        started = [(rows, self._start(rows)) for rows in _calls(plan)]
        self.scheduler.bring(plan)
        self._counted["steps_total"] += len(started)
        chosen = [(rows, Chosen(*map(np.asarray, found))) for rows, found in started]  # waits for the device
        now = self.clock()
        self.scheduler.computed(plan, now)
        for rows, found in chosen:
            for i, (request, n) in enumerate(rows):
                self._counted["tokens_prompt_total"] += 0 if request.generated else n
                if request.state == "running" and not request.uncached:
                    events.append(self._token(request, i, found, now))
        return events

    def _start(self, rows: list[tuple[Request, int]]) -> Chosen:
        """Starts the device on some tokens of some requests."""
        shapes, decode = self.shapes, all(r.uncached == 1 for r, _ in rows)
        batch = fit(len(rows), shapes.rows, "rows") if decode else shapes.prompts
        time = 1 if decode else shapes.chunk
        earlier = fit(max(1, *(r.cached for r, _ in rows)), shapes.context, "earlier tokens")
        placed = [self.store.resident(r.identity).tables if r.identity else None for r, _ in rows]
        rank = fit(max(p.rank if p else 0 for p in placed), shapes.ranks, "directions")
        made = _empty(batch, time, earlier, self.device, rank)
        for i, ((request, n), adapter) in enumerate(zip(rows, placed, strict=True)):
            past, s = request.cached, request.sampling
            made.tokens[i, :n] = request.tokens[past : past + n]
            made.past[i], made.new[i] = past, n
            made.context[i, :past, 0], made.context[i, :past, 1] = request.key_rows[:past], request.value_rows[:past]
            made.ids[i, :n, 0] = request.key_rows[past : past + n]
            made.ids[i, :n, 1] = request.value_rows[past : past + n]
            made.temperature[i], made.top_p[i], made.top_k[i] = s.temperature, s.top_p, s.top_k
            made.seed[i], made.number[i] = self._seeds[request.id], len(request.generated)
            if adapter and rank:
                if rank not in adapter.tables:
                    adapter.tables[rank] = self.device.table(adapter.ids, rank)
                made.adapters[i] = adapter.tables[rank]
        ranked = np.bool_(any(r.sampling.logprobs is not None for r, _ in rows))
        return self.device.step(dataclasses.replace(made, ranked=ranked))

    def _token(self, request: Request, row: int, found: Chosen, now: float) -> Event:
        """What a drawn token makes of its request."""
        if not np.isfinite(found.gap[row]):
            self.scheduler.finish(
                request, "error", now, "the model gave no numbers for this request: its adapter is damaged"
            )
            return self._last_event(request)
        token, sampling, text = int(found.token[row]), request.sampling, self._texts[request.id]
        self.scheduler.append(request, token, now)
        self._counted["tokens_generated_total"] += 1
        self.gaps[request.id] = min(self.gaps.get(request.id, np.inf), float(found.gap[row]))
        logprobs = None
        if sampling.logprobs is not None:
            top = zip(found.top[row].tolist(), found.top_logprob[row].tolist(), strict=True)
            logprobs = (TokenLogprob(token, float(found.logprob[row]), tuple(top)[: sampling.logprobs]),)
        ended = token in self._ends and not sampling.ignore_end
        said, stopped = ("", False) if ended else text.add(token)
        if ended or stopped:
            self.scheduler.finish(request, "stop", now)
        elif not request.left:
            self.scheduler.finish(request, "length", now)
        if request.state == "finished":
            said += "" if stopped else text.finish()
            return dataclasses.replace(self._last_event(request), tokens=(token,), text=said, logprobs=logprobs)
        return Event(request.id, (token,), said, logprobs)

    def _last_event(self, request: Request) -> Event:
        usage = Usage(request.prompt_length, len(request.generated), request.hit)
        self._end(request)
        return Event(request.id, finish=request.finish, reason=request.reason, usage=usage)

    def _end(self, request: Request) -> None:
        assert request.finish is not None
        self._finished[request.finish] += 1
        del self._texts[request.id], self._seeds[request.id]
        while len(self.gaps) > KEPT:
            del self.gaps[next(iter(self.gaps))]

    def _put(self, rows: np.ndarray, packed: packing.Packed) -> Placed:
        fit(packed.rank, self.shapes.ranks, "directions")
        self.device.put(rows, packed.block)
        return Placed(packed.rank, packed.ids(rows), {})

    def warm_up(self) -> int:
        """Compiles every program that there can be, and gives how many."""
        for rank in (0, *self.shapes.ranks):
            for earlier in self.shapes.context:
                for batch, length in ((self.shapes.prompts, self.shapes.chunk), *((n, 1) for n in self.shapes.rows)):
                    np.asarray(self.device.step(_empty(batch, length, earlier, self.device, rank)).token)
        largest = pool.Tables(self.targets, self.device.width, self.shapes.ranks[-1]).size
        layers = self.device.layers
        for power in range(largest.bit_length() + 1):
            size = min(1 << power, self.device.total)
            none = np.zeros((layers, size, self.device.width), np.float32)
            self.device.put(np.full(size, self.device.total, np.int32), none)
        return len(self.device.programs)


def _calls(plan: Plan) -> list[list[tuple[Request, int]]]:
    """What goes through the device together: chunks of prompts, and single tokens."""
    return [rows for rows in (plan.prefill, [(request, 1) for request in plan.decode]) if rows]


def _empty(batch: int, time: int, earlier: int, device: Device, rank: int) -> Batch:
    """A batch of no request, to be filled in."""
    numbers = lambda *shape: np.zeros(shape, np.int32)  # noqa: E731
    floats = lambda: np.ones(batch, np.float32)  # noqa: E731
    return Batch(
        tokens=numbers(batch, time),
        past=numbers(batch),
        new=numbers(batch),
        context=numbers(batch, earlier, 2),
        ids=np.full((batch, time, 2), device.total, np.int32),
        adapters=numbers(batch, pool.Tables(device.targets, device.width, rank).size),
        temperature=floats() * 0,
        top_p=floats(),
        top_k=numbers(batch),
        seed=np.zeros(batch, np.uint32),
        number=numbers(batch),
        ranked=np.bool_(False),
        rank=rank,
    )


def _ends_of(model: Any) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's own generation config."""
    found = [getattr(source, "eos_token_id", None) for source in (model.tokenizer, model.generation, model.config)]
    return frozenset(int(i) for ids in found if ids is not None for i in np.ravel(ids))
