"""diffusers' side of the benchmarks: a network of `UNetModel`'s size, and the training of `train_unconditional.py`.

What that script hard-codes or has as default stands as it is there: epsilon prediction on linear betas, AdamW at 1e-4 with
betas (0.95, 0.999) and weight decay 1e-6, 500 steps of warm-up, clipping at 1, an average with inverse gamma 1 and power
3/4, NCHW, and the loss brought to the host at each step.
"""

import torch
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from diffusers_ext.pixels import to_images


def stock_unet(
    size: int | tuple[int, int],
    channels: int,
    attention_head_dim: int = 8,
    block_out_channels: tuple[int, int, int] = (64, 128, 128),
) -> UNet2DModel:
    """Two layers a level and attention at half the size; with widths 64-128-128, 6.5M parameters."""
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=2,
        block_out_channels=block_out_channels,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=attention_head_dim,
    )


class StockTraining:
    """Trains a network as the script does.

    Args:
        num_steps: Length of the learning rate's schedule.
        bf16: Whether the network runs under bf16 autocast, as with the script's `--mixed_precision bf16`.
    """

    def __init__(self, model: torch.nn.Module, num_steps: int, bf16: bool = False):
        self.model, self.bf16, self.scheduler = model, bf16, DDPMScheduler()
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.rate = get_scheduler("cosine", self.optimizer, num_warmup_steps=500, num_training_steps=num_steps)
        self.average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)

    def step(self, x0: torch.Tensor) -> float:
        """One optimizer step on images in [-1, 1]; gives the loss."""
        noise, timesteps = torch.randn_like(x0), torch.randint(0, 1000, (len(x0),))
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            output = self.model(self.scheduler.add_noise(x0, noise, timesteps), timesteps).sample
        loss = (output.float() - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.parameters())
        return loss.item()


def stock_batch(pixels, rows: torch.Tensor) -> torch.Tensor:
    """Rows of a `PixelTable` as images in [-1, 1]."""
    return to_images(torch.from_numpy(pixels[rows.numpy()]).permute(0, 3, 1, 2).contiguous())
