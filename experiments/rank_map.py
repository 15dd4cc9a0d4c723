"""A heat map of what is left of each matrix's rank: a row a module, a column a layer (AdaLoRA's figure 3).

from experiments.rank_map import draw
draw(methods.ranks(run.params, forward), "runs/mine/ranks.png")
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from experiments import harness
from peft_jax.methods.adalora import grid


def draw(counts: Mapping[str, int], file: str | os.PathLike[str], title: str = "ranks") -> None:
    """Writes the picture, whole or not at all.

    Args:
        counts: as `methods.ranks` gives them.
        file: where to: .png or .svg.

    Raises:
        ValueError: on another ending, or no counts.
    """
    path = Path(file)
    kind = path.suffix.removeprefix(".")
    if kind not in ("png", "svg"):
        raise ValueError(f"{path} ends in {path.suffix!r}: choose .png or .svg")
    if not counts:
        raise ValueError("there are no ranks to draw: give what methods.ranks(params, forward) gives")
    cells, columns = grid(counts)
    numbers = np.array([[mine.get(column, np.nan) for column in columns] for mine in cells.values()])

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (2.5 + 0.4 * len(columns), 1.2 + 0.35 * len(cells))
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    axes.imshow(np.ma.masked_invalid(numbers), cmap="Blues", vmin=0, vmax=max(1, np.nanmax(numbers)), aspect="auto")
    for (row, column), number in np.ndenumerate(numbers):
        if not np.isnan(number):
            dark = number > 0.6 * np.nanmax(numbers)
            axes.text(
                column, row, f"{number:.0f}", ha="center", va="center", size=8, color="white" if dark else "black"
            )
    axes.set_xticks(range(len(columns)), columns, size=8)
    axes.set_yticks(range(len(cells)), list(cells), size=8)
    axes.set_xlabel("layer", size=8)
    axes.set_title(title, size=9)
    # The same counts are the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "ranks"}):
        metadata = {"Date": None} if kind == "svg" else None
        harness.whole(path, lambda part: figure.savefig(part, dpi=150, format=kind, metadata=metadata))
    pyplot.close(figure)
