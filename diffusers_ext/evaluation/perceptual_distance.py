"""LPIPS, the distance of two images in the features of a network for photographs (Zhang et al. 2018, arXiv 1801.03924).

The networks and the weights of their layers are those of the package lpips, in the extra `lpips`.
"""

import warnings

import torch
from accelerate import PartialState
from torch import Tensor, nn

from diffusers_ext.evaluation.pretrained_features import first_line, import_of_extra
from diffusers_ext.pixels import to_images


# Each with the file of its weights for photographs that torchvision downloads, and the smallest side that it sees anything of.
LPIPS_NETWORKS = {
    "alex": ("alexnet-owt-7be5be79.pth", 31),
    "vgg": ("vgg16-397923af.pth", 16),
    "squeeze": ("squeezenet1_1-b8a52dc0.pth", 17),
}


class PerceptualDistance(nn.Module):
    """LPIPS between 8-bit images of 1 channel or of 3.

    Args:
        name: Of the network, for messages.
        network: From two batches of RGB images in [-1, 1], shape `(batch, 3, height, width)`, to a distance for each.
        smallest: Side that images must have at least.
    """

    def __init__(self, name: str, network: nn.Module, smallest: int = 1):
        super().__init__()
        self.name, self.network, self.smallest = name, network.eval().requires_grad_(False), smallest

    def check(self, shape: tuple[int, ...]) -> None:
        """Refuses images that the network does not take.

        Args:
            shape: `(channels, height, width)`.

        Raises:
            ValueError: with what it takes.
        """
        if len(shape) != 3 or shape[0] not in (1, 3) or min(shape[1:]) < self.smallest:
            raise ValueError(
                f"LPIPS by {self.name} is of images of 1 or 3 channels and at least {self.smallest} pixels a side, got (channels, "
                f"height, width) {tuple(shape)}"
            )

    @torch.no_grad()
    def measure(self, images: Tensor, truth: Tensor, batch_size: int = 64) -> Tensor:
        """The distance of each two images, float32, shape `(number,)`, on the CPU; 0 for equal ones.

        Args:
            images, truth: uint8, shape `(number, channels, height, width)`.
        """
        self.check(tuple(images.shape[1:]))
        device = next((each.device for each in (*self.parameters(), *self.buffers())), images.device)
        distances = []
        for pair in zip(images.split(batch_size), truth.split(batch_size), strict=True):
            x, y = (to_images(each.to(device)).expand(-1, 3, -1, -1) for each in pair)
            distances.append(self.network(x, y).flatten().float().cpu())
        return torch.cat(distances)


def load_lpips(name: str) -> PerceptualDistance:
    """LPIPS by a network of `LPIPS_NETWORKS`.

    Raises:
        ValueError: for another name, and where the package or the weights are not there, with what to do.
    """
    if name not in LPIPS_NETWORKS:
        raise ValueError(f"lpips must be one of {', '.join(LPIPS_NETWORKS)}, got {name!r}")
    package = import_of_extra("lpips", "LPIPS needs the package lpips", "lpips")
    file, smallest = LPIPS_NETWORKS[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it calls torchvision by an older name of an argument
            network = package.LPIPS(net=name, verbose=False)
    except OSError as error:
        raise ValueError(
            f"the weights of LPIPS by {name} could not be downloaded: {first_line(error)}. Put the file that torchvision names, "
            f"{file}, into {torch.hub.get_dir()}/checkpoints"
        ) from error
    return PerceptualDistance(name, network, smallest)


def load_distance(name: str | None, shape: tuple[int, ...], state: PartialState) -> PerceptualDistance | None:
    """LPIPS for images of this shape `(channels, height, width)`, on the device of `state`; None for no name.

    Raises:
        ValueError: see `load_lpips`; and for images that it does not take.
    """
    if name is None:
        return None
    with state.main_process_first():
        distance = load_lpips(name)
    distance.check(shape)
    return distance.to(state.device)
