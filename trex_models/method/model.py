"""t-ReX as one module: encoder (backbone + projector), objective, momentum encoder.

Shapes: B batch, N crops, S side in pixels, D embedding, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trex_models.distributed import gather
from trex_models.heads import widen
from trex_models.method.momentum import MomentumEncoder
from trex_models.method.objectives import Objective


class Encoder(nn.Module):
    """Backbone and projector: crops -> embeddings, z = g(f(x)) of t-ReX section 3.1.

        backbone = timm.create_model("convnext_atto", num_classes=0)
        encoder = Encoder(backbone, Projector(backbone.num_features))

    Args:
        backbone: Module that maps images of any crop resolution, (B, 3, S, S), to features, (B, F).
        projector: Module that maps features, (B, F), to embeddings, (B, D), or ``nn.Identity``.
    """

    def __init__(self, backbone: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector

    def forward(self, crops: Tensor | Sequence[Tensor]) -> Tensor:
        """Run the backbone once per resolution and the projector once over all crops.

        Args:
            crops: One tensor, or a list of tensors, one per crop, (B, 3, S, S), or per resolution,
                (crops * B, 3, S, S); crop-major, global crops first.

        Returns:
            Embeddings, (N * B, D), in the order of the crops.

        Raises:
            ValueError: The backbone does not return one vector per image.
        """
        crops = [crops] if isinstance(crops, Tensor) else crops
        features = torch.cat([self.backbone(images) for images in _by_resolution(crops)])
        if features.ndim != 2:
            raise ValueError(
                f"the backbone must return one vector per image, not {tuple(features.shape)}; "
                "use a model with global pooling and without classifier (in timm: num_classes=0)"
            )
        return self.projector(widen(features))


def _by_resolution(crops: Sequence[Tensor]) -> list[Tensor]:
    """Concatenate adjacent tensors of equal resolution, which share BatchNorm statistics."""
    joined = [crops[0]]
    for images in crops[1:]:
        if images.shape[1:] == joined[-1].shape[1:]:
            joined[-1] = torch.cat([joined[-1], images])
        else:
            joined.append(images)
    return joined


class TReX(nn.Module):
    """The method as one module: ``forward`` returns the loss, ``update_bank`` fills the bank.

    t-ReX (Sariyildiz et al., ICLR 2023, arXiv 2206.15369), section 3. A training step:

        loss, _ = method(crops, labels)
        loss.backward()
        method.update_bank(crops, labels)
        optimizer.step()

    With several processes, call ``forward`` through DistributedDataParallel with
    ``broadcast_buffers=False``; ``update_bank`` gathers the embeddings of all processes itself.

    Args:
        encoder: Online encoder, to be trained.
        objective: Loss, with its memory bank if it has one.
        ema_momentum: Momentum of the momentum encoder; ignored without a bank.
    """

    def __init__(self, encoder: Encoder, objective: Objective, ema_momentum: float = 0.999) -> None:
        super().__init__()
        self.encoder = encoder
        self.objective = objective
        self.momentum_encoder: MomentumEncoder | None = None
        if objective.bank is not None:
            self.momentum_encoder = MomentumEncoder(encoder, ema_momentum)

    def forward(
        self, crops: Tensor | Sequence[Tensor], labels: Tensor, indices: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the loss, a scalar, and the logits, (N * B, C), or similarities, (N * B,).

        Args:
            crops: One tensor per crop or per resolution, as for ``Encoder``.
            labels: Class labels, (B,), integers in [0, C).
            indices: Sample indices, (B,); only ``LOOK`` reads them.
        """
        # Before the encoder, whose activations need the memory that a teacher frees.
        targets = self.objective.targets(crops, labels)
        return self.objective(self.encoder(crops), targets, indices)

    @torch.no_grad()
    def update_bank(
        self, crops: Tensor | Sequence[Tensor], labels: Tensor, indices: Tensor | None = None
    ) -> None:
        """Update the momentum encoder, and enqueue its embeddings gathered from all processes.

        Call it after ``forward``, with the same arguments, and before the optimizer's step. It uses
        the first crop of each image, a global crop. Does nothing without a bank.
        """
        if self.objective.bank is None or self.momentum_encoder is None:
            return
        self.momentum_encoder.update(self.encoder)
        first = crops if isinstance(crops, Tensor) else crops[0]
        embeddings = widen(self.momentum_encoder(first[: len(labels)]))
        if indices is None:
            indices = torch.full_like(labels, -1)
        labels, indices = gather(torch.stack([labels, indices], 1)).unbind(1)
        self.objective.bank.enqueue(gather(embeddings), labels, indices)
