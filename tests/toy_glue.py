"""Small files of GLUE's own formats."""

import json

from experiments import glue

TEXTS = (("It rained.", "It was wet."), ('He said "no" twice.', "He agreed."))
EXAMPLES = {
    task: [(texts[: 1 if task in ("cola", "sst2") else 2], number) for number, texts in enumerate(TEXTS)]
    for task in glue.TASKS
}
EXAMPLES["stsb"] = [(TEXTS[0], 4.2), (TEXTS[1], 0.0)]
EXAMPLES["mnli"] = [(TEXTS[0], 0), (TEXTS[1], 2)]

# The official header, and a line of it with the texts and the label in their places.
LINES = {
    "cola": (None, "gj04\t{label}\t*\t{a}"),
    "sst2": ("sentence\tlabel", "{a}\t{label}"),
    "mrpc": ("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", "{label}\t11\t12\t{a}\t{b}"),
    "qqp": ("id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "0\t1\t2\t{a}\t{b}\t{label}"),
    "stsb": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tfile\t2012\t5\tnone\tnone\t{a}\t{b}\t{label}",
    ),
    "mnli": ("index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label", "0\t9\t{a}\t{b}\tneutral\t{label}"),
    "qnli": ("index\tquestion\tsentence\tlabel", "0\t{a}\t{b}\t{label}"),
    "rte": ("index\tsentence1\tsentence2\tlabel", "0\t{a}\t{b}\t{label}"),
}


def write(folder, task, kind="tsv", times=1):
    """A task's training and development sets, the same two examples so many times."""
    told = glue.TASKS[task]
    place = folder / told.folder
    place.mkdir(exist_ok=True)
    head, line = LINES[task]
    if kind == "jsonl":
        lines = [json.dumps(dict(zip(told.fields, (*texts, label), strict=True))) for texts, label in EXAMPLES[task]]
        head = None
    else:
        names = lambda label: told.labels[label] if told.labels else label  # noqa: E731
        lines = [line.format(a=t[0], b=t[-1], label=names(label)) for t, label in EXAMPLES[task]]
    for split in ("train", *glue.splits(task)):
        (place / f"{split}.{kind}").write_text("\n".join([*([head] if head else []), *lines * times]) + "\n")
