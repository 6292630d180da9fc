"""Where to cut scores in two: a threshold from examples of right and wrong, and what it does to others.

Precision hangs on how many are wrong, recall does not: each figure is told with its counts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Cut(NamedTuple):
    """A threshold, and what it does to examples.

    Attributes:
      threshold: scores from it on are kept.
      right_kept, wrong_dropped: shares of the right and of the wrong examples.
      right, wrong: how many examples.
    """

    threshold: float
    right_kept: float
    wrong_dropped: float
    right: int
    wrong: int


class Found(NamedTuple):
    """How well what is kept is what is right.

    Attributes:
      scored, kept, right, kept_right: counts.
      precision: of what is kept, the share that is right; None if nothing is kept.
      recall: of what is right, the share that is kept; None if nothing is right.
      average_precision: area under precision over recall for all thresholds; None without both right and wrong.
    """

    scored: int
    kept: int
    right: int
    kept_right: int
    precision: float | None
    recall: float | None
    average_precision: float | None


def best_cut(right: Sequence[float], wrong: Sequence[float]) -> Cut:
    """Returns the threshold that tells examples apart best, by the shares of the right kept and of the wrong dropped.

    It lies in the middle between two scores, since the next right score may well be a little lower.
    """
    scores = np.unique([*right, *wrong])
    middles = np.concatenate([scores[:1], (scores[:-1] + scores[1:]) / 2])
    kept = np.searchsorted(np.sort(right), middles, side="left")
    dropped = np.searchsorted(np.sort(wrong), middles, side="left")
    gain = dropped / len(wrong) - kept / len(right)
    ties = np.flatnonzero(gain == gain.max())
    place = ties[len(ties) // 2]
    shares = 1 - kept[place] / len(right), dropped[place] / len(wrong)
    return Cut(float(middles[place]), *map(float, shares), len(right), len(wrong))


def found(scores: Sequence[float], right: Sequence[bool], threshold: float) -> Found:
    """Returns how well a threshold finds what is right."""
    values, truth = np.asarray(scores, float), np.asarray(right, bool)
    kept = values >= threshold
    both = int((kept & truth).sum())
    curve = precision_recall(scores, right)
    area = None
    if curve:
        precision, recall = curve
        area = float(np.sum(np.diff(recall, prepend=0.0) * precision))
    return Found(
        len(values),
        int(kept.sum()),
        int(truth.sum()),
        both,
        both / kept.sum() if kept.any() else None,
        both / truth.sum() if truth.any() else None,
        area,
    )


def precision_recall(scores: Sequence[float], right: Sequence[bool]) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns precision and recall at each score from the highest on, equal ones together; None without right and wrong."""
    values, truth = np.asarray(scores, float), np.asarray(right, bool)
    if truth.all() or not truth.any():
        return None
    order = np.argsort(-values, kind="stable")
    values, hits = values[order], truth[order].cumsum()
    last = np.flatnonzero(np.append(np.diff(values) != 0, True))
    return hits[last] / (last + 1), hits[last] / truth.sum()


def draw_precision_recall(scored: Mapping[str, Sequence[tuple[float, bool]]], threshold: float, path: Path) -> bool:
    """Draws precision over recall of each set of (score, right) into a PNG; False if none has both right and wrong.

    Args:
      scored: by name.
      threshold: where it is marked on each curve.
      path: of the PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, pairs in scored.items():
        values, right = [score for score, _ in pairs], [is_right for _, is_right in pairs]
        curve = precision_recall(values, right) if pairs else None
        if curve is None:
            continue
        own = found(values, right, threshold)
        label = f"{name}, {sum(right) / len(right):.0%} right, area {own.average_precision:.3f}"
        [line] = axes.plot(curve[1], curve[0], label=label)
        if own.precision is not None:
            axes.plot(own.recall, own.precision, "o", color=line.get_color())
    if not axes.lines:
        return False
    axes.set(
        xlabel="recall", ylabel="precision", xlim=(0, 1.02), ylim=(0, 1.02), title="right captions among those kept"
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)
    return True
