"""The main job: a real language model learns to answer, with LoRA, in a few minutes on two cores.

    make demo        (or: python -m experiments.demo)

SmolLM2-135M-Instruct reads a movie review and answers `` positive`` or `` negative``.  LoRA (rank 8, α 16, queries and
values) trains 0.46M of its 135M parameters for 60 steps; the adapter is saved in Hugging Face PEFT's format, loaded
again, and must give the same predictions.  Everything it writes is under runs/demo.
"""

import json
import time
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import optax

import peft_jax as pj
from experiments import sentiment
from experiments.data import smollm2
from peft_jax import interop, methods, models, training

STEPS, BATCH, LENGTH, HELD_OUT = 60, 12, 48, 200
OUT = Path("runs/demo")


def main() -> None:
    start = time.perf_counter()
    OUT.mkdir(parents=True, exist_ok=True)
    model = models.load(smollm2(), remat="dots")
    answers = sentiment.answer_ids(model.tokenizer)
    train, held_out = sentiment.load(model.tokenizer, LENGTH, HELD_OUT)
    print(f"{len(train):,} reviews to train on, {len(held_out)} held out\n")

    method = methods.lora(rank=8, alpha=16, select=r"(q|v)_proj")
    params, forward = method(jax.random.key(0), model.params, model.forward)
    print(pj.summary(params), "\n")

    before = sentiment.score(forward, params, held_out, LENGTH, answers)
    tx = pj.freeze(optax.adamw(optax.cosine_decay_schedule(1e-3, STEPS)), params)
    batches = sentiment.Batches(train, BATCH, LENGTH, answers)
    run = training.fit(forward, params, tx, batches, STEPS, loss=sentiment.answer_loss, clip=1.0)
    after = sentiment.score(forward, run.params, held_out, LENGTH, answers)

    adapter = OUT / "adapter"
    interop.hf_peft.save(adapter, run.params)
    loaded, reloaded_forward = interop.hf_peft.load(adapter, model)
    again = sentiment.score(reloaded_forward, loaded, held_out, LENGTH, answers)
    if not np.array_equal(again.predictions, after.predictions):
        raise RuntimeError(f"the adapter reloaded from {adapter} predicts otherwise than the one that was saved")

    plot(run.history, OUT / "loss.png")
    review = held_out[0]
    prompt = sentiment.PROMPT.format(text=review.text)
    wrote = {
        name: models.generate(f, p, model.tokenizer, prompt, max_new_tokens=8, stop="\n")
        for name, f, p in (("before", model.forward, model.params), ("after", forward, run.params))
    }
    report(before, after, wrote, prompt, sentiment.ANSWERS[review.answer])
    print(f"adapter saved to {adapter}, loaded again: the same {len(held_out)} predictions")
    print(f"loss curve in {OUT / 'loss.png'}; {time.perf_counter() - start:.0f} s in all")


def report(before: sentiment.Score, after: sentiment.Score, wrote: dict[str, Any], prompt: str, answer: str) -> None:
    print(f"\naccuracy before {before.accuracy:.3f} after {after.accuracy:.3f}\n")
    print(f"{'held-out reviews':<18}{'accuracy':>10}{'loss':>10}")
    for name, score in (("before", before), ("after", after)):
        print(f"{name:<18}{score.accuracy:>10.3f}{score.loss:>10.3f}")
    print(f"\n{prompt}")
    for name, text in wrote.items():
        print(f"  {name + ':':<8}{text!r}")
    print(f"  {'truth:':<8}{answer!r}\n")
    result = {name: {"accuracy": s.accuracy, "loss": s.loss} for name, s in (("before", before), ("after", after))}
    (OUT / "result.json").write_text(json.dumps(result, indent=2) + "\n")


def plot(history: list[dict[str, Any]], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses = [record["loss"] for record in history if "loss" in record]
    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.plot(range(1, len(losses) + 1), losses)
    axes.set(xlabel="step", ylabel="training loss (nats)", yscale="log", title="LoRA on SmolLM2-135M, movie reviews")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
