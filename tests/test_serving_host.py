"""Rows, prefixes and adapters on the host's side of serving: who owns what, through long random traces."""

import concurrent.futures
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from peft_jax.serving.prefixes import PrefixCache
from peft_jax.serving.requests import Refused, Request, Sampling
from peft_jax.serving.rows import Allocator, OutOfRows, adapter_rows
from peft_jax.serving.store import AdapterStore


def ids(*rows):
    return np.array(rows, np.int32)


def owned_as(allocator, expected):
    """The allocator counts exactly these owners, and its free list is exactly the rows without one."""
    rows = np.arange(allocator.total + 1, dtype=np.int32)
    assert dict(Counter({int(r): int(n) for r, n in enumerate(allocator.owners(rows)) if n})) == dict(+expected)
    free = allocator._stack[: allocator.free].tolist()
    assert sorted(free) == [r for r in range(1, allocator.total + 1) if not expected[r]]


@pytest.mark.parametrize("seed", [0, 1])
def test_allocator_over_a_long_trace(seed):
    random = np.random.default_rng(seed)
    allocator, held = Allocator(60), list[np.ndarray]()
    for step in range(1500):
        action = random.integers(4)
        if action == 0 or not held:
            n = int(random.integers(0, 25))
            if n > allocator.free:
                with pytest.raises(OutOfRows, match=f"^{n} rows .* and {allocator.free} are free") as error:
                    allocator.take(n)
                assert (error.value.wanted, error.value.free) == (n, allocator.free)
            else:
                held.append(allocator.take(n))
                assert 0 not in held[-1] and held[-1].dtype == np.int32
        elif action == 1:
            some = held[random.integers(len(held))]
            some = some[random.random(len(some)) < 0.5]
            allocator.share(some)
            held.append(some)
        else:
            back = held.pop(random.integers(len(held)))
            cut = int(random.integers(len(back) + 1))
            allocator.give_back(random.permutation(back[:cut]))
            held.append(back[cut:])
        owners = Counter(int(r) for rows in held for r in rows)
        assert allocator.free == allocator.total - len(owners)
        if step % 50 == 0:
            owned_as(allocator, owners)
    for rows in held:
        allocator.give_back(rows)
    owned_as(allocator, Counter())


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        (ids(0), "row 0 cannot be given back: this pool gives out rows 1 to 9"),
        (ids(1, 10), "row 10 cannot be given back: this pool gives out rows 1 to 9"),
        (ids(-1, 1), "row -1 cannot be given back"),
        (ids(1, 7), "row 7 cannot be given back: it has no owner"),
        (ids(2, 1, 2), "row 2 is given back more often than it has owners"),
    ],
)
def test_what_one_does_not_own_is_not_given_back(rows, match):
    allocator = Allocator(10)
    allocator.take(3)
    with pytest.raises(ValueError, match=match):
        allocator.give_back(rows)
    owned_as(allocator, Counter({1: 1, 2: 1, 3: 1}))  # nothing was changed
    if "more often" not in match:
        with pytest.raises(ValueError, match=match.replace("given back", "shared")):
            allocator.share(rows)
    allocator.give_back(ids(1))
    with pytest.raises(ValueError, match="row 1 cannot be given back: it has no owner"):
        allocator.give_back(ids(1))
    with pytest.raises(ValueError, match="a pool of 1 rows"):
        Allocator(1)


def test_rows_of_an_adapter_are_its_matrices_laid_flat():
    # The paper's accounting: where each matrix is as wide as a row, r rows for A and r for B.
    for rank in (1, 5, 8, 64):
        assert adapter_rows([(4096, 4096, rank)] * 4, 4096) == 4 * 2 * rank
    random = np.random.default_rng(0)
    for _ in range(50):
        width = int(random.integers(1, 40))
        matrices = [tuple(int(x) for x in random.integers(1, 90, 3)) for _ in range(3)]
        flat = [np.ones(n) for i, o, r in matrices for n in (i * r, r * o)]
        laid = [np.pad(x, (0, -len(x) % width)).reshape(-1, width) for x in flat]
        assert adapter_rows(matrices, width) == sum(map(len, laid))


