"""The recipe of diffusers' `train_unconditional.py` with a time limit, to compare `train_ddpm.py` with at equal time.

    python benchmarks/train_stock.py ../fashion_mnist runs/stock --resolution 32 --max_train_time 600
    python training/evaluate.py runs/stock --dataset_name ../fashion_mnist --resolution 32

What the script hard-codes or has as default stands as it is there: three channels, no labels, epsilon prediction, linear
betas, batches of 16, AdamW at 1e-4 with betas (0.95, 0.999) and weight decay 1e-6, 500 steps of warm-up, an average with
inverse gamma 1 and power 3/4, fp32 in NCHW. The network has the widths and layers of `UNetModel`'s defaults, which make
it the same size. Images are prepared as for `train_ddpm.py`, so that both learn the same pixels.
"""

import argparse
import time

import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import trange

from diffusers_ext.trainer.prepare import prepare_images


def build_model(resolution: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=resolution,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(64, 128, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )


def main(arguments: argparse.Namespace):
    torch.manual_seed(0)
    data = prepare_images(arguments.dataset_name, resolution=(arguments.resolution,), mode="RGB", with_labels=False)
    model, scheduler = build_model(arguments.resolution), DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rate = get_scheduler("cosine", optimizer, num_warmup_steps=500, num_training_steps=arguments.schedule_steps)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=3 / 4)
    order = torch.randperm(len(data))

    start, steps = time.perf_counter(), 0
    for steps in (bar := trange(arguments.schedule_steps)):
        if time.perf_counter() - start > arguments.max_train_time:
            break
        rows = order[torch.arange(16 * steps, 16 * steps + 16) % len(order)]
        x0 = torch.from_numpy(data.pixels[rows.numpy()]).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1
        noise, timesteps = torch.randn_like(x0), torch.randint(0, 1000, (16,))
        output = model(scheduler.add_noise(x0, noise, timesteps), timesteps).sample
        loss = (output - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        average.step(model.parameters())
        bar.set_postfix(loss=loss.item())

    average.copy_to(model.parameters())
    DDPMPipeline(model, scheduler).save_pretrained(arguments.output_dir)
    print(f"{steps} steps in {time.perf_counter() - start:.0f} s; saved {arguments.output_dir}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset_name")
    parser.add_argument("output_dir")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--max_train_time", type=float, default=600, help="seconds")
    # 100 epochs of 60000 images, the script's default, are never reached here: its rate stays at the top.
    parser.add_argument("--schedule_steps", type=int, default=343_750, help="length of the learning rate's schedule")
    main(parser.parse_args())
