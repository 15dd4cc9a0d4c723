"""Scheduling: random traces on a small pool whose rows say what they hold, and what each policy claims."""

import itertools
import zlib
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from test_serving_host import Later, owned_as, packed

from peft_jax.serving.policies import Abort, Cluster, Fair, Fcfs
from peft_jax.serving.prefixes import PrefixCache
from peft_jax.serving.requests import Full, Refused, Request, Sampling
from peft_jax.serving.rounds import Limits, peak
from peft_jax.serving.rows import Allocator
from peft_jax.serving.scheduler import Scheduler
from peft_jax.serving.store import AdapterStore


class World:
    """A scheduler, and a device that is a dictionary: what was written last into each row of the pool."""

    def __init__(self, rows=101, block=4, policy=None, host_bytes=10**6, **limits):
        self.content, self.directories, self.later = {}, {}, Later()
        self.put_fails = lambda: False
        self.allocator = Allocator(rows)
        self.store = AdapterStore(self.allocator, self.read, self.put, host_bytes, self.later)
        self.scheduler = Scheduler(
            self.allocator,
            self.store,
            PrefixCache(self.allocator, block),
            policy=policy,
            limits=Limits(**{"max_batch": 6, "prefill_rows": 2, "chunk": 5, "lookahead": 3, **limits}),
        )
        self.now, self.ids, self.requests = 0.0, itertools.count(1), {}

    def read(self, directory):
        rows = int(directory.split("-")[0])
        if not rows:
            raise ValueError("the file is cut short")
        return SimpleNamespace(**vars(packed(rows)), name=directory)

    def put(self, rows, adapter):
        if self.put_fails():
            raise RuntimeError("the transfer failed")
        self.content.update({int(row): (adapter.name, i) for i, row in enumerate(rows)})

    def load(self, name, directory):
        self.directories[self.store.register(name, directory)] = directory

    def add(self, prompt, max_tokens=4, adapter=None, **kwargs):
        request = Request(next(self.ids), prompt, Sampling(max_tokens=max_tokens), adapter, self.now, **kwargs)
        self.scheduler.add(request, self.now)
        self.requests[request.id] = request
        return request

    def plan(self, seconds=1.0):
        self.now += seconds
        plan = self.scheduler.plan(self.now)
        limits = self.scheduler.limits
        assert len(plan.prefill) <= limits.prefill_rows and len(self.scheduler.running) <= limits.max_batch
        assert all(1 <= n <= limits.chunk and r.uncached > 1 for r, n in plan.prefill)
        assert all(r.uncached == 1 for r in plan.decode)
        assert len({r.id for r, _ in plan.fed}) == len(plan.fed)
        assert all(r.state == "running" for r, _ in plan.fed) and all(r.state == "waiting" for r in plan.preempted)
        assert all(d.request.state == "finished" and d.reason == d.request.reason != "" for d in plan.aborted)
        return plan

    def key(self, request, t):
        """What the key of a token is computed from: the adapter's load, and all tokens up to it."""
        return request.identity, zlib.crc32(np.array(request.tokens[: t + 1]).tobytes())

    def compute(self, plan, choose=lambda request: 0, ends=lambda request: False):
        """The device's step, which reads every row that it should."""
        for request, _ in plan.fed:
            if request.identity:
                rows, name = self.store.resident(request.identity).rows, self.directories[request.identity]
                assert [self.content[int(r)] for r in rows] == [(name, i) for i in range(len(rows))]
            for t in range(request.cached):
                assert self.content[int(request.key_rows[t])] == ("key", *self.key(request, t))
                assert self.content[int(request.value_rows[t])] == ("value", *self.key(request, t))
        for request, n in plan.fed:
            for t in range(request.cached, request.cached + n):
                self.content[int(request.key_rows[t])] = ("key", *self.key(request, t))
                self.content[int(request.value_rows[t])] = ("value", *self.key(request, t))
        self.scheduler.bring(plan)
        self.scheduler.computed(plan, self.now)
        for request, _ in plan.fed:
            if request.state == "running" and not request.uncached:
                self.scheduler.append(request, choose(request), self.now)
                if ends(request) or not request.left:
                    self.scheduler.finish(request, "stop" if request.left else "length", self.now)

    def step(self, **kwargs):
        self.later.run()
        plan = self.plan()
        self.compute(plan, **kwargs)
        return plan

    def run(self, steps=1000):
        for _ in range(steps):
            if not self.scheduler.busy:
                return
            self.step()
        raise AssertionError(f"no end after {steps} steps: {self.requests}")

    def check(self):
        scheduler, store = self.scheduler, self.store
        owners = Counter()
        for request in scheduler.running.values():
            owners.update(request.key_rows.tolist() + request.value_rows.tolist())
            assert request.shared <= request.cached <= request.held
        for block in scheduler.prefixes._blocks.values():
            owners.update(block.rows.reshape(-1).tolist())
        for load in store._residents.values():
            owners.update(load.resident.rows.tolist())
        owned_as(self.allocator, owners)
        assert sum(scheduler.rows().values()) == 2 * scheduler.rows()["rows_total"]
        running = Counter(r.identity for r in scheduler.running.values())
        accepted = running + Counter(r.identity for r in scheduler.waiting.values())
        for load in store._loads.values():
            assert (load.pins, load.users) == (running[load.identity], accepted[load.identity])
            assert load.resident or not load.pins
            assert not load.draining or load.users
        assert store.copies.nbytes == sum(x.nbytes for x in store._loads.values() if x.packed) <= store.copies.limit
        states = {"waiting": scheduler.waiting, "running": scheduler.running}
        for request in self.requests.values():
            assert [s for s, held in states.items() if request.id in held] == [request.state] * (not request.finish)
            assert request.state != "waiting" or request.held == 0
        return owners


