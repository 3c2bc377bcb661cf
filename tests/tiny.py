"""Networks small enough for any test, the picture that a pipeline makes with them, and what a round trip must keep."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, UNet2DModel
from PIL import Image

from diffusers_ext import ExtDDPMScheduler, GuidedDiffusionPipeline, UNetModel


def tiny_unet(num_classes: int | None = None, dropout: float = 0.0) -> UNetModel:
    """One with random weights throughout: as it is made, the last layer is zero and so is the output."""
    torch.manual_seed(0)
    model = UNetModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        num_classes=num_classes,
        dropout=dropout,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def image_of(pipeline: DiffusionPipeline) -> np.ndarray:
    """The picture of a fixed seed, shape `(1, 8, 8, 1)`."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(batch_size=1, num_inference_steps=4, generator=generator, output_type="np").images


def assert_same_weights(got: torch.nn.Module, expected: torch.nn.Module) -> None:
    """Bit for bit, buffers and types included."""
    got, expected = got.state_dict(), expected.state_dict()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


# The weights of a loaded network lie in a mapped file, at addresses that no allocator would give. A CPU may have other
# kernels for them, which sum in another order: images in [0, 1] then differ by up to 8e-7 after a few steps in float32,
# and by some times as much where they are guided.
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2}


def assert_same_output(got: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> None:
    """Of two networks with the same weights: equal to rounding, in units of the largest value."""
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    largest = max(1.0, expected.abs().max().item())
    tolerance = ROUNDING[expected.dtype] * largest if expected.is_floating_point() else 0  # of labels
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


def assert_same_pipeline(got: DiffusionPipeline, expected: DiffusionPipeline) -> None:
    """Of one class, with components of the same classes, the same weights bit for bit, and the same picture."""
    assert type(got) is type(expected)
    for name, component in expected.components.items():
        assert type(getattr(got, name)) is type(component)
        if isinstance(component, torch.nn.Module):
            assert_same_weights(getattr(got, name), component)
    assert_same_output(image_of(got), image_of(expected))


def save_run(folder: Path) -> Path:
    """A saved pipeline, with what a training run leaves beside it."""
    scheduler = ExtDDPMScheduler(timestep_spacing="trailing")
    pipeline = GuidedDiffusionPipeline(tiny_unet(num_classes=2), scheduler, id2label={0: "zero", 1: "one"})
    pipeline.save_pretrained(folder)
    (folder / "checkpoint-10" / "denoiser").mkdir(parents=True)
    (folder / "checkpoint-10" / "denoiser" / "model.safetensors").write_bytes(b"training state")
    (folder / "logs").mkdir()
    (folder / "logs" / "events").write_bytes(b"tensorboard")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    Image.new("L", (8, 8)).save(folder / "samples.png")
    return folder


def random_stock_dit(**config) -> DiTTransformer2DModel:
    """diffusers' DiT with random numbers in all parameters, in eval mode: while training, it drops labels by itself."""
    torch.manual_seed(0)
    tiny = {"sample_size": 8, "in_channels": 4, "num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
    model = DiTTransformer2DModel(**tiny | config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_stock_unet(**config) -> UNet2DModel:
    """diffusers' U-Net of images of 8x8 pixels."""
    torch.manual_seed(0)
    tiny = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    }
    return UNet2DModel(**tiny | config).eval()
