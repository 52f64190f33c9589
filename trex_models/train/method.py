"""t-ReX as one module: encoder (backbone + projector), objective, momentum encoder.

No optimiser and no files.

Sariyildiz et al., ICLR 2023, arXiv 2206.15369, section 3.
Shapes: B batch, N crops, S side in pixels, D embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trex_models.heads import widen
from trex_models.train.distributed import gather
from trex_models.train.momentum import MomentumEncoder
from trex_models.train.objectives import Objective


class Encoder(nn.Module):
    """Backbone and projector: crops -> embeddings.

    Args:
        backbone: Maps (B, 3, S, S) to (B, F).
        projector: Maps (B, F) to (B, D): ``heads.Projector``, or the identity.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, crops: Sequence[Tensor]) -> Tensor:
        """Run the backbone once per resolution and the projector once over all crops.

        Args:
            crops: One tensor per resolution, (N_r * B, 3, S_r, S_r), crop-major, globals first.

        Returns:
            Embeddings, (N * B, D), in the order of the crops.
        """
        features = torch.cat([self.backbone(images) for images in _by_resolution(crops)])
        return self.projector(widen(features))


def _by_resolution(crops: Sequence[Tensor]) -> list[Tensor]:
    """Join neighbours of equal size: BatchNorm's statistics are those of a resolution."""
    joined = [crops[0]]
    for images in crops[1:]:
        if images.shape[1:] == joined[-1].shape[1:]:
            joined[-1] = torch.cat([joined[-1], images])
        else:
            joined.append(images)
    return joined


class TReX(nn.Module):
    """The method as one module: ``forward`` gives the loss, ``update_bank`` fills the bank.

    Args:
        encoder: The online encoder; what is trained and exported.
        objective: The loss.
        ema_momentum: m of the momentum encoder, which exists where the objective has a bank.
    """

    def __init__(self, encoder: Encoder, objective: Objective, ema_momentum: float = 0.999) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.momentum_encoder: MomentumEncoder | None = None
        if objective.bank is not None:
            self.momentum_encoder = MomentumEncoder(encoder, ema_momentum)

    def forward(
        self, crops: Sequence[Tensor], labels: Tensor, ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the loss and the logits, (N * B, C), against the bank as it is.

        Args:
            crops: One tensor per resolution, (N_r * B, 3, S_r, S_r), crop-major, globals first.
            labels: (B,).
            ids: Which samples the images are, (B,).
        """
        return self.objective(self.encoder(crops), labels, ids)

    @torch.no_grad()
    def update_bank(self, images: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Update the momentum encoder and enqueue its embeddings, of all processes in rank order.

        Belongs between ``forward`` and the optimiser's step. No-op without a bank.

        Args:
            images: The first global crop, (B, 3, S, S).
            labels: (B,).
            ids: (B,).
        """
        if self.objective.bank is None or self.momentum_encoder is None:
            return
        self.momentum_encoder.update(self.encoder)
        embeddings = widen(self.momentum_encoder(images))
        labels, ids = gather(torch.stack([labels, ids], 1)).unbind(1)
        self.objective.bank.enqueue(gather(embeddings), labels, ids)
