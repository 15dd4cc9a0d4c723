"""Questions of common sense: the harness's prompts, and log-likelihoods against transformers."""

import json

import numpy as np
import pytest
import torch
from oracles.peft_models import base

from experiments import commonsense

RECORDS = {
    "hellaswag": (
        {"activity_label": "Shaving", "ctx_a": "Man [title] shaves.", "ctx_b": "he", "endings": ["ends.", "[x] runs."],
         "label": "1"},
        (("Shaving: Man. shaves. He", " ends."), ("Shaving: Man. shaves. He", "  runs.")), 1),
    "piqa": (
        {"goal": "Open a jar", "sol1": "twist", "sol2": "cut", "label": 0},
        (("Question: Open a jar\nAnswer:", " twist"), ("Question: Open a jar\nAnswer:", " cut")), 0),
    "winogrande": (
        {"sentence": "Ann met Bea, and _ smiled.", "option1": "Ann", "option2": "Bea", "answer": "2"},
        (("Ann met Bea, and Ann", " smiled."), ("Ann met Bea, and Bea", " smiled.")), 1),
    "arc_easy": (
        {"question": "What?", "choices": {"text": ["x", "y"], "label": ["A", "B"]}, "answerKey": "B"},
        (("Question: What?\nAnswer:", " x"), ("Question: What?\nAnswer:", " y")), 1),
    "boolq": (
        {"passage": "P.", "question": "is it", "answer": True},
        (("P.\nQuestion: is it?\nAnswer:", " no"), ("P.\nQuestion: is it?\nAnswer:", " yes")), 1),
    "openbookqa": (
        {"question_stem": "The sun", "choices": {"text": ["a", "bb"], "label": ["A", "B"]}, "answerKey": "A"},
        (("The sun", " a"), ("The sun", " bb")), 0),
}  # fmt: skip
RECORDS["arc_challenge"] = RECORDS["arc_easy"]


def test_records_are_asked_as_the_harness_asks_them(tmp_path):
    assert RECORDS.keys() == commonsense.TASKS.keys()
    for task, (record, pairs, answer) in RECORDS.items():
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(record) + "\n")
        (found,) = commonsense.read(tmp_path, task)
        assert (found.pairs, found.answer) == (pairs, answer), task
    with pytest.raises(ValueError, match="there is no task 'copa': choose from hellaswag"):
        commonsense.read(tmp_path, "copa")
    (tmp_path / "piqa.jsonl").write_text('{"goal": "x"}\n')
    with pytest.raises(ValueError, match=r"piqa.jsonl, line 1 is not a record of piqa: KeyError"):
        commonsense.read(tmp_path, "piqa")


def words(text):
    """A token for each character, of a vocabulary of 48."""
    return {"input_ids": [3 + ord(letter) % 45 for letter in text]}


def test_scores_are_log_likelihoods_of_transformers():
    model, ours = base("llama").torch().eval(), base("llama")
    random = np.random.RandomState(0)
    letters = lambda n: "".join(chr(97 + i) for i in random.randint(0, 26, n))  # noqa: E731
    questions = []
    for _ in range(6):
        context, choices = letters(random.randint(3, 9)) + " ", [letters(n) for n in (2, 7)]
        questions.append(commonsense.Question(tuple((context, c) for c in choices), random.randint(2), (2, 7)))
    wanted = []
    for question in questions:
        for context, continuation in question.pairs:
            tokens = torch.tensor([words(context + continuation)["input_ids"]])
            with torch.no_grad():
                logp = torch.log_softmax(model(tokens).logits[0, :-1].double(), -1)
            each = logp[torch.arange(len(logp)), tokens[0, 1:]]
            wanted.append(float(each[len(context.rstrip()) - 1 :].sum()))  # the space is the continuation's
    given = [commonsense.encoded(words, *pair, 32) for question in questions for pair in question.pairs]
    np.testing.assert_allclose(commonsense.likelihoods(ours.forward, ours.params, given, 4), wanted, atol=1e-3)
    found = commonsense.score(ours.forward, ours.params, questions, words, 32, rows=4)
    each, answers = np.array(wanted).reshape(6, 2), np.array([q.answer for q in questions])
    assert found.accuracy == pytest.approx(np.mean(each.argmax(1) == answers))
    assert found.normalised == pytest.approx(np.mean((each / [2, 7]).argmax(1) == answers))
    with pytest.raises(ValueError, match="has 0 tokens: at least 1"):
        commonsense.encoded(words, "a", "", 32)
