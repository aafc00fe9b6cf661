"""The network and the losses of SwinUNETR's pre-training: three heads on the coarsest map of two views."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mim3d.backbones.contract import Backbone
from mim3d.methods.swinunetr_ssl.views import CROP, NUM_TURNS, Views, two_views
from mim3d.nn.blocks import init_linear
from mim3d.nn.decoder import MapDecoder
from mim3d.nn.losses import ABSOLUTE_ERROR, pair_cosines, spread, view_contrast
from mim3d.nn.volumes import token_grid
from mim3d.objective import Batch, Objective, StepOutput, Tokens

if TYPE_CHECKING:
    from mim3d.methods.swinunetr_ssl.method import SwinUNETRSSL

# Shape suffixes: B crops, V = 2 B views, C channels, X Y Z space, E width of the coarsest map, D of the contrast.


class ThreeTasksObjective(Objective):
    """What was cut out, by how much a view was turned, and which view shows the same crop.

    Args:
        settings: Settings of the method.
        backbone: The encoder's recipe.
    """

    def __init__(self, settings: "SwinUNETRSSL", backbone: Backbone) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = backbone.build()
        width = self.encoder.widths[-1]
        # As in the paper, what is inpainted comes through the coarsest map alone: skips would pass the cut on.
        self.inpaint = MapDecoder(
            self.encoder.strides, self.encoder.widths, backbone.in_channels, skip_connections=False
        )
        self.rotation = nn.Linear(width, NUM_TURNS)
        self.contrast = nn.Linear(width, settings.contrast_dim)
        for head in (self.rotation, self.contrast):
            head.apply(init_linear)
        grid = token_grid(settings.crop_size(backbone), backbone.token_size)
        self.tokens_per_sample = (Tokens("view", 2, math.prod(grid)),)

    def forward(self, batch: Batch, progress: float) -> StepOutput:
        """Sum of the three weighted losses, each logged, and what tells health from collapse.

        Beside each loss is that of a guess; the rotation has its accuracy, the contrast the mean cosines of pairs and
        of others, the features their spread over views, and the views the share that was cut out of them.
        """
        views = two_views(batch[CROP].flatten(0, 1), self.settings.cut_out, self.context.generator(batch[CROP].device))
        inpainted_VCXYZ, rotation_V4, contrast_VD, features_VE = self.heads(views.shown_VCXYZ)
        whole_VCXYZ = views.whole_VCXYZ.float()
        losses = {
            "inpainting": ABSOLUTE_ERROR(inpainted_VCXYZ, whole_VCXYZ),
            "rotation": F.cross_entropy(rotation_V4.float(), views.turns_V),
            "contrast": view_contrast(contrast_VD, self.settings.temperature),
        }
        weights = zip(losses.values(), self.settings.loss_weights, strict=True)
        logs = {f"loss/{name}": loss.detach() for name, loss in losses.items()}
        with torch.no_grad():
            logs["guess/inpainting"] = ABSOLUTE_ERROR.guess(whole_VCXYZ.movedim(1, -1), whole_VCXYZ.shape[1])
            logs["guess/rotation"] = whole_VCXYZ.new_tensor(NUM_TURNS).log()
            logs["guess/contrast"] = whole_VCXYZ.new_tensor(len(whole_VCXYZ) - 1).log()
            logs["accuracy/rotation"] = (rotation_V4.argmax(1) == views.turns_V).float().mean()
            logs |= {f"cosine/{name}": cosine for name, cosine in pair_cosines(contrast_VD).items()}
            logs["spread/features"] = spread(features_VE)
            logs["cut"] = views.cut_V1XYZ.float().mean()
        if "air" in batch:
            logs["air"] = batch["air"].mean()
        return StepOutput(torch.stack([weight * loss for loss, weight in weights]).sum(), logs)

    def heads(self, shown_VCXYZ: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Inpainted views, scores of the four turns, vectors of the contrast, and the pooled features of all of them.

        Every view goes through the encoder once, all of them in one pass.
        """
        maps = self.encoder(shown_VCXYZ)
        features_VE = maps[-1].mean((2, 3, 4))
        return self.inpaint(maps), self.rotation(features_VE), self.contrast(features_VE), features_VE

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """A view of the first crop as it is, with boxes cut out, and inpainted, first channel, as ``(X, Y, Z)``."""
        crops = batch[CROP].flatten(0, 1)[:2]
        views: Views = two_views(crops, self.settings.cut_out, self.context.generator(crops.device))
        inpainted = self.heads(views.shown_VCXYZ[:1])[0]
        shown = {"whole": views.whole_VCXYZ, "cut": views.shown_VCXYZ, "inpainted": inpainted}
        return {f"view/{kind}": volumes[0, 0].float() for kind, volumes in shown.items()}
