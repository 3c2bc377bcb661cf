"""How fast `UNetModel` learns beside diffusers' `UNet2DModel`, by steps: the same batches, noise and optimizer.

    python benchmarks/bench_learning.py --dataset_name path/to/fashion_mnist --steps 300

Both have widths 64-128-128 and about 6.5M parameters, no labels, and predict noise on the linear schedule under bf16
autocast. Printed is the mean loss over stretches of the run; the noise of a stretch is the same for both, so that a
difference of a few percent is a difference of the networks.
"""

import argparse

import torch
from stock import stock_unet
from tqdm.auto import trange

from diffusers_ext import ExtDDPMScheduler, UNetModel
from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.diffusion.noising import add_noise
from diffusers_ext.pixels import to_images


def networks(size: tuple[int, int], channels: int) -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    ours = {"in_channels": channels, "out_channels": channels, "block_out_channels": (64, 128, 128)}
    return {"diffusers": stock_unet(size, channels), "diffusers_ext": UNetModel(sample_size=size, **ours)}


def losses(model: torch.nn.Module, images: torch.Tensor, steps: int, batch_size: int, learning_rate: float):
    """The loss of each step."""
    generator = torch.Generator().manual_seed(1)
    schedule = ExtDDPMScheduler().schedule
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    values = []
    for step in trange(steps):
        optimizer.param_groups[0]["lr"] = learning_rate * min(1, (step + 1) / 50)
        rows = torch.randint(len(images), (batch_size,), generator=generator)
        x0 = to_images(images[rows])
        noise = torch.randn(x0.shape, generator=generator)
        timesteps = torch.randint(1000, (batch_size,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(add_noise(x0, noise, schedule.level(timesteps, x0)), timesteps).sample
        loss = (output.float() - noise).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values)


def main(dataset_name: str, steps: int, batch_size: int, learning_rate: float, threads: int, num_images: int):
    torch.set_num_threads(threads)
    data = prepare_images(dataset_name, unconditional=True, multiple_of=4, max_samples=num_images)
    images = torch.from_numpy(data.pixels[torch.arange(len(data)).numpy()]).permute(0, 3, 1, 2)
    curves = {
        name: losses(model, images, steps, batch_size, learning_rate)
        for name, model in networks(data.size, data.channels).items()
    }
    print(f"{data.name}, {steps} steps of {batch_size} images, learning rate {learning_rate:g}")
    print(f"{'steps':>14}{'diffusers':>12}{'diffusers_ext':>15}{'ratio':>8}")
    for start in range(0, steps, max(steps // 5, 1)):
        stock, ours = [curve[start : start + steps // 5].mean().item() for curve in curves.values()]
        print(f"{f'{start}-{min(start + steps // 5, steps)}':>14}{stock:12.4f}{ours:15.4f}{ours / stock:8.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset_name", default="digits")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num_images", type=int, default=10_000, help="use only the first so many")
    main(**vars(parser.parse_args()))
