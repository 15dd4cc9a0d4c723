"""Alpaca (Taori et al. 2023): instructions, some with an input, and responses.

The file is alpaca_data.json of tatsu-lab/stanford_alpaca, or one of its cleaned copies: a JSON list of objects with
``instruction``, ``input`` ("" where there is none) and ``output``.  What a model reads is the prompt of that
repository's train.py; it learns the response and its end.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from peft_jax.training.data import Rows, pad

TASK = "Below is an instruction that describes a task"
INPUT = ", paired with an input that provides further context"
WANTED = ". Write a response that appropriately completes the request.\n\n"


class Example(NamedTuple):
    instruction: str
    input: str
    output: str


def read(path: Path) -> list[Example]:
    """The examples of a file.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if it is not a list of such objects, with the number of the first that is not one; if it is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: give the file alpaca_data.json with --data")
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(items, list) or not items:
        raise ValueError(f"{path} is not a list of examples")
    found = []
    for number, item in enumerate(items):
        fields = [item.get(name) for name in Example._fields] if isinstance(item, dict) else [None]
        if not all(isinstance(field, str) for field in fields):
            raise ValueError(f"{path}, example {number} is not an object of {', '.join(Example._fields)}")
        found.append(Example(*fields))
    return found


def prompt(example: Example) -> str:
    """What stands before the response.

    >>> from experiments import alpaca
    >>> alpaca.prompt(alpaca.Example("Add.", "1 + 2", "3")).split("###")[1:]
    [' Instruction:\\nAdd.\\n\\n', ' Input:\\n1 + 2\\n\\n', ' Response:']
    """
    head = f"{TASK}{INPUT if example.input else ''}{WANTED}### Instruction:\n{example.instruction}\n\n"
    return f"{head}### Input:\n{example.input}\n\n### Response:" if example.input else f"{head}### Response:"


def rows(examples: Sequence[Example], tokenizer: Any, length: int) -> Rows:
    """One example a row, its end cut off where it is too long; only the response and its end are learnt."""
    prompts = tokenizer([prompt(example) for example in examples])["input_ids"]
    answers = tokenizer([example.output for example in examples], add_special_tokens=False)["input_ids"]
    end = [tokenizer.eos_token_id]
    weighed = [
        {"tokens": [*p, *a, *end], "weights": [0.0] * len(p) + [1.0] * (len(a) + 1)}
        for p, a in zip(prompts, answers, strict=True)
    ]
    return pad(weighed, length, long="cut")
