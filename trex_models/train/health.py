"""What tells whether a head is well: the bank's contents, and how fast class vectors move.

t-ReX section 5 compares how much prototypes (Eq. 2) and learned weights (Eq. 1) change per step.
Shapes: C classes, D embedding, Q bank size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trex_models.train.bank import MemoryBank
from trex_models.train.objectives import Objective


@torch.no_grad()
def class_directions(objective: Objective) -> Tensor | None:
    """Return the unit vectors that classes are compared with, (C, D), or None without such."""
    weights = objective.class_weights()
    return None if weights is None else F.normalize(weights.float(), dim=1)


def head_health(objective: Objective, before: Tensor | None) -> dict[str, float]:
    """Measure the head after a step; waits for the device.

    Args:
        objective: With its bank or its learned weights.
        before: ``class_directions`` before the step.

    Returns:
        Where classes have vectors, prototype_change: the mean length of the change of their unit
        vectors in the step; and empty_prototypes, how many are zero. Where there is a bank, of the
        entries that this run wrote bank_classes, the share of the classes that have one; bank_age
        and bank_oldest, their mean and largest age in steps; and bank_initial, the share of the
        other ones: the noise that the bank began with, or what ``init_from`` filled it with.
    """
    measured: dict[str, float] = {}
    after = class_directions(objective)
    if before is not None and after is not None:
        measured["prototype_change"] = (after - before).norm(dim=1).mean().item()
        measured["empty_prototypes"] = int((~after.any(1)).sum())
    if objective.bank is not None:
        measured |= _bank_health(objective.bank)
    return measured


def _bank_health(bank: MemoryBank) -> dict[str, float]:
    own = bank.written >= 0
    ages = bank.batches - 1 - bank.written[own]
    classes = bank.labels[own].unique()
    return {
        "bank_classes": len(classes) / bank.num_classes,
        "bank_age": ages.double().mean().item() if len(ages) else 0.0,
        "bank_oldest": int(ages.max()) if len(ages) else 0,
        "bank_initial": 1 - len(ages) / len(own),
    }