POLICIES = [Fcfs(), Cluster(adapters=2), Abort(deadline=25.0), Fair()]


def trace(policy, optimism, seed):
    random = np.random.default_rng(seed)
    world = World(policy=policy, optimism=optimism, patience=20.0, queue=12, host_bytes=30 * 32)
    world.put_fails = lambda: random.random() < 0.02
    names = ["a", "b", "c", "d", "e"]
    for name in names:
        world.load(name, f"{random.integers(1, 20)}-{name}")
    prefixes = [random.integers(0, 3, 12).tolist() for _ in range(3)]
    seen = Counter()

    def act():
        action = random.random()
        if action < 0.55:
            prompt = prefixes[random.integers(3)][: random.choice([3, 12])] + random.integers(0, 3, 4).tolist()
            name = [None, *names][random.integers(6)]
            try:
                world.add(prompt, int(random.integers(1, 40)), name, priority=int(random.integers(2)))
            except Refused as error:
                seen[error.status] += 1
        elif action < 0.58:
            ids = [*world.scheduler.waiting, *world.scheduler.running, 10**9]
            cancelled = world.scheduler.cancel(int(random.choice(ids)), world.now)
            seen["cancelled"] += cancelled is not None
        elif action < 0.68:
            name = names[random.integers(5)]
            # Some cannot be read, and some are larger than the pool.
            world.load(name, f"{random.choice([0, 0, 200, *range(1, 12)])}-{name}{world.now}")
        elif action < 0.7:
            try:
                world.scheduler.unload(names[random.integers(5)])
            except Refused as error:
                seen[error.status] += 1
        else:
            world.later.run(int(random.integers(3)))

    def step(act):
        for _ in range(random.integers(4)):
            act()
        plan = world.plan()
        for dropped in plan.aborted:
            seen[dropped.finish] += 1
        if random.random() < 0.5:  # while the device computes, a client leaves
            ids = [*world.scheduler.waiting, *world.scheduler.running, 10**9]
            world.compute(plan, lambda r: int(random.integers(3)), lambda r: random.random() < 0.1)
            world.scheduler.cancel(int(random.choice(ids)), world.now) if random.random() < 0.1 else None
        else:
            world.compute(plan, lambda r: int(random.integers(3)), lambda r: random.random() < 0.1)
        seen["preempted"] += len(plan.preempted)
        if random.random() < 0.4:
            world.check()

    for _ in range(250):
        step(act)
    for _ in range(600):  # everything ends once nobody comes
        if not world.scheduler.busy:
            break
        step(world.later.run)
    assert not world.scheduler.busy
    assert max(request.preemptions for request in world.requests.values()) <= 1
    finished = Counter(request.finish for request in world.requests.values())
    assert all(request.state == "finished" for request in world.requests.values())
    assert all(len(r.generated) == r.sampling.max_tokens for r in world.requests.values() if r.finish == "length")
    for name in list(world.store._names):
        world.scheduler.unload(name)
    world.later.run()
    world.scheduler.plan(world.now)
    assert world.store.infos() == [] and world.store.copies.nbytes == 0
    world.scheduler.prefixes.evict(10**9)
    assert world.check() == Counter()
    return world, seen, finished


