"""Networks of the published layout with random weights, and the same networks converted."""

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ext import DiffusionPipeline, GuidedDiffusionPipeline
from diffusers_ext.conversion.files import load_checkpoint
from diffusers_ext.conversion.guided_diffusion import convert_unet, make_scheduler, tensors_of
from diffusers_ext.diffusion.betas import make_betas
from guided_diffusion_unet import GuidedDiffusionUNet
from training.convert_checkpoint import ConvertConfig, main


def random_unet(**options):
    torch.manual_seed(0)
    network = GuidedDiffusionUNet(**options).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    for name, parameter in network.named_parameters():
        if "qkv" in name or ".norm." in name:  # so that attention is far from even, and its order counts
            torch.nn.init.normal_(parameter, std=1.0)
    return network


CASES = {
    "improved-diffusion": ({"num_heads": 2, "use_scale_shift_norm": False}, {"num_heads": 2}),
    "of two blocks": ({"num_heads": 1, "num_res_blocks": 2, "channel_mult": (1, 1, 2)}, {"num_heads": 1}),
    "guided-diffusion": (
        {
            "num_head_channels": 16,
            "resblock_updown": True,
            "attention_levels": (1, 2),
            "channel_mult": (1, 2, 3),
            "num_classes": 5,
            "out_channels": 6,
        },
        {"num_head_channels": 16},
    ),
    "with the new order": (
        {"num_head_channels": 16, "use_new_attention_order": True},
        {"num_head_channels": 16, "use_new_attention_order": True},
    ),
    "of one resolution": ({"channel_mult": (1,), "num_heads": 2, "attention_levels": ()}, {"num_heads": 2}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_converted_network_says_the_same(case):
    made, told = CASES[case]
    reference = random_unet(**made)
    converted = convert_unet(reference.state_dict(), 16, **told).double()
    reference.double()  # since sharp attention makes much of the last digit of float32
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64), torch.tensor([3, 900])
    labels = torch.tensor([1, 4]) if made.get("num_classes") else None
    with torch.no_grad():
        expected = reference(x, t, labels)
        got = converted(x, t, class_labels=labels).sample
    assert expected.std() > 0.01
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_a_checkpoint_becomes_a_pipeline_with_its_path(tmp_path):
    reference = random_unet(num_head_channels=16, out_channels=6)
    torch.save(reference.state_dict(), tmp_path / "model.pt")
    save_file(reference.state_dict(), tmp_path / "same.safetensors")
    assert load_checkpoint(tmp_path / "same.safetensors").keys() == load_checkpoint(tmp_path / "model.pt").keys()
    config = {"file": str(tmp_path / "model.pt"), "image_size": 16, "num_head_channels": 16}
    folder = main(ConvertConfig(**config, noise_schedule="cosine", diffusion_steps=100, rescale_timesteps=False))
    assert folder == tmp_path / "model"
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    assert pipe.scheduler.config.variance_type == "learned_range"
    with pytest.raises(ValueError, match="output_dir must be a new or an empty folder"):
        main(ConvertConfig(**config))


@pytest.mark.parametrize("steps", [1000, 100])
def test_the_linear_schedule_is_scaled_to_its_length(steps):
    network = convert_unet(random_unet(num_heads=1).state_dict(), 16, num_heads=1)
    betas = torch.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=torch.float64)
    scheduler = make_scheduler(network, "linear", steps, rescale_timesteps=False)
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-5, atol=1e-7)
    cosine = make_scheduler(network, "cosine", steps, True, rescale_timesteps=False)
    expected = (1 - torch.as_tensor(make_betas("cosine", steps))).cumprod(0).double()
    torch.testing.assert_close(cosine.alphas_cumprod.double(), expected, rtol=1e-5, atol=1e-7)
    assert cosine.config.prediction_type == "sample"


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_network_that_was_given_timesteps_of_1000_is_given_them_again(name):
    """Of 4000 levels, as improved-diffusion's published networks have, each fourth: at timestep t that of 4 t."""
    network = convert_unet(random_unet(num_heads=1).state_dict(), 16, num_heads=1)
    scheduler = make_scheduler(network, name, 4000, rescale_timesteps=True)
    ends = {"beta_start": 1e-4 / 4, "beta_end": 0.02 / 4} if name == "linear" else {}
    alpha_bar = (1 - torch.as_tensor(make_betas(name, 4000, **ends))).cumprod(0).double()
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), alpha_bar[::4], rtol=1e-5, atol=1e-9)
    seen = []
    pipe = GuidedDiffusionPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    network.register_forward_pre_hook(lambda module, args: seen.append(float(args[1])))
    pipe(num_inference_steps=4, output_type="latent")
    assert seen == [999, 749, 499, 249]
    with pytest.raises(ValueError, match="rescale_timesteps must be given for 4000 diffusion_steps"):
        make_scheduler(network, name, 4000)
    with pytest.raises(ValueError, match="diffusion_steps must be a multiple of 1000 .* got 500"):
        make_scheduler(network, name, 500, rescale_timesteps=True)


def test_what_cannot_be_converted_is_refused(tmp_path):
    state = random_unet(num_heads=2, attention_levels=(0, 1)).state_dict()
    with pytest.raises(ValueError, match="num_heads 2 at levels of 32, 64 channels makes heads of several sizes"):
        convert_unet(state, 16, num_heads=2)
    with pytest.raises(ValueError, match="exactly one of num_heads and num_head_channels must be given"):
        convert_unet(state, 16)
    with pytest.raises(ValueError, match="heads of 24 channels must divide the widths"):
        convert_unet(state, 16, num_head_channels=24)
    with pytest.raises(ValueError, match="image_size must be a multiple of 2, got 15"):
        convert_unet(state, 15, num_head_channels=16)
    with pytest.raises(ValueError, match="channel_mult must begin with 1"):
        convert_unet(random_unet(num_heads=1, channel_mult=(2, 2)).state_dict() | _narrow_first(), 16, num_heads=1)
    with pytest.raises(ValueError, match="which has time_embed.0.weight; it begins with conv.weight"):
        convert_unet({"conv.weight": torch.zeros(1)}, 16, num_heads=1)
    with pytest.raises(ValueError, match="layers that UNet2DModel has not, or the other way round"):
        convert_unet({k: v for k, v in state.items() if k != "out.0.bias"}, 16, num_head_channels=16)
    torch.save({"step": 1, "model": state}, tmp_path / "trainer.pt")
    with pytest.raises(ValueError, match="must hold tensors by name, .* got step, model"):
        tensors_of(load_checkpoint(tmp_path / "trainer.pt"), "trainer.pt")
    (tmp_path / "broken.pt").write_bytes(b"no checkpoint")
    with pytest.raises(
        ValueError, match="the checkpoint must be a file, .pt or .safetensors, and there is none at none.pt"
    ):
        load_checkpoint("none.pt")
    for name, kind in (("text.pt", "UnpicklingError"), ("text.safetensors", "SafetensorError")):
        (tmp_path / name).write_text("image,label")
        with pytest.raises(ValueError, match=f"must hold weights alone, .* or holds something else .{kind}"):
            load_checkpoint(tmp_path / name)
    with pytest.raises(ValueError, match="must hold weights alone"):
        load_checkpoint(tmp_path / "broken.pt")


def _narrow_first():
    """The first convolution of a network whose `channel_mult` does not begin with 1, as a wider one would have it."""
    return {"input_blocks.0.0.weight": torch.zeros(32, 3, 3, 3), "input_blocks.0.0.bias": torch.zeros(32)}
