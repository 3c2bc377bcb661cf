"""The recipe of diffusers' `train_unconditional.py` with a time limit, to compare `train_ddpm.py` with at equal time.

    python benchmarks/train_stock.py path/to/fashion_mnist runs/stock --resolution 32 --max_train_time 600
    python training/evaluate.py runs/stock --dataset_name path/to/fashion_mnist --resolution 32

What the recipe is stands in `stock.py`; batches of 16 images of three channels without labels, in fp32, are the script's
defaults too. Images are prepared as for `train_ddpm.py`, so that both learn the same pixels.
"""

import argparse
import time

import torch
from diffusers import DDPMPipeline
from stock import StockTraining, stock_batch, stock_unet
from tqdm.auto import trange

from diffusers_ext.data.prepare import prepare_images


def main(arguments: argparse.Namespace):
    torch.manual_seed(0)
    data = prepare_images(
        arguments.dataset_name, resolution=(arguments.resolution,), mode=arguments.image_mode, unconditional=True
    )
    model = stock_unet(arguments.resolution, data.channels)
    training = StockTraining(model, arguments.schedule_steps, bf16=arguments.bf16)
    order, batch_size = torch.randperm(len(data)), arguments.train_batch_size

    start, steps = time.perf_counter(), 0
    for steps in (bar := trange(arguments.schedule_steps)):
        if time.perf_counter() - start > arguments.max_train_time or steps == arguments.max_train_steps:
            break
        rows = order[torch.arange(batch_size * steps, batch_size * (steps + 1)) % len(order)]
        bar.set_postfix(loss=training.step(stock_batch(data.pixels, rows)))

    training.average.copy_to(model.parameters())
    DDPMPipeline(model, training.scheduler).save_pretrained(arguments.output_dir)
    print(f"{steps} steps in {time.perf_counter() - start:.0f} s; saved {arguments.output_dir}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset_name")
    parser.add_argument("output_dir")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--image_mode", default="RGB", help="L, LA, RGB or RGBA")
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="run the network under bf16 autocast")
    parser.add_argument("--max_train_time", type=float, default=600, help="seconds")
    parser.add_argument("--max_train_steps", type=int, help="end after so many steps, if that is sooner")
    # 100 epochs of 60000 images, the script's default, are never reached here: its rate stays at the top.
    parser.add_argument("--schedule_steps", type=int, default=343_750, help="length of the learning rate's schedule")
    main(parser.parse_args())