@pytest.mark.parametrize("optimism", [1.0, 0.0])
@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: type(policy).__name__)
def test_long_random_traces(policy, optimism):
    world, seen, finished = trace(policy, optimism, 0)
    # The trace has met what it is there to meet.
    assert min(finished["stop"], finished["length"], finished["cancelled"], finished["error"]) > 2, finished
    assert min(seen[413], seen[429], world.scheduler.hit_tokens, world.store.evictions) > 1, seen
    assert (seen["preempted"] > 2) if optimism < 1 else not seen["preempted"]  # the formula alone never needs to


def test_the_formula_is_the_papers_and_bounds_what_happens():
    random = np.random.default_rng(0)
    for _ in range(200):
        n = int(random.integers(1, 6))
        used, left, delay = random.integers(1, 30, n), random.integers(0, 20, n), random.integers(0, 9, n)
        pairs = sorted(zip(left, used, strict=True), key=lambda pair: -pair[0])
        papers = max(x * (i + 1) + sum(u for _, u in pairs[: i + 1]) for i, (x, _) in enumerate(pairs))
        assert peak(used.tolist(), left.tolist()) == papers

        def held(t, late, used=used, left=left):
            return sum((used + np.clip(t - late, 0, left))[t <= late + left])

        assert papers == max(held(t, 0 * delay) for t in range(40))
        bound = peak(used.tolist(), left.tolist(), delay.tolist())
        for late in (delay, random.integers(0, delay + 1)):  # as late as that, or earlier
            assert papers <= bound <= sum(used + left) and max(held(t, late) for t in range(40)) <= bound
    assert peak([], []) == 0


@pytest.mark.parametrize("spare", [0, -1])
def test_admission_counts_to_the_last_row(spare):
    # Prompts of 6 and 4, and an adapter of 5 rows: the first ends with 8 tokens, when the second has 6, which goes on
    # until it has 13.  So 14 tokens are the most.
    world = World(rows=1 + 28 + 5 + spare, block=0, chunk=6)
    world.load("a", "5-a")
    first, second = world.add(range(6), 3, "a"), world.add(range(4), 10)
    world.store.prefetch([1])
    world.later.run()
    plan = world.plan()
    assert plan.admitted == ([first, second] if spare == 0 else [first])
    least = world.allocator.free
    while world.scheduler.busy:
        world.compute(plan)
        plan = world.plan()
        least = min(least, world.allocator.free)
    assert world.scheduler.preemptions == least == 0 if spare == 0 else least > 0


def test_a_request_whose_adapter_is_read_keeps_its_place():
    world = World(rows=56, block=0)
    world.store.register("a", "10-a", rows=10)
    world.directories[1] = "10-a"
    first = world.add(range(10), 6, "a")
    large, small = world.add(range(10), 2), world.add(range(4), 2)
    plan = world.plan()
    assert plan.admitted == [] and first.state == large.state == "waiting"  # together 2 · (12 + 11) + 10 rows of 55
    world.scheduler.cancel(large.id, world.now)
    plan = world.plan()
    assert plan.admitted == [small] and plan.prefetch == [1]
    world.compute(plan)
    world.later.run()
    assert world.plan().admitted == [first]


