"""Scores of written texts against references, by the packages that others use.

    bleu      corpus BLEU of sacrebleu (Post 2018, arXiv:1804.08771), its tokenizer "13a", case kept
    rouge_l   ROUGE-L of rouge-score (Lin 2004): F of the longest common subsequence of words, lower case, with Porter's
              stemmer; the best of a text's references, then the mean over texts

Both are in percent.  The E2E challenge's own BLEU is `experiments.e2e.bleu`.
"""

from collections.abc import Sequence

from rouge_score import rouge_scorer
from sacrebleu.metrics import BLEU


def bleu(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU of texts with one or more references each.

    >>> from experiments import scores
    >>> round(scores.bleu(["The Mill serves cheap food."], [["Cheap food.", "The Mill serves cheap food."]]))
    100
    """
    _check(texts, references)
    most = max(map(len, references))
    # One stream for each place in the lists of references, empty where a text has fewer: sacrebleu skips those.
    streams = [[given[i] if i < len(given) else "" for given in references] for i in range(most)]
    return float(BLEU().corpus_score(list(texts), streams).score)


def rouge_l(texts: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean ROUGE-L of texts with one or more references each.

    >>> from experiments import scores
    >>> round(scores.rouge_l(["The Mill is cheap."], [["A pub.", "The Mill is a cheap pub."]]), 1)  # 4 of 4, 4 of 6
    80.0
    """
    _check(texts, references)
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    best = [
        max(scorer.score(given, text)["rougeL"].fmeasure for given in r)
        for text, r in zip(texts, references, strict=True)
    ]
    return 100 * sum(best) / len(best)


def _check(texts: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if not texts or len(texts) != len(references) or not all(references):
        raise ValueError(f"{len(texts)} texts and {len(references)} lists of references: give each text one or more")
