"""torch-fidelity's InceptionV3, the usual network of FID and KID."""

from torch import Tensor, nn
from torchmetrics.image.fid import NoTrainInceptionV3

from lcm.core.errors import UserError
from lcm.models.loading import load_weights

FILE = "weights-inception-2015-12-05-6726825d.pth"


class InceptionBackbone(nn.Module):
    """uint8 images `[B, 3, H, W]` -> float32 pool features `[B, 2048]`. antialias=False resizes as TensorFlow 1 did."""

    num_features = 2048

    def __init__(self, weights: str, *, antialias: bool = True) -> None:
        super().__init__()
        check(weights)
        self.net = NoTrainInceptionV3("inception-v3-compat", [str(self.num_features)], weights, antialias)
        self.name = f"InceptionV3 (299 px, {'antialiased' if antialias else 'plain TensorFlow 1'} bilinear resize)"

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images).float()


def check(weights: str) -> None:
    """Raise UserError without torch-fidelity, and for a file that holds more than tensors: torch-fidelity unpickles it."""
    try:
        import torch_fidelity  # noqa: F401
    except ImportError:
        raise UserError("InceptionV3 needs torch-fidelity: pip install -e '.[fid]'") from None
    load_weights(
        weights,
        "InceptionV3",
        f"get {FILE} from the releases of toshas/torch-fidelity on GitHub (v0.2.0), put it there, or set "
        "fid_backbone.weights=<file>",
    )
