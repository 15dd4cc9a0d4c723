"""What a run tells: its history, a metrics file, a progress bar; and the guard, for this is where numbers are read."""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path as File
from typing import Any

import jax
from jaxtyping import Array

from peft_jax.training.checkpoints import Checkpoints

Record = dict[str, Any]


class Log:
    """Where `fit` leaves each step's numbers, to be read when the next step is under way."""

    def __init__(
        self,
        metrics: str | os.PathLike[str] | None,
        start: int,
        steps: int,
        callback: Callable[[Record], None] | None,
        progress: bool,
    ) -> None:
        from tqdm import tqdm

        first = jax.process_index() == 0
        self.history: list[Record] = [] if metrics is None else rewind(File(metrics), start)
        self.file = open(metrics, "a", encoding="utf-8") if metrics is not None and first else None  # noqa: SIM115
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not (progress and first), dynamic_ncols=True)
        self.callback = callback
        self.pending: tuple[int, int | Array, dict[str, Array]] | None = None  # step, tokens, what the step measured
        self.restart_clock()

    def restart_clock(self) -> None:
        self.since = time.perf_counter()

    def report(self, store: Checkpoints | None) -> None:
        """Reads the numbers of the pending step, if there is one: waits for it, and raises if they are not finite."""
        if self.pending is None:
            return
        (step, counted, measured), self.pending = self.pending, None
        numbers, tokens = jax.device_get(measured), int(counted)
        good = "no checkpoint was saved"
        if store is not None and store.latest is not None:
            good = f"the last good checkpoint is {store.path(store.latest)}"
        found = self.judge(step, numbers, good)
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        for record in found:
            self.write({**record, "tokens": tokens, "seconds": round(seconds, 6)})
        losses = ", ".join(f"{record['loss']:.4f}" for record in found if "loss" in record)
        self.bar.set_postfix_str(f"loss {losses}, {tokens / seconds:,.0f} tokens/s", refresh=False)
        self.bar.update()

    def judge(self, step: int, numbers: dict[str, Any], good: str) -> list[Record]:
        """The records of a step; raises if it is not finite.  `good` says what can be gone back to."""
        record = {"step": step, **{name: value.item() for name, value in numbers.items()}}
        if not record.pop("finite"):
            raise FloatingPointError(
                f"step {step} is not finite (loss {record['loss']}, gradient norm {record['grad_norm']}): it was not "
                f"taken, and training stops; {good}"
            )
        return [record]

    def write(self, record: Record) -> None:
        self.history.append(record)
        if self.file is not None:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        if self.callback is not None:
            self.callback(record)

    def close(self) -> None:
        self.bar.close()
        if self.file is not None:
            self.file.close()


def rewind(path: File, step: int) -> list[Record]:
    """The lines of a metrics file up to `step`; the rest is taken out of the file, and so is a half-written last line.

    Raises:
        ValueError: if another line is not a JSON object with a step: it is not a metrics file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if record["step"] <= step:
                kept.append(record)
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not a line of metrics: choose another file") from None
    if len(kept) < len(lines) and jax.process_index() == 0:
        fresh, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(fresh, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in kept)
        os.replace(name, path)
    return kept
