"""What the next step computes: who joins the batch, whose prompt goes on, who draws a token, and who must make room.

One round is plan, the device's step, computed, and then append and finish, request by request:

    plan = scheduler.plan(now)              # rows are taken, adapters put into the pool
    ...                                     # the step is started on plan.fed
    scheduler.bring(plan)                   # while the device computes: adapters that will be needed soon
    scheduler.computed(plan, now)           # its keys and values are in the pool
    scheduler.append(request, token, now)   # for each that has no uncached token left
    scheduler.finish(request, "stop", now)

**Admission.** A request joins when the pool will do for all that run until the last is done (S-LoRA's formula).  With
those that run and the new one sorted by tokens left, the most first, the first i are still there when the i-th ends,
and each of them has grown by left_i.  So it must hold that

    2 · max_i ( left_i · i + Σ_{j ≤ i} used_j )  ≤  rows − rows of adapters in use − rows of prefixes in use

Prompts that are still being computed end later than that; `rounds.peak` has the formula with such delays.
A request whose adapter is still being read keeps its place: it, and its adapter as far as its size is known, count for
those behind it.  What is idle, prefixes or adapters, counts as free, and is evicted when its rows are wanted, the least
recently used first.

**Optimism.** `max_tokens` is mostly more than what comes.  With `optimism` under 1 only that share of what is left is
reckoned with.  Then rows may run out, and the youngest request is preempted: its rows are taken back, and later all of
its tokens, drawn ones too, are computed anew.  Only an older request preempts a younger one, and a younger one that
finds no rows waits with what it holds: so the oldest always goes on, and everything ends.  A request that was
preempted goes first when it waits again, and while it is in the batch everyone is reckoned with in full: so none is
preempted twice.

**Starvation.** Where a policy reorders, a request that has waited for `patience` seconds goes before all that have not,
and what it cannot be given is given to nobody behind it.

Source: Sheng et al. 2023 (S-LoRA, arXiv 2311.03285), sections 4 and 5; its router's request queues.

Departures: there an equal sum is refused and the last token drawn is counted, though its key is never needed; here it
is not, and the bound may be reached.  Rows that requests share are counted once.  There, nothing is preempted, aged,
or kept for the next request.
"""

import math
from collections.abc import Sequence

import numpy as np

from peft_jax.serving.policies import Fcfs, Policy, View, by_arrival
from peft_jax.serving.prefixes import PrefixCache
from peft_jax.serving.requests import Finish, Full, Refused, Request
from peft_jax.serving.rounds import Dropped, Limits, Plan, delays, peak
from peft_jax.serving.rows import TOKEN_ROWS, Allocator, OutOfRows
from peft_jax.serving.store import AdapterStore


