"""Thousands of adapters served from one base (S-LoRA: Sheng et al. 2023, arXiv 2311.03285).

What runs on the device is a pure function over one pool of rows, in which keys, values and adapters of any rank lie
side by side; what decides which row is whose is plain Python, and needs no device to be tested:

    rows.py       who owns which row of the pool: a free list with reference counts
    requests.py   a request, how its tokens are drawn, and why one is refused
    prefixes.py   keys and values of beginnings that requests have in common
    store.py      adapters on their way: registered, in host memory, in the pool
    policies.py   who comes next: first come, by adapter, by deadline, by share
    scheduler.py  what the next step computes, and whose rows are taken back when they run out

Nothing is imported here, so that each of these can be read and used alone.
"""