@pytest.mark.parametrize("block", [1, 3])
def test_prefixes_over_a_long_trace(block):
    """What is matched holds what was computed for those tokens; what is evicted was idle, the last of its chain."""
    random = np.random.default_rng(block)
    allocator = Allocator(150)
    cache, content, users = PrefixCache(allocator, block), {}, []
    hits = evicted = 0
    for now in range(1500):
        action = random.integers(5)
        if action < 3:
            identity = int(random.integers(3))
            tokens = random.integers(0, 2, int(random.integers(1, 14))).tolist()
            n, keys, values = cache.match(identity, tokens, float(now))
            assert n % block == 0 and n < len(tokens)
            assert [content[r] for r in keys] == [("key", identity, *tokens[: t + 1]) for t in range(n)]
            assert [content[r] for r in values] == [("value", identity, *tokens[: t + 1]) for t in range(n)]
            hits += n
            fresh = 2 * (len(tokens) - n)
            if allocator.free < fresh:
                idle, short = cache.idle_rows, fresh - allocator.free
                freed = cache.evict(short)
                evicted += freed
                assert short <= freed < short + 2 * block or freed == idle
            if allocator.free < fresh:
                allocator.give_back(np.concatenate([keys, values]))
                continue
            mine = allocator.take(fresh)
            keys, values = np.append(keys, mine[::2]), np.append(values, mine[1::2])
            for t in range(n, len(tokens)):
                content[keys[t]] = ("key", identity, *tokens[: t + 1])
                content[values[t]] = ("value", identity, *tokens[: t + 1])
            users.append((identity, tokens, keys, values))
        elif users and action == 3:
            identity, tokens, keys, values = users[random.integers(len(users))]
            kept = cache.insert(identity, tokens, keys, values, float(now))
            assert kept == len(tokens) // block * block
            n, again, values = cache.match(identity, [*tokens, 0], float(now))
            assert n == kept and again.tolist() == keys[:n].tolist()  # the caller now uses the cache's rows
            allocator.give_back(np.concatenate([again, values]))
        elif users:
            _, _, keys, values = users.pop(random.integers(len(users)))
            allocator.give_back(np.concatenate([keys, values]))
        if now % 500 == 499:
            cache.forget(1)
            assert cache.match(1, [0, 0, 0, 0, 0])[0] == 0
        used = Counter(int(r) for _, _, k, v in users for r in (*k, *v))
        blocks = [b.rows.reshape(-1).tolist() for b in cache._blocks.values()]
        assert cache.rows == sum(map(len, blocks))
        assert cache.busy_rows == sum(len(b) for b in blocks if used[b[0]])
        before = {0} | {b.serial for b in cache._blocks.values()}
        assert {key[1] for key in cache._blocks} <= before  # no block has lost the one before it
        if now % 20 == 0:
            owned_as(allocator, used + Counter(r for b in blocks for r in b))
    assert hits > 300 and evicted > 100
    for _, _, keys, values in users:
        allocator.give_back(np.concatenate([keys, values]))
    cache.evict(10**6)
    owned_as(allocator, Counter())


def test_the_least_recently_used_prefix_goes_first():
    allocator = Allocator(100)
    cache = PrefixCache(allocator, 2)
    for now, first in enumerate((1, 2, 3)):
        rows = allocator.take(8)
        assert cache.insert(0, [first, 0, 0, 0], rows[:4], rows[4:], float(now)) == 4
        allocator.give_back(rows)
    _, *rows = cache.match(0, [1, 0, 9], now=3.0)  # the first half of the oldest is in use again
    assert cache.evict(1, before=-1.0) == 0
    assert cache.evict(1) == 4 and cache.evict(7) == 8  # the oldest's second half, then all of the next
    lengths = [cache.match(0, [first, 0, 0, 0, 0])[0] for first in (1, 2, 3)]
    assert lengths == [2, 0, 4]
    off = PrefixCache(allocator, 0)
    rows = allocator.take(4)
    assert off.insert(0, [1, 2], rows[:2], rows[2:]) == 0 and off.match(0, [1, 2, 3])[0] == 0
    with pytest.raises(ValueError, match="block=-1"):
        PrefixCache(allocator, -1)


