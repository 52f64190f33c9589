"""Average precision of a class by three rules, whose values differ.

- mAP: mean precision at the ranks of the positives, as ``sklearn.metrics.average_precision_score``;
- VOC2007 11-point: mean over the recalls 0, 0.1, ..., 1 of the highest precision at that recall or
  above (Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010);
- VOC2010 area: area under the highest precision at each recall or above, the rule from 2010 on.

In all three, images with equal scores are one threshold: their order does not matter.
"""

from __future__ import annotations

import numpy as np

RULES = ("mAP", "VOC2007 11-point", "VOC2010 area")


def average_precision(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """Return the average precision of one class by each rule; NaN without positives.

    Args:
        scores: Scores of the images, (N,); higher means present.
        targets: 1 present, 0 absent, -1 ignored, (N,).
    """
    known = targets >= 0
    order = np.argsort(-scores[known])
    ranked = scores[known][order]
    ends = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))[: len(ranked)]
    found = np.cumsum(targets[known][order], dtype=np.int64)[ends]
    if not found[-1:].any():
        return dict.fromkeys(RULES, np.nan)
    total = found[-1]
    precision, gains = found / (ends + 1), np.diff(found, prepend=0)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    # In integers, since 0.1, 0.2, ... are not exact.
    at_recalls = envelope[np.searchsorted(10 * found, total * np.arange(11))]
    values = gains @ precision / total, at_recalls.mean(), gains @ envelope / total
    return dict(zip(RULES, map(float, values), strict=True))