def test_adapters_are_fetched_in_the_order_of_admission():
    world = World(rows=101, block=0, max_batch=1, lookahead=3)
    for name in "abcd":
        world.load(name, f"10-{name}")
    base = world.add(range(5), 30)
    world.add([1], 1, "c")
    world.add([1], 1, "a", priority=1)
    world.add([1], 1, "b")
    plan = world.plan()
    assert plan.admitted == [] and plan.prefetch == [1, 3]  # the greater priority first: its adapter is being read
    world.scheduler.cancel(4, world.now)
    world.later.run()
    plan = world.plan()
    assert [r.adapter for r in plan.admitted] == ["a"] and plan.prefetch == [3]
    assert world.store.is_resident(1) and not world.store.is_resident(3)
    world.compute(plan)  # during which the next adapter is put into the pool
    assert world.store.is_resident(3) and base.state == "waiting"
    plan = world.plan()
    assert plan.admitted == [base] and plan.prefetch == []
    world.compute(plan)
    world.run()
    assert world.store.puts == 2


def test_the_youngest_is_preempted_and_loses_nothing():
    world = World(rows=61, block=4, optimism=0.0)
    old, young = world.add(range(5), 20), world.add(range(10, 15), 20)  # 48 rows each, of 60
    drawn = itertools.count(100)
    plans = []
    while world.scheduler.busy:
        plans.append(world.step(choose=lambda r: next(drawn)))
        world.check()
        assert old.preemptions == 0
        if young.preemptions and young.state == "waiting":
            assert len(young.generated) > 5 and plans[-1].preempted in ([young], [])
    assert sum(len(plan.preempted) for plan in plans) == young.preemptions == world.scheduler.preemptions == 1
    for request in (old, young):
        assert request.finish == "length" and len(set(request.generated)) == 20
    # After it was preempted it is reckoned with in full, and so waits until the old one has ended.
    assert max(len(plan.fed) for plan in plans) == 2 and old.first_token_at < young.first_token_at + 1
    assert young.admitted_at == 1.0 and young.hit == 0 and world.scheduler.hit_tokens > 0


def test_who_was_preempted_is_not_admitted_to_be_preempted_again():
    world = World(rows=81, block=0, optimism=0.0, chunk=10)
    old, short, young = (world.add(range(4), n) for n in (30, 14, 30))
    world.run()
    assert (old.preemptions, short.preemptions, young.preemptions) == (0, 0, 1)
    # When the short one ended there was room for all that the two others had, but not for what they went on to.
    assert young.first_token_at == 2.0 and len(young.generated) == 30


def test_what_requests_share_is_counted_once():
    world = World(rows=2 * (40 + 3 * 9) + 1, block=4, chunk=40)
    world.add(range(40), 1)
    world.run()
    for _ in range(3):
        world.add([*range(40), 7, 7], 8)  # 40 tokens in common, and 9 of its own for each
    assert len(world.plan().admitted) == 3
    world.run()
    assert world.scheduler.preemptions == 0


def test_prefixes_belong_to_one_load_of_an_adapter():
    world = World(rows=301, block=4)
    world.load("a", "3-a")
    prompt = list(range(12))
    for adapter, hit in ((None, 0), (None, 8), ("a", 0), ("a", 8)):
        request = world.add(prompt, 3, adapter)
        world.run()
        assert request.hit == hit  # of 12 tokens 11 may be found: two blocks of 4
    longer = world.add([*prompt, 0, 0, 7, 7], 2)
    world.run()
    assert longer.hit == 12  # two of the drawn tokens were fed: 14 tokens, three blocks
    held = world.scheduler.rows()["rows_prefixes"]
    world.load("a", "3-a")
    request = world.add(prompt, 3, "a")
    world.run()
    assert request.hit == 0 and world.scheduler.rows()["rows_prefixes"] == held
    world.check()
    world.scheduler.finish(failed := world.add(range(50, 58), 2), "error", world.now, "not a number")
    assert (failed.state, failed.finish, failed.reason) == ("finished", "error", "not a number")
    failed = world.add(range(50, 58), 2)
    world.step()
    world.scheduler.finish(failed, "error", world.now, "not a number")
    assert world.add(range(50, 59), 2) and world.plan().admitted[0].hit == 0  # what an error left is not kept