class Scheduler:
    """Requests from arrival to end.  Reads no clock: every time is given.

    Args:
        allocator: of the pool.
        store: the adapters.
        prefixes: the prefix cache; one that keeps nothing by default.
        policy: who comes next.
        limits: its bounds.

    >>> allocator = Allocator(101)
    >>> store = AdapterStore(allocator, read=lambda directory: None, put=lambda rows, packed: None, host_bytes=0)
    >>> scheduler = Scheduler(allocator, store, limits=Limits(chunk=4))
    >>> scheduler.add(Request(1, [5, 6, 7, 8, 9, 10]), now=0.0)
    >>> plan = scheduler.plan(0.1)
    >>> plan.prefill, allocator.free
    ([(Request(1, running, 0 of 6 tokens, None), 4)], 92)
    """

    def __init__(
        self,
        allocator: Allocator,
        store: AdapterStore,
        prefixes: PrefixCache | None = None,
        *,
        policy: Policy | None = None,
        limits: Limits | None = None,
    ):
        self.allocator = allocator
        self.store = store
        self.prefixes = prefixes or PrefixCache(allocator, 0)
        self.policy = policy or Fcfs()
        self.limits = limits or Limits()
        self.waiting: dict[int, Request] = {}
        self.running: dict[int, Request] = {}
        self._since: dict[int, float] = {}  # when each that runs was admitted, this time
        self.preemptions = 0
        self.hit_tokens = 0
        self.step = 0.0
        """Seconds that a step takes, a moving average."""
        self._arrived = 0
        self._arriving = 0.0
        self._admitting = 0.0
        self._served: dict[int, float] = {}

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs."""
        return bool(self.waiting or self.running)

    # What the engine calls.

    def add(self, request: Request, now: float) -> None:
        """Takes a request into the queue.

        Raises:
            Refused: if its adapter is unknown or has failed, or the pool can never hold it.
            Full: if the queue is full.
            ValueError: if a request of this id is here already.
        """
        identity = self.store.find(request.adapter) if request.adapter is not None else 0
        if refusal := self._too_large(request, identity):
            raise refusal
        if len(self.waiting) >= self.limits.queue:
            raise Full(len(self.waiting), self.retry_after())
        if request.id in self.waiting or request.id in self.running:
            raise ValueError(f"request {request.id} is here already: give each a number of its own")
        if self.policy.cost(1, 1):
            self._catch_up(identity)
        request.identity = identity
        self.store.join(identity)
        self.waiting[request.id] = request
        self._arrived += 1

    def plan(self, now: float) -> Plan:
        """What the next step computes; takes the rows for it."""
        plan = Plan(now)
        self.store.poll()
        self._drop(plan)
        first, order = self._order(now)
        self._admit(plan, first, order)
        for request in sorted(self.running.values(), key=lambda r: self._seniority(r, now)):
            if request.id in self.running:
                self._schedule(plan, request)
        ahead = [r for r in order if r.state == "waiting"][: self.limits.lookahead]
        wanted = list(dict.fromkeys(r.identity for r in ahead if r.identity and r.state == "waiting"))
        self.store.prefetch(wanted, now)
        plan.prefetch = [identity for identity in wanted if not self.store.is_resident(identity)]
        self._arriving += 0.1 * (self._arrived - self._arriving)
        self._admitting += 0.1 * (len(plan.admitted) - self._admitting)
        self._arrived = 0
        self._forget()
        return plan

    def bring(self, plan: Plan) -> list[int]:
        """Puts adapters that are needed soon into the pool, where those that run leave room; gives which.

        To be called while the device computes, so that the transfer costs no time.
        """
        brought = list[int]()
        batch = list(self.running.values())
        for identity in plan.prefetch:
            if self.store.is_resident(identity) or self.store.failure(identity) or not self.store.ready(identity):
                continue
            in_use = {identity, *brought, *(r.identity for r in batch)}
            used_before = math.nextafter(plan.now, -math.inf)  # what waiting requests need is never evicted for others
            if not self._fits(batch, in_use, plan.now) or not self._room(self.store.size(identity), used_before):
                break
            try:
                self.store.make_resident(identity)
            except Refused:  # the requests that want it are told in the next plan
                continue
            brought.append(identity)
        return brought

    def computed(self, plan: Plan, now: float) -> None:
        """The step is done: what it fed has its keys and values in the pool."""
        for request, n in plan.fed:
            if request.state != "running":
                continue
            prompt_was_cached = request.cached >= request.prompt_length
            request.cached += n
            if not prompt_was_cached and request.cached >= request.prompt_length:
                self._keep(request, now)
        seconds = max(0.0, now - plan.now)
        self.step += (0.3 if self.step else 1.0) * (seconds - self.step)

    def append(self, request: Request, token: int, now: float) -> None:
        """A token was drawn for a running request.

        Raises:
            ValueError: if it does not run, or has drawn all its tokens.
        """
        if request.state != "running" or not request.left:
            raise ValueError(f"{request!r} draws no token: it is {request.state}, with {request.left} tokens left")
        request.tokens.append(token)
        if request.first_token_at is None:
            request.first_token_at = now
        self._charge(request, 0, 1)

    def finish(self, request: Request, finish: Finish, now: float, reason: str = "") -> None:
        """Ends a request and gives back all it has; what it computed is kept for others, but after an error."""
        if request.state == "finished":
            return
        if request.state == "running":
            self._release(request, now, keep=finish != "error")
        self._end(request, finish, reason)
        self._forget()

    def cancel(self, id: int, now: float) -> Request | None:
        """Ends a request in whatever state; gives it, or None if it is unknown or finished."""
        request = self.waiting.get(id) or self.running.get(id)
        if request:
            self.finish(request, "cancelled", now)
        return request

    def unload(self, name: str) -> None:
        """Drains an adapter: no new users, and gone after the last.

        Raises:
            Refused: if no adapter has this name.
        """
        self.store.unregister(name)
        self._forget()

    def retry_after(self) -> float:
        """Seconds until a request that came now would have its turn, from 1 to 60."""
        return min(60.0, max(1.0, len(self.waiting) * self.step / max(self._admitting, 1e-3)))

    def rows(self) -> dict[str, int]:
        """What the rows of the pool hold; what a running request and the prefix cache have in common is the cache's."""
        total, free = self.allocator.total, self.allocator.free
        adapters, prefixes = self.store.rows, self.prefixes.rows
        return {
            "rows_total": total,
            "rows_free": free,
            "rows_kv": total - free - adapters - prefixes,
            "rows_adapters": adapters,
            "rows_prefixes": prefixes,
        }

    # Who waits.

    def _drop(self, plan: Plan) -> None:
        view = self._view(plan.now)
        for request in list(self.waiting.values()):
            if failure := self.store.failure(request.identity):
                self._give_up(plan, request, "error", failure.reason)
            elif request.first_token_at is None and (why := self.policy.gives_up(request, view)):
                self._give_up(plan, request, "aborted", why)

    def _give_up(self, plan: Plan, request: Request, finish: Finish, reason: str) -> None:
        self._end(request, finish, reason)
        plan.aborted.append(Dropped(request, finish, reason))

    def _order(self, now: float) -> tuple[set[int], list[Request]]:
        """The ids of those that go first, whatever the policy, and all that wait, in order."""
        first, rest = list[Request](), list[Request]()
        for request in self.waiting.values():
            goes_first = request.preemptions or now - request.arrived >= self.limits.patience
            (first if goes_first else rest).append(request)
        first.sort(key=lambda r: self._seniority(r, now))
        return {r.id for r in first}, first + self.policy.order(rest, self._view(now))

    def _seniority(self, request: Request, now: float) -> tuple[bool, int, float, int]:
        """A sorting key; that of a request that runs stays as it was when it was admitted."""
        if request.state == "running":
            now = self._since[request.id]
        return now - request.arrived < self.limits.patience, *by_arrival(request)

    def _view(self, now: float) -> View:
        running = list(self.running.values())
        return View(now, running, self.step, self._arriving, self._admitting, self._served, self.limits.chunk)

    # Who joins.

    def _admit(self, plan: Plan, first: set[int], order: list[Request]) -> None:
        held = list[Request]()  # their adapters are still being read, and they keep their places
        batch = {r.identity for r in self.running.values()}
        for request in order:
            if len(self.running) + len(held) >= self.limits.max_batch or len(held) >= self.limits.lookahead:
                return
            if not self.policy.allows(request.identity, batch):
                if request.id in first:
                    return
            elif not self.store.ready(request.identity):
                held.append(request)
                batch.add(request.identity)
            elif refusal := self._too_large(request, request.identity):  # its adapter's size was not known before
                self._give_up(plan, request, "error", refusal.reason)
            elif not self._join(plan, request, held):
                return
            elif request.state == "running":
                batch.add(request.identity)

    def _join(self, plan: Plan, request: Request, held: list[Request]) -> bool:
        n, key_rows, value_rows = self.prefixes.match(request.identity, request.tokens, plan.now)
        request.hold(key_rows, value_rows)
        request.cached = request.shared = n
        batch = [*self.running.values(), *held, request]
        self.store.pin(request.identity)
        try:
            if not self._fits(batch, {r.identity for r in batch}, plan.now):
                raise OutOfRows(0, 0)
            if not self.store.is_resident(request.identity):
                self._room(self.store.size(request.identity))
                self.store.make_resident(request.identity)
        except (OutOfRows, Refused) as error:
            self.allocator.give_back(request.let_go())
            self.store.unpin(request.identity, plan.now)
            if isinstance(error, Refused):
                self._give_up(plan, request, "error", error.reason)
            return isinstance(error, Refused)
        del self.waiting[request.id]
        self.running[request.id] = request
        self._since[request.id] = plan.now
        request.state = "running"
        self.hit_tokens += n
        if request.admitted_at is None:
            request.admitted_at, request.hit = plan.now, n
            self._charge(request, request.prompt_length, 0)
        plan.admitted.append(request)
        return True

    def _fits(self, batch: Sequence[Request], identities: set[int], now: float) -> bool:
        batch = sorted(batch, key=lambda r: self._seniority(r, now))
        share = 1.0 if any(r.preemptions for r in batch) else self.limits.optimism
        left = [math.ceil(share * max(0, r.left - 1)) for r in batch]
        wait = delays([r.uncached for r in batch], self.limits.chunk, self.limits.prefill_rows)
        tokens = peak([len(r.tokens) - r.shared for r in batch], left, wait)
        taken = sum(self.store.size(identity) for identity in identities) + self.prefixes.busy_rows
        return TOKEN_ROWS * tokens + taken <= self.allocator.total

    def _too_large(self, request: Request, identity: int) -> Refused | None:
        tokens = request.prompt_length + request.sampling.max_tokens - 1
        rows, total = TOKEN_ROWS * tokens + self.store.size(identity), self.allocator.total
        reason = (
            f"the request can take {rows} rows, for {tokens} tokens and its adapter, and the pool has {total}: send a "
            "shorter prompt or a smaller max_tokens"
        )
        return Refused(reason, 413) if rows > total else None

    # Who computes.

    def _schedule(self, plan: Plan, request: Request) -> None:
        n = min(request.uncached, self.limits.chunk)
        decodes = request.uncached == 1
        if n < 1 or (not decodes and len(plan.prefill) >= self.limits.prefill_rows):
            return
        short = TOKEN_ROWS * (request.cached + n - request.held)
        while short > 0 and not self._room(short):
            youngest = max(self.running.values(), key=lambda r: self._seniority(r, plan.now))
            if youngest is request:
                break
            self._preempt(plan, youngest)
        if (tokens := min(short, self.allocator.free) // TOKEN_ROWS) > 0:
            request.hold(*np.split(self.allocator.take(TOKEN_ROWS * tokens), TOKEN_ROWS))
        n = min(n, request.held - request.cached)
        if n and decodes:
            plan.decode.append(request)
        elif n:
            plan.prefill.append((request, n))

    def _room(self, rows: int, before: float = math.inf) -> bool:
        """Evicts what is idle, the least recently used first, until so many rows are free; whether they are."""
        while (short := rows - self.allocator.free) > 0:
            self.prefixes.evict(short, min(before, self.store.oldest()))
            if self.allocator.free < rows and not self.store.evict(before):
                self.prefixes.evict(rows - self.allocator.free, before)
                break
        return self.allocator.free >= rows

    def _preempt(self, plan: Plan, request: Request) -> None:
        self._release(request, plan.now, keep=True)
        request.state = "waiting"
        request.preemptions += 1
        self.waiting[request.id] = request
        self.preemptions += 1
        plan.preempted.append(request)

    # Who ends.

    def _keep(self, request: Request, now: float) -> None:
        n = request.cached
        rows = request.key_rows[:n], request.value_rows[:n]
        request.shared = self.prefixes.insert(request.identity, request.tokens[:n], *rows, now)

    def _release(self, request: Request, now: float, keep: bool) -> None:
        if keep:
            self._keep(request, now)
        self.allocator.give_back(request.let_go())
        self.store.unpin(request.identity, now)
        del self.running[request.id], self._since[request.id]

    def _end(self, request: Request, finish: Finish, reason: str) -> None:
        self.waiting.pop(request.id, None)
        request.state, request.finish, request.reason = "finished", finish, reason
        self.store.leave(request.identity)

    def _charge(self, request: Request, prompt: int, generated: int) -> None:
        if cost := self.policy.cost(prompt, generated):
            self._served[request.identity] = self._served.get(request.identity, 0.0) + cost

    def _catch_up(self, identity: int) -> None:
        """An adapter that nobody used for a while has no claim on what the others were given meanwhile."""
        active = {r.identity for r in (*self.waiting.values(), *self.running.values())}
        if active and identity not in active:
            least = min(self._served.get(i, 0.0) for i in active)
            self._served[identity] = max(self._served.get(identity, 0.0), least)

    def _forget(self) -> None:
        for identity in self.store.take_gone():
            self.prefixes.forget(identity)
            self._served.pop(identity, None)
