"""Networks of the layout of denoising_diffusion_pytorch with random weights, and the same networks converted."""

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from diffusers_ext import DiffusionPipeline, LucidrainsUNetModel
from diffusers_ext.conversion import lucidrains
from diffusers_ext.conversion.lucidrains import Checkpoint, convert_network, make_scheduler, objective_of
from diffusers_ext.diffusion.betas import make_betas
from lucidrains_unet import ReferenceUnet, diffusion_tables
from training.convert_checkpoint import ConvertConfig, main


def random_unet(**options):
    torch.manual_seed(0)
    network = ReferenceUnet(**options).eval()
    for name, parameter in network.named_parameters():
        # Attention far from even, so that its heads and memories count; all else so that outputs are of about unit size.
        sharp = any(part in name for part in ("to_qkv", "mem_kv"))
        torch.nn.init.normal_(parameter, std=0.7 if sharp else 0.15, mean=float(name.endswith(".g")))
    return network


CASES = {
    "by default": {},
    "of three levels, wider at first": {
        **{"dim_mults": (1, 2, 4), "init_dim": 12, "full_attn": (False, False, True)},
        **{"attn_heads": (2, 2, 2), "attn_dim_head": (4, 4, 4)},
    },
    "of unequal heads, learned variance": {
        **{"full_attn": (True, False), "attn_heads": (2, 3), "attn_dim_head": (4, 8)},
        **{"channels": 1, "out_dim": 2},
    },
    "of frequencies of its own": {"learned_sinusoidal_dim": 6},
    "with its last prediction": {"self_condition": True},
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_converted_network_says_the_same(case):
    reference = random_unet(**CASES[case])
    converted = convert_network(reference.state_dict(), 16)
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, CASES[case].get("channels", 3), 8, 16, generator=generator), torch.tensor([3, 37])
    expected, got = reference(x, t), converted(x, t).sample
    assert 0.1 < expected.std() < 5
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.fixture
def trainer_file(tmp_path):
    """What its `Trainer` saves: weights, their EMA and the weights once more beside it, optimizer, version."""
    network = random_unet()
    tables = diffusion_tables(make_betas("cosine", 50))
    of_diffusion = {f"model.{name}": value for name, value in network.state_dict().items()} | tables
    averaged = {
        name: value * 0.5 if value.is_floating_point() and "model." in name else value
        for name, value in of_diffusion.items()
    }
    ema = {f"ema_model.{name}": value for name, value in averaged.items()}
    ema |= {f"online_model.{name}": value for name, value in of_diffusion.items()}
    ema |= {"initted": torch.tensor(True), "step": torch.tensor(7)}
    checkpoint = {
        "step": 7,
        "model": of_diffusion,
        "opt": {"state": {}},
        "ema": ema,
        "scaler": None,
        "version": "2.3.4",
    }
    torch.save(checkpoint, tmp_path / "model-1.pt")
    return str(tmp_path / "model-1.pt"), network


def test_a_checkpoint_of_the_trainer_becomes_a_pipeline_of_its_average(trainer_file, tmp_path):
    file, network = trainer_file
    folder = main(ConvertConfig(file=file, image_size=16))
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe.denoiser) is LucidrainsUNetModel
    weights = network.state_dict()
    assert all(torch.equal(value, weights[name] * 0.5) for name, value in pipe.denoiser.state_dict().items())
    scheduler = pipe.scheduler.config
    assert (scheduler.prediction_type, scheduler.beta_schedule) == ("v_prediction", "squaredcos_cap_v2")
    assert scheduler.num_train_timesteps == 50
    pipe.set_progress_bar_config(disable=True)
    assert pipe(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    stock = DDPMPipeline(pipe.denoiser, DDPMScheduler())
    stock.set_progress_bar_config(disable=True)
    assert stock(num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    plain = main(ConvertConfig(file=file, image_size=16, use_ema=False, output_dir=str(tmp_path / "plain")))
    loaded = LucidrainsUNetModel.from_pretrained(plain, subfolder="denoiser").state_dict()
    assert loaded.keys() == weights.keys() and all(torch.equal(value, weights[name]) for name, value in loaded.items())


@pytest.mark.parametrize("name", lucidrains.NOISE_SCHEDULES)
def test_schedules_are_known_by_their_betas(name):
    """The formulas there, in plain numbers."""
    steps = 200
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha_bar = {
        "cosine": ((t + 0.008) / 1.008 * torch.pi / 2).cos().square(),
        "sigmoid": torch.sigmoid(torch.tensor(3.0)) - (6 * t - 3).sigmoid(),
    }
    if name == "linear":
        betas = torch.linspace(1e-4 * 1000 / steps, 0.02 * 1000 / steps, steps, dtype=torch.float64)
    else:
        betas = (1 - alpha_bar[name][1:] / alpha_bar[name][:-1]).clamp(0, 0.999)
    network = LucidrainsUNetModel(8, block_out_channels=(4, 4), width=4)
    scheduler = make_scheduler(Checkpoint({}, diffusion_tables(betas)), network)
    assert scheduler.config.beta_schedule != "linear" or name == "linear"
    torch.testing.assert_close(scheduler.alphas_cumprod.double(), (1 - betas).cumprod(0), rtol=1e-4, atol=1e-7)
    same = make_scheduler(Checkpoint({}), network, noise_schedule=name, objective="pred_v", diffusion_steps=steps)
    torch.testing.assert_close(same.alphas_cumprod, scheduler.alphas_cumprod)
    other = make_scheduler(Checkpoint({}, diffusion_tables(betas * 0.9)), network)
    torch.testing.assert_close(other.betas.double(), betas * 0.9, rtol=1e-6, atol=0)


@pytest.mark.parametrize("largest_snr", [None, 5.0])
@pytest.mark.parametrize("objective", lucidrains.OBJECTIVES)
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "sigmoid_alpha_bar"])
def test_the_objective_is_known_by_its_weights(objective, largest_snr, schedule):
    assert objective_of(diffusion_tables(make_betas(schedule, 1000), objective, largest_snr)) == objective