def test_what_can_never_be_done_is_refused_at_once():
    world = World(rows=41, queue=2)
    world.load("a", "12-a")
    world.load("bad", "0-bad")
    with pytest.raises(Refused, match="can take 42 rows, for 21 tokens and its adapter, and the pool has 40") as error:
        world.add(range(12), 10)
    assert error.value.status == 413
    with pytest.raises(Refused, match="no adapter is loaded as 'b'"):
        world.add([1], 1, "b")
    fits, wide, bad = (world.add(range(10), n, a) for n, a in ((11, None), (11, "a"))), None, None
    fits, wide = fits
    with pytest.raises(Full, match="2 requests wait already, which is the most: try again in 1 s") as full:
        world.add([1], 1)
    assert full.value.status == 429 and full.value.retry_after == 1.0
    world.run()
    assert fits.finish == "length" and (wide.finish, wide.generated) == ("error", [])  # its size was not known before
    assert wide.reason.startswith("the request can take 52 rows, for 20 tokens and its adapter, and the pool has 40")
    with pytest.raises(Refused, match="52 rows"):
        world.add(range(10), 11, "a")
    bad, fine = world.add([1], 2, "bad"), world.add([1], 2, "a")
    world.run()
    assert (bad.finish, fine.finish) == ("error", "length")
    assert bad.reason == "adapter 'bad' from 0-bad could not be read: the file is cut short"
    with pytest.raises(Refused, match="the file is cut short"):
        world.add([1], 2, "bad")
    with pytest.raises(ValueError, match="draws no token: it is finished"):
        world.scheduler.append(fine, 1, world.now)
    waiting = world.add([1], 2)
    with pytest.raises(ValueError, match=f"request {waiting.id} is here already"):
        world.scheduler.add(waiting, world.now)
    assert world.scheduler.cancel(waiting.id, world.now) is waiting and waiting.finish == "cancelled"
    assert world.scheduler.cancel(waiting.id, world.now) is None


def test_the_wait_for_a_place_is_told():
    world = World(max_batch=1, queue=12, rows=401)
    for _ in range(12):
        world.add(range(4), 3)
    for _ in range(60):  # one is admitted every three steps of two seconds
        plan = world.plan(0.0)
        world.now += 2.0
        world.compute(plan)
        while len(world.scheduler.waiting) < 12:
            world.add(range(4), 3)
    assert 50.0 < world.scheduler.retry_after() <= 60.0  # 72 s, told as a minute at most
    for id in list(world.scheduler.waiting)[:9]:
        world.scheduler.cancel(id, world.now)
    assert 13.0 < world.scheduler.retry_after() < 24.0  # 18 s for three


def test_more_adapters_than_host_memory_or_the_pool_has_room_for():
    world = World(rows=41, host_bytes=12 * 32, block=4)
    for i in range(7):  # at most one of them in host memory, and at most two in the pool beside a request
        world.load(f"a{i}", f"{9 + i % 3}-{i}")
    requests = [world.add(range(4), 5, f"a{i % 7}") for i in range(28)]
    world.run(400)
    assert all(request.finish == "length" for request in requests)
    world.check()


def attained(world, deadline=6.0, steps=90, every=1):
    """The share of requests, two a second, that have a first token in time; each holds a place for four seconds."""
    requests = []
    for step in range(steps):
        if step % every == 0:
            requests += [world.add(range(4), 4), world.add(range(4), 4)]
        world.step()
    ended = [r for r in requests if r.arrived < steps - deadline]
    return sum((r.first_token_at or np.inf) - r.arrived <= deadline for r in ended) / len(ended), requests


