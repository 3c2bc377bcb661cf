"""A program of a user, with types: what it says of the public names is what they are."""

import torch
from PIL import Image

import diffusers_ext
from diffusers_ext import (
    ExtDDIMScheduler,
    GuidedDiffusionPipeline,
    TrainConfig,
    UNetModel,
    WeakModelGuidance,
    train,
)
from diffusers_ext.hub.push import push_folder


def train_step(unet: UNetModel, scheduler: ExtDDIMScheduler, images: torch.Tensor) -> torch.Tensor:
    noise = torch.randn_like(images)
    timesteps = torch.randint(0, 1000, (len(images),))
    alpha, sigma = scheduler.level(timesteps, images)
    output: torch.Tensor = unet(alpha * images + sigma * noise, timesteps).sample
    return (output - noise).square().mean()


def draw(pipe: GuidedDiffusionPipeline) -> list[Image.Image]:
    guider = WeakModelGuidance(2.0)
    pictures: list[Image.Image] = pipe(class_labels=[3, 3, 7], guidance_scale=2.0, guider=guider).images
    return pictures


unet = UNetModel(sample_size=16, in_channels=1, out_channels=1, block_out_channels=(16, 32), num_classes=10)
scheduler = ExtDDIMScheduler(beta_schedule="cosine", prediction_type="v_prediction")
loss: float = train_step(unet, scheduler, torch.zeros(2, 1, 16, 16)).item()
pipe = GuidedDiffusionPipeline(denoiser=unet, scheduler=scheduler)
pipe.save_pretrained("runs/mine")
address: str = push_folder("runs/mine", "you/mine", private=True)
draw(diffusers_ext.example("digits"))[0].save("three.png")
trained = train(TrainConfig(dataset_name="path/to/images", max_train_time="10m", learning_rate=1e-4))
trained.save_pretrained("runs/copy")
