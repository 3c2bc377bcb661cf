"""The trainer of lucidrains' denoising_diffusion_pytorch with a time limit, to compare `train_ddpm.py` with at equal time.

    python -m venv .peer && .peer/bin/pip install denoising-diffusion-pytorch datasets
    .peer/bin/python benchmarks/train_lucidrains.py path/to/fashion_mnist runs/peer --resolution 32 --max_train_time 600
    python training/convert_checkpoint.py runs/peer/model-1.pt --output_dir runs/of_peer --image_size 32
    python training/evaluate.py runs/of_peer --dataset_name path/to/fashion_mnist --resolution 32

It needs no package of this project, and has an environment of its own. The network has the widths of `stock_unet`, and what is
not said here is the trainer's default: predicted noise on its sigmoid betas, Adam, an average of 0.995. Images are not flipped,
which shoes cannot bear. It reads images from files, which are written first, from the column `image` of a data set of `datasets`,
padded to the resolution with black.
"""

import argparse
import threading
import time
from pathlib import Path

import datasets
from PIL import Image
from tqdm.auto import tqdm


def write_images(name: str, folder: Path, resolution: int) -> None:
    """The training images as PNG files of one channel, unless they are there."""
    if folder.is_dir():
        return
    partial = folder.with_name(f"{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    for index, picture in enumerate(tqdm(datasets.load_dataset(name, split="train")["image"], desc="writing images")):
        square = Image.new("L", (resolution, resolution))
        square.paste(picture.convert("L"), ((resolution - picture.width) // 2, (resolution - picture.height) // 2))
        square.save(partial / f"{index:06}.png")
    partial.rename(folder)


def main(arguments: argparse.Namespace) -> None:
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

    out = Path(arguments.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    images = out.with_name(f"{out.name}-images")
    write_images(arguments.dataset_name, images, arguments.resolution)
    network = Unet(dim=64, dim_mults=(1, 2, 2), channels=1)
    diffusion = GaussianDiffusion(network, image_size=arguments.resolution)
    trainer = Trainer(
        diffusion,
        str(images),
        train_batch_size=arguments.train_batch_size,
        augment_horizontal_flip=False,
        train_num_steps=arguments.max_train_steps or 10**9,
        save_and_sample_every=10**9,
        results_folder=str(out),
        amp=arguments.bf16,
        mixed_precision_type="bf16",
        calculate_fid=False,
    )
    # It ends at a number of steps, which becomes that of the step at which the time is over.
    timer = threading.Timer(
        arguments.max_train_time, lambda: setattr(trainer, "train_num_steps", min(trainer.step + 1, 10**9))
    )
    timer.daemon = True
    start = time.perf_counter()
    timer.start()
    trainer.train()
    timer.cancel()
    seconds = time.perf_counter() - start
    trainer.save(1)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    print(f"{parameters / 1e6:.1f}M parameters, {trainer.step} steps in {seconds:.0f} s; saved {out / 'model-1.pt'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset_name")
    parser.add_argument("output_dir")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--train_batch_size", type=int, default=16)
    parser.add_argument("--bf16", action="store_true", help="train under bf16 autocast")
    parser.add_argument("--max_train_time", type=float, default=600, help="seconds")
    parser.add_argument("--max_train_steps", type=int, help="end after so many steps, if that is sooner")
    main(parser.parse_args())