def test_what_cannot_be_converted_is_refused(trainer_file, tmp_path):
    file, network = trainer_file
    weights, converted = network.state_dict(), convert_network(network.state_dict(), 16)
    torch.save(weights, tmp_path / "network.pt")
    with pytest.raises(
        ValueError, match="a network alone: noise_schedule must be given, one of linear, cosine, sigmoid"
    ):
        main(ConvertConfig(file=str(tmp_path / "network.pt"), image_size=16))
    with pytest.raises(ValueError, match="num_heads is of checkpoints of guided-diffusion and improved-diffusion"):
        main(ConvertConfig(file=file, image_size=16, num_heads=2))
    with pytest.raises(ValueError, match="noise_schedule is in the checkpoint's table of betas"):
        main(ConvertConfig(file=file, image_size=16, noise_schedule="linear"))
    with pytest.raises(
        ValueError, match="objective must be pred_v, as the checkpoint's loss weights say, got pred_x0"
    ):
        main(ConvertConfig(file=file, image_size=16, objective="pred_x0"))
    with pytest.raises(ValueError, match="must have an 'ema' state beside model"):
        lucidrains.read_checkpoint({"model": weights})
    tables = diffusion_tables(make_betas("linear", 100))
    with pytest.raises(ValueError, match="does not say what its network predicts: objective must be given"):
        make_scheduler(Checkpoint({}, {"betas": tables["betas"]}), converted)
    with pytest.raises(ValueError, match="of a release of denoising_diffusion_pytorch before 2.0"):
        convert_network(weights | {"mid_block1.block1.norm.weight": torch.ones(16)}, 16)
    with pytest.raises(ValueError, match="which has mid_attn.mem_kv"):
        convert_network({name: value for name, value in weights.items() if name != "mid_attn.mem_kv"}, 16)
    with pytest.raises(ValueError, match=r"\(out_dim is not converted\)"):
        convert_network(random_unet(out_dim=5).state_dict(), 16)
    with pytest.raises(
        ValueError, match="layers that the Unet of releases 2.x has not, or the other way round, such as extra"
    ):
        convert_network(weights | {"extra": torch.ones(1)}, 16)
    with pytest.raises(ValueError, match="got one of data of another number of dimensions"):
        convert_network(weights | {"init_conv.weight": torch.ones(8, 3, 7)}, 16)


def test_the_network_refuses_what_it_has_not():
    network = LucidrainsUNetModel(8, block_out_channels=(4, 4), width=4)
    with pytest.raises(ValueError, match="a LucidrainsUNetModel, which has no labels"):
        network(torch.zeros(1, 3, 8, 8), 1, torch.tensor([1]))
    with pytest.raises(ValueError, match="each side of the sample must be a multiple of 2"):
        network(torch.zeros(1, 3, 7, 8), 1)
    with pytest.raises(ValueError, match="must have a value for each of the 2 block_out_channels, got 1, 2 and 2"):
        LucidrainsUNetModel(8, block_out_channels=(4, 4), full_attention=(True,))
    with pytest.raises(ValueError, match="width must be even and at least 4"):
        LucidrainsUNetModel(8, block_out_channels=(4, 4), width=3)


def test_activations_are_recomputed_to_the_same_gradients():
    network, x = convert_network(random_unet().state_dict(), 16).train(), torch.ones(1, 3, 8, 8)
    plain = torch.autograd.grad(network(x, 5).sample.sum(), network.init_conv.weight)[0]
    network.enable_gradient_checkpointing()
    torch.testing.assert_close(torch.autograd.grad(network(x, 5).sample.sum(), network.init_conv.weight)[0], plain)
