"""HF PEFT's way to serve many adapters: all of them in one torch model, and a name a row of the batch.

Each batch is filled from those that wait, padded on the left to its longest prompt, and runs until its last answer is
done, as `generate` does it; whoever comes meanwhile waits for the next.  Tokens count as written when their step is
done, which `generate` itself would only tell at the end.
"""

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.serving_load import Said


class Peft:
    """HF PEFT's mixed batch (``adapter_names=``).

    Args:
        folder: the base, a Hugging Face directory.
        adapters: directories of adapters, in order.
        batch: rows at most.
        threads: of torch; by default all cores.
    """

    def __init__(self, folder: str, adapters: Sequence[Path], batch: int, threads: int = 0):
        import peft
        import torch
        import transformers

        torch.set_num_threads(threads or os.cpu_count() or 1)
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.names = [place.name for place in adapters]
        self.model: Any = peft.PeftModel.from_pretrained(base, str(adapters[0]), adapter_name=self.names[0])
        for name, place in zip(self.names[1:], adapters[1:], strict=True):
            self.model.load_adapter(str(place), adapter_name=name)
        self.model.eval()
        self.batch, self.tokens = batch, dict[int, list[int]]()
        """The tokens of each answer."""
        self._waiting = deque[tuple[int, Sequence[int], int, str]]()
        self._rows = list[tuple[int, int, str]]()  # of the batch: number, tokens wanted, adapter
        self._inputs: Any = None
        self._last = 0

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._rows)

    def submit(self, prompt: Sequence[int], new: int, adapter: int) -> int:
        self._last += 1
        self.tokens[self._last] = []
        self._waiting.append((self._last, prompt, new, self.names[adapter]))
        return self._last

    def step(self) -> list[Said]:
        import torch

        if not self._rows:
            self._fill()
        with torch.inference_mode():
            out = self.model(
                **self._inputs, use_cache=True, logits_to_keep=1, adapter_names=[name for *_, name in self._rows]
            )
        token = out.logits[:, -1].argmax(-1)
        mask = torch.nn.functional.pad(self._inputs["attention_mask"], (0, 1), value=1)
        self._inputs = {
            "input_ids": token[:, None],
            "attention_mask": mask,
            "position_ids": mask.sum(1, keepdim=True) - 1,
            "past_key_values": out.past_key_values,
        }
        said = []
        for (number, wanted, _), drawn in zip(self._rows, token.tolist(), strict=True):
            if number in self.tokens and len(self.tokens[number]) < wanted:
                self.tokens[number].append(drawn)
                said.append(Said(number, (drawn,), "length" if len(self.tokens[number]) == wanted else None))
        if all(len(self.tokens.get(number, ())) == wanted for number, wanted, _ in self._rows if number in self.tokens):
            self._rows = []
        return said

    def cancel(self, request: int) -> None:
        """Forgets a request; one that runs keeps its row until the batch is done."""
        self._waiting = deque(each for each in self._waiting if each[0] != request)
        self.tokens.pop(request, None)

    def _fill(self) -> None:
        import torch

        taken = [self._waiting.popleft() for _ in range(min(self.batch, len(self._waiting)))]
        longest = max(len(prompt) for _, prompt, _, _ in taken)
        ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for _, prompt, _, _ in taken])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for _, prompt, _, _ in taken])
        self._rows = [(number, new, name) for number, _, new, name in taken]
        self._inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