def test_early_abort_meets_more_deadlines_under_overload():
    overload = {"max_batch": 6, "prefill_rows": 6, "rows": 401, "block": 0, "queue": 1000, "patience": 1000.0}
    first_come, _ = attained(World(policy=Fcfs(), **overload))
    early, requests = attained(World(policy=Abort(deadline=6.0), **overload))
    assert first_come < 0.3 and early > 0.7  # a batch of 6 for 4 s serves 1.5 of 2 a second
    given_up = [r for r in requests if r.finish == "aborted"]
    assert given_up and all(r.first_token_at is None and r.generated == [] for r in given_up)
    assert given_up[0].reason.startswith("no first token within 6 s is possible after ")
    calm = World(policy=Abort(deadline=6.0), **overload)
    assert attained(calm, every=2)[0] == 1.0 and calm.scheduler.preemptions == 0


def test_a_batch_has_at_most_so_many_adapters():
    def puts(policy):
        world = World(policy=policy, rows=61, block=0, max_batch=4, prefill_rows=4, patience=1000.0)
        for i in range(6):
            world.load(f"a{i}", f"9-{i}")
        requests = [world.add([1, 2], 3, f"a{i % 6}" if i % 7 else None) for i in range(60)]
        most = 0
        while world.scheduler.busy:
            world.step()
            most = max(most, len({r.identity for r in world.scheduler.running.values()} - {0}))
        assert all(r.finish == "length" for r in requests)
        return most, world.store.puts

    most, moved = puts(Fcfs())
    assert most > 2
    (most, one), (more, two) = puts(Cluster(adapters=1)), puts(Cluster(adapters=2))
    assert (most, more) == (1, 2) and one < moved / 3 and two < moved * 0.7, (one, two, moved)
    with pytest.raises(ValueError, match="adapters=0"):
        Cluster(adapters=0)


@pytest.mark.parametrize("odd", [("cold", 2), (None, 20)])
@pytest.mark.parametrize("patience", [10.0, 1000.0])
def test_nobody_starves(patience, odd):
    """Requests for one adapter never cease; one for another, or one that needs most of the pool, comes between."""
    world = World(policy=Cluster(adapters=1), rows=61, block=0, max_batch=4, prefill_rows=4, patience=patience)
    world.load("hot", "5-hot")
    world.load("cold", "5-cold")
    for step in range(50):
        while len(world.scheduler.waiting) < 4:
            world.add([1, 2], 4, "hot", priority=1)
        if step == 5:
            seldom = world.add(range(odd[1]), 6, odd[0])
        world.step()
    assert seldom.finish == ("length" if patience == 10.0 else None)
    often = [r for r in world.requests.values() if r is not seldom and r.finish]
    assert all(r.finish == "length" for r in often) and len(often) > 15


def test_adapters_have_fair_shares():
    def waits(policy):
        """One adapter floods the queue; another sends one request at a time, of prompts three times as long."""
        world = World(policy=policy, rows=401, block=0, max_batch=4, prefill_rows=4, queue=200, patience=10000.0)
        world.load("flood", "5-flood")
        world.load("few", "5-few")
        few = []
        for _ in range(80):
            while len(world.scheduler.waiting) < 30:
                world.add([1] * 4, 4, "flood")
            if not few or few[-1].finish:
                few.append(world.add([1] * 12, 4, "few"))
            world.step()
        return np.mean([r.admitted_at - r.arrived for r in few if r.admitted_at])

    assert waits(Fcfs()) > 10 * waits(Fair())

    world = World(policy=Fair(), rows=401, block=0, max_batch=4, prefill_rows=4, queue=200, patience=10000.0)
    for name in ("short", "long"):
        world.load(name, f"5-{name}")
    for step in range(100):
        for name, length in (("short", 3), ("long", 15)):
            if name == "short" or step > 40:
                queued = sum(r.adapter == name for r in world.scheduler.waiting.values())
                for _ in range(6 - queued):
                    world.add([1] * length, 4, name)
        if step == 44:
            before = dict(world.scheduler._served)
        world.step()
    gained = [world.scheduler._served[i] - before[i] for i in before]
    assert len(gained) == 2 and max(gained) < 1.15 * min(gained)  # though one was alone for 40 steps
