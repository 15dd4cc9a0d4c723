"""An engine without a model, for the server's tests: it answers by rule, one token a step, and writes down what it met.

Its answer to a prompt is the adapter's name (or "base"), a colon, a blank, and the prompt's own text.
"""

import dataclasses
import time

import toy_tokenizer

from peft_jax.serving.events import Event, TokenLogprob, Usage
from peft_jax.serving.requests import Refused
from peft_jax.serving.store import AdapterInfo

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('system comes first') }}"
    "{% endif %}{{ m.role }}={{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant={% endif %}"
)


@dataclasses.dataclass
class Limits:
    context: int = 512


@dataclasses.dataclass
class Running:
    prompt: list
    sampling: object
    adapter: str | None
    answer: list  # tokens
    text: str  # the answer's, up to the stop string
    ends: str
    made: int = 0
    shown: int = 0


class FakeEngine:
    model_name = "toy/base"

    def __init__(self, room=1000, delay=0.0):
        self.tokenizer = toy_tokenizer.gpt2()
        self.tokenizer.chat_template = TEMPLATE
        self.limits = Limits()
        self.room, self.delay = room, delay
        self.paused = self.broken = False
        self.hold = 10**9  # tokens of a request behind which it goes no further
        self.running, self.cancelled, self.submitted, self.steps = {}, [], [], 0
        self.closed, self.leaving = False, []
        self.known = {"poems": "/adapters/poems", "law": "/adapters/law"}

    @property
    def busy(self):
        return bool(self.running) or self.broken

    def submit(self, prompt, sampling, adapter=None):
        if adapter is not None and adapter not in self.known:
            raise Refused(f"No adapter {adapter!r}.", status=404)
        if len(self.running) >= self.room:
            raise Refused("The engine's queue is full.", status=429, retry_after=2.5)
        text = self.tokenizer.decode(prompt)
        if text == "bug":
            raise TypeError("a bug in submit")
        whole = f"{adapter or 'base'}: {text}"
        stops = [whole.find(stop) for stop in sampling.stop if stop in whole]
        shown = whole[: min(stops)] if stops else whole
        answer = self.tokenizer(shown)["input_ids"][: sampling.max_tokens]
        ends = "stop" if len(answer) < sampling.max_tokens else "length"
        number = len(self.submitted)
        self.submitted.append((list(prompt), sampling, adapter))
        self.running[number] = Running(list(prompt), sampling, adapter, answer, shown, ends)
        return number

    def cancel(self, request):
        if self.running.pop(request, None) is not None:
            self.cancelled.append(request)

    def step(self):
        if self.broken:
            raise RuntimeError("the device is lost")
        if self.paused:
            return []
        self.steps += 1
        if self.delay:
            time.sleep(self.delay)
        return [self._advance(number) for number, run in list(self.running.items()) if run.made < self.hold]

    def _advance(self, number):
        run = self.running[number]
        text = self.tokenizer.decode(run.prompt)
        if text.startswith("abort") and run.made == int(text[5:] or 0):
            del self.running[number]
            return Event(number, finish="aborted", reason="The deadline has passed.")
        token = run.answer[run.made]
        run.made += 1
        certain = self.tokenizer.decode(run.answer[: run.made])
        certain = "" if certain.endswith("\ufffd") else certain
        new, run.shown = certain[run.shown :], max(run.shown, len(certain))
        logprobs = None
        if run.sampling.logprobs is not None:
            top = [(token, -0.5), (token % 200 + 1, float("-inf")), (token % 100 + 1, -3.0)]
            logprobs = (TokenLogprob(token, -0.5, tuple(top[: run.sampling.logprobs])),)
        done = run.made == len(run.answer)
        if done:
            del self.running[number]
        usage = Usage(len(run.prompt), run.made, min(2, len(run.prompt))) if done else None
        return Event(number, (token,), new, logprobs, run.ends if done else None, "", usage)

    def load(self, name, directory):
        if name == "corrupt":
            raise ValueError(f"{directory}/adapter_model.safetensors is no safetensors file")
        self.known[name] = directory

    def unload(self, name):
        directory = self.known.pop(name)
        if any(run.adapter == name for run in self.running.values()):
            self.leaving.append((name, directory))

    def close(self):
        self.closed = True

    def adapters(self):
        users = [run.adapter for run in self.running.values()]
        own = [AdapterInfo(name, at, 8, 64, "resident", users.count(name)) for name, at in self.known.items()]
        return [*(AdapterInfo(name, at, 8, 64, "draining", 1) for name, at in self.leaving), *own]

    def stats(self):
        return {
            "requests_running": len(self.running),
            "requests_finished_total{stop}": 3,
            "requests_finished_total{length}": 1,
            "rows_free": 7,
            "steps_total": self.steps,
        }
