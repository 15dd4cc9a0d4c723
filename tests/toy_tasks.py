"""Small files of the tasks' own formats, and one row of a profile run on them."""

import dataclasses
import json

import test_encoder_tasks
import torch
import toy_tokenizer
import transformers

from experiments import corpora, harness, superglue
from experiments.harness import Table

LINES = {
    "boolq": {"question": "is it a pub", "passage": "The Mill is a pub.", "idx": 0, "label": True},
    "cb": {"premise": "It rained.", "hypothesis": "It was wet.", "label": "contradiction", "idx": 1},
    "copa": {"premise": "It rained.", "choice1": "I got wet.", "choice2": "I sang.", "question": "effect", "label": 0},
    "rte": {"premise": "It rained.", "hypothesis": "It was wet.", "label": "not_entailment", "idx": 2},
    "wic": {"word": "bank", "sentence1": "A bank.", "sentence2": "The bank.", "label": False, "start1": 2, "end1": 6},
    "wsc": {
        "text": "Mark told Pete that he won.",
        "target": {"span1_index": 0, "span1_text": "Mark", "span2_index": 4, "span2_text": "he"},
        "label": True,
    },
}
CONLL03 = """-DOCSTART- -X- O O

EU NNP I-NP I-ORG
rejects VBZ I-VP O
German JJ I-NP I-MISC
call NN I-NP O

New NNP I-NP I-LOC
York NNP I-NP I-LOC
Berlin NNP B-NP B-LOC
"""


def write(folder, task, split, lines):
    place = folder / superglue.FOLDERS[task]
    place.mkdir(exist_ok=True)
    (place / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_all(folder):
    """Every text-to-text task of SuperGLUE, whose label a word of one text tells."""
    for task in superglue.TEXT_TO_TEXT:
        line, first = LINES[task], superglue.FIELDS[task][0]
        lines = [
            line | {first: f"{line[first]} {word}", "label": name if task in ("cb", "rte") else i}
            for i, (name, word) in enumerate(zip(superglue.LABELS[task], ("yes", "no", "so"), strict=False))
        ]
        for split, times in (("train", 3), ("val", 2)):
            write(folder, task, split, lines * times)


def squad_file(path, version="v2.0"):
    """Two questions on a context of 26 letters, the second of which has no answer."""
    context = "abc def ghij klm nop qrst uvw xyz"
    answers = [{"text": "qrst", "answer_start": 21}, {"text": "qrst uvw", "answer_start": 21}]
    known = {"id": "one", "question": "  what?", "answers": answers}
    unknown = {"id": "two", "question": "why?", "answers": [], "is_impossible": True, "plausible_answers": answers}
    paragraph = {"context": context, "qas": [known, unknown] if version == "v2.0" else [known]}
    path.write_text(json.dumps({"version": version, "data": [{"title": "Letters", "paragraphs": [paragraph]}]}))
    return path


def go(profile, row, folder, tmp_path, model, metrics=("score",), **settings):
    """The result of one row of a profile with small settings."""
    small = {
        "settings": dataclasses.replace(profile.settings, **settings),
        "parts": (harness.Part("", (row,), {}),),
        "metrics": tuple(metric for metric in profile.metrics if metric.name in metrics),
    }
    profile = dataclasses.replace(profile, seeds=(0,), **small)
    table, sources = Table("toy", "", "", {"paper": profile}), {"model": str(model), "data": str(folder)}
    (path,) = harness.run(table, "paper", dirty=True, results=tmp_path, say=lambda words: None, **sources)
    return json.loads(path.read_text())


def minilm(root):
    """The encoder tables' packages, small, and a tiny BERT of two layers and width 16 without a head."""
    test_encoder_tasks.write(root)
    config = transformers.BertConfig(
        vocab_size=261,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=1,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(root / corpora.MINILM)
    toy_tokenizer.roberta().save_pretrained(root / corpora.MINILM)
    return root
