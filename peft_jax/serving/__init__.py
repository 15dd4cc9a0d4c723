"""Serving: thousands of adapters from one base (S-LoRA, Sheng et al. 2023, arXiv 2311.03285).

    python -m peft_jax.serving --model MODEL --adapters DIRECTORY

pool, step, packing, kernels         the device's side: one array of rows, one compiled step, adapters as rows
rows, requests, prefixes, store, loads, policies, rounds, scheduler     the host's: plain Python and numpy
engine, text                         both together, one round of scheduling at a time
server                               HTTP in front of it, in OpenAI's form
"""
