"""WebNLG and DART: facts in, a text about them out, as pairs for `experiments.e2e`.

    Aarhus : leaderName : Jacob_Bundsgaard | Aarhus : country : Denmark     a fact is a subject, a relation, an object

webnlg    train, dev and test.json of the 2017 challenge (Gardent et al. 2017): ``{"entries": [{"1": entry}, …]}``, an
          entry with "modifiedtripleset": ``[{"subject", "property", "object"}, …]`` and "lexicalisations":
          ``[{"lex", "comment"}, …]``.  Trained on are the texts marked "good"; a written text is compared with all.
dart      dart-v1.1.1-full-{train,dev,test}.json (Nan et al. 2021, arXiv:2007.02871): ``[{"tripleset": [[subject,
          relation, object], …], "annotations": [{"source", "text"}, …]}, …]``.  Relations are put into lower case.

Both are laid out as in XiangLi1999/PrefixTuning, transformers' data/datasets/language_modeling.py, of which
gpt2/run_language_modeling.py uses LineByLineWebNLGTextDataset and LineByLineTriplesTextDataset; it writes a bar before
WebNLG's first fact too.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import e2e
from experiments.e2e import Pair

FILES = {  # by data set: where its files lie, and what they call the parts
    "e2e": ("e2e_data/src1_{}.txt", {"train": "train", "valid": "valid", "test": "test"}),
    "webnlg": ("webnlg_challenge_2017/{}.json", {"train": "train", "valid": "dev", "test": "test"}),
    "dart": ("dart/dart-v1.1.1-full-{}.json", {"train": "train", "valid": "dev", "test": "test"}),
}


def read(folder: Path, data: str, part: str) -> list[Pair]:
    """The pairs of a part ("train", "valid" or "test") of a data set, in the folder layout of the paper's repository.

    Raises:
        FileNotFoundError: if the file is not there.
        ValueError: if it is not of its format, with the entry that is not.
    """
    pattern, names = FILES[data]
    path = folder / pattern.format(names[part])
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is not there: give a folder like data/ of XiangLi1999/PrefixTuning with --data"
        )
    if data == "e2e":
        return e2e.read(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    found = list(_webnlg(entries, path, part != "test") if data == "webnlg" else _dart(entries, path))
    if not found:
        raise ValueError(f"{path} is empty: it has no texts")
    return found


def facts(triples: Sequence[Sequence[str]]) -> str:
    return " | ".join(" : ".join(triple) for triple in triples)


def _webnlg(content: Any, path: Path, good: bool) -> Iterator[Pair]:
    entries = content.get("entries") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise ValueError(f'{path} is not of WebNLG: {{"entries": [...]}} is')
    for number, outer in enumerate(entries, 1):
        try:
            (entry,) = outer.values()
            triples = [(t["subject"], t["property"], t["object"]) for t in entry["modifiedtripleset"]]
            texts = [text["lex"] for text in entry["lexicalisations"] if text["comment"] == "good" or not good]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}, entry {number} is not of WebNLG: {error!r}") from None
        yield from ((f"| {facts(triples)}", text) for text in texts)


def _dart(entries: Any, path: Path) -> Iterator[Pair]:
    if not isinstance(entries, list):
        raise ValueError(f"{path} is not of DART: a list of entries is")
    for number, entry in enumerate(entries, 1):
        try:
            triples = [(subject, relation.lower(), thing) for subject, relation, thing in entry["tripleset"]]
            texts = [annotation["text"] for annotation in entry["annotations"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path}, entry {number} is not of DART: {error!r}") from None
        yield from ((facts(triples), text) for text in texts if text.strip())