class Later(concurrent.futures.Executor):
    """Runs nothing until it is told to."""

    def __init__(self):
        self.tasks = []

    def submit(self, fn, /, *args, **kwargs):
        future = concurrent.futures.Future()
        self.tasks.append((future, fn, args))
        return future

    def run(self, n=None):
        for future, fn, args in self.tasks[:n]:
            try:
                future.set_result(fn(*args))
            except Exception as error:
                future.set_exception(error)
        del self.tasks[:n]


def packed(n, width=8):
    return SimpleNamespace(block=np.ones((1, n, width), np.float32), rank=2)


def make_store(read=lambda directory: packed(int(directory)), rows=21, host_bytes=10**6, put=lambda rows, p: "tables"):
    later = Later()
    return AdapterStore(Allocator(rows), read, put, host_bytes, later), later


def fetch(store, later, *identities):
    store.prefetch(identities)
    later.run()
    store.poll()


def states(store):
    return [info.state for info in store.infos()]


def test_an_adapter_from_disk_into_the_pool_and_out():
    store, later = make_store()
    one, two, three = (store.register(name, size) for name, size in (("one", "8"), ("two", "8"), ("three", "6")))
    assert states(store) == ["disk"] * 3 and store.find("two") == two
    store.prefetch([one, two], 1.0)
    assert states(store) == ["loading", "loading", "disk"] and not store.ready(one)
    store.poll()
    later.run(1)
    store.poll()
    assert states(store) == ["host", "loading", "disk"] and store.ready(one) and not store.is_resident(one)
    with pytest.raises(ValueError, match="adapter 'two' is not in host memory"):
        store.make_resident(two)
    with pytest.raises(ValueError, match="adapter 'one' is not in the pool"):
        store.resident(one)
    fetch(store, later, one, two, three)
    assert store.make_resident(one).tables == "tables"
    assert store.make_resident(one) is store.resident(one)  # it is written once
    store.make_resident(two)
    assert (store.puts, store.allocator.free, store.rows, store.idle_rows) == (2, 4, 16, 16)
    with pytest.raises(OutOfRows):
        store.make_resident(three)
    store.pin(one)
    store.pin(one)
    store.unpin(one, now=2.0)
    assert (store.idle_rows, store.evict(), store.evict()) == (8, 8, 0)  # the pinned one stays, however old it is
    store.unpin(one, now=5.0)
    assert (store.oldest(), store.evict(before=4.9), store.evict(before=5.0)) == (5.0, 0, 8)
    assert store.evictions == 2 and store.allocator.free == store.allocator.total
    assert states(store) == ["host"] * 3
    assert store.counts == {
        "adapters_registered": 3,
        "adapters_host": 3,
        "host_bytes": 22 * 32,
        "adapters_resident": 0,
    }
    store.close()


def test_an_unloaded_adapter_drains():
    store, later = make_store()
    old = store.register("a", "5")
    store.join(old)
    store.prefetch([old])
    new = store.register("a", "6")  # while the older one is being read, for a user that it has
    assert new != old and store.find("a") == new and store.counts["adapters_registered"] == 1
    assert states(store) == ["draining", "disk"] and store.take_gone() == []
    later.run()
    store.poll()
    store.make_resident(old)
    assert store.size(old) == 5
    store.leave(old)
    assert store.take_gone() == [old] and store.take_gone() == []
    assert store.allocator.free == 20 and len(store.copies) == 0 and states(store) == ["disk"]
    store.prefetch([new])
    store.unregister("a")  # nobody uses it: it is gone at once, and what is being read is let go
    later.run()
    store.poll()
    assert store.take_gone() == [new] and store.infos() == [] and store.copies.nbytes == store.copies.reading == 0
    for call in (store.find, store.unregister):
        with pytest.raises(Refused, match="no adapter is loaded as 'a'") as error:
            call("a")
        assert error.value.status == 404
    assert store.register("a", "5") not in (old, new)


