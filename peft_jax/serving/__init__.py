"""Serving: thousands of adapters from one base (S-LoRA, Sheng et al. 2023, arXiv 2311.03285).

    python -m peft_jax.serving --model MODEL --adapters DIRECTORY

rows, store, prefixes, scheduler     the host's bookkeeping: plain Python and numpy
pool, step, kernels                  the device's: one array of rows, one compiled step
engine                               both together, one scheduling round at a time
server                               HTTP in front of it, in OpenAI's form
"""