def test_host_memory_is_bounded_and_the_first_wanted_stays():
    reads = []
    store, later = make_store(lambda d: reads.append(d) or packed(int(d)), rows=101, host_bytes=10 * 32)
    a, b, c = (store.register(name, size) for name, size in (("a", "4"), ("b", "6"), ("c", "5")))
    fetch(store, later, a, b)
    assert states(store) == ["host", "host", "disk"] and store.copies.nbytes == 320
    fetch(store, later, c)
    assert states(store) == ["host", "disk", "host"] and store.copies.nbytes == 288  # b was the last of those wanted
    for _ in range(3):  # all three never fit: the first stays, and what does not fit beside it is not read in vain
        fetch(store, later, b, c, a)
    assert states(store)[1] == "host" and store.copies.nbytes <= 320 and reads == ["4", "6", "5", "6"]
    store.make_resident(b)
    fetch(store, later, b, c, a)  # a resident one needs no copy
    assert states(store) == ["host", "resident", "host"]


def test_a_load_that_failed_tells_why_and_a_new_load_tries_again(tmp_path):
    def read(directory):
        size = (tmp_path / directory / "size").read_text()
        if size == "bad":
            raise ValueError("no header\nin adapter_model.safetensors")
        return packed(int(size))

    def write(name, size):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "size").write_text(size)
        return tmp_path / name

    def reason(name):
        fetch(store, later, store.find(name))
        with pytest.raises(Refused) as error:
            store.find(name)
        assert store.failure(store._names[name]).reason == error.value.reason
        return error.value.status, error.value.reason.replace(str(tmp_path), "")

    store, later = make_store(read, host_bytes=18 * 32)
    for name, size in (("bad", "bad"), ("large", "21"), ("heavy", "19"), ("fine", "4")):
        store.register(name, write(name, size))
    assert reason("bad") == (400, "adapter 'bad' from /bad could not be read: no header")
    tail = "takes 21 rows and the pool has 20: serve it from a larger pool"
    assert reason("large") == (413, f"adapter 'large' from /large {tail}")
    with pytest.raises(Refused, match=f"adapter 'known' from there {tail}"):
        store.register("known", "there", rows=21)
    what = "takes 608 bytes of host memory, and all adapters have 576: allow them more"
    assert reason("heavy") == (400, f"adapter 'heavy' from /heavy {what}")
    fetch(store, later, *(store._names[name] for name in ("bad", "large")))
    assert states(store)[:2] == ["failed", "failed"] and not later.tasks  # not tried again
    store.register("bad", write("bad", "3"))
    fetch(store, later, store.find("bad"))
    assert store.ready(store.find("bad"))

    fetch(store, later, store.find("fine"))
    store.copies.drop(store._loads[store.find("fine")])
    fetch(store, later, store.find("fine"))
    assert store.ready(store.find("fine"))  # read twice, for the files are the same
    store.copies.drop(store._loads[store.find("fine")])
    write("fine", "12")
    assert reason("fine") == (400, "adapter 'fine' from /fine has changed on disk since it was loaded: load it again")


def test_a_write_that_fails_gives_its_rows_back():
    def put(rows, adapter):
        raise MemoryError("the device is full")

    store, later = make_store(put=put)
    one = store.register("one", "5")
    fetch(store, later, one)
    with pytest.raises(Refused, match="adapter 'one' from 5 could not be put into the pool: the device is full"):
        store.make_resident(one)
    assert store.allocator.free == 20 and states(store) == ["failed"] and store.copies.nbytes == 0


def test_requests_and_sampling_say_what_is_wrong():
    for field, value in (
        ("max_tokens", 0),
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("logprobs", -1),
    ):
        with pytest.raises(ValueError, match=field):
            Sampling(**{field: value})
    with pytest.raises(ValueError, match="empty string"):
        Sampling(stop=("x", ""))
    with pytest.raises(ValueError, match="request 3 has an empty prompt"):
        Request(3, [])
    request = Request(1, range(100))
    for start in range(1, 90, 3):
        request.hold(np.arange(start, start + 3, dtype=np.int32), -np.arange(start, start + 3, dtype=np.int32))
    assert request.key_rows.tolist() == list(range(1, 91)) and (request.value_rows == -request.key_rows).all()
    assert len(request.let_go()) == 180 and request.held == request.cached == 0
