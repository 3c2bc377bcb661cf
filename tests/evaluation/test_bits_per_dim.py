"""The bound of a pipeline's model on images in 8 bits."""

import diffusers
import pytest
import torch
from accelerate import debug_launcher

from diffusers_ext import (
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    FlowScheduler,
    GuidedDiffusionPipeline,
    ScoreSDEScheduler,
    UNetModel,
)
from diffusers_ext.diffusion.analytic_variance import measure_prediction
from diffusers_ext.diffusion.paths import PATHS, PathSchedule
from diffusers_ext.diffusion.probability_flow import flow_bound
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.diffusion.variational_bound import bits_per_dim, variational_bound
from diffusers_ext.evaluation.bits_per_dim import LikelihoodModel, measure_bits_per_dim
from diffusers_ext.evaluation.labelled_images import LabelledImages


SCHEDULE = {"num_train_timesteps": 12, "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
NAMES = ["zero", "one", "two"]


def make_images(number=7, with_labels=True):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (number, 1, 8, 8), generator=generator).to(torch.uint8)
    if not with_labels:
        return LabelledImages(images, torch.full([number], -1), [])
    return LabelledImages(images, torch.arange(number) % 3, NAMES)


def make_pipeline(scheduler=None, out_channels=1, **config):
    torch.manual_seed(0)
    small = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "num_classes": 3}
    unet = UNetModel(in_channels=1, out_channels=out_channels, **small | config)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return GuidedDiffusionPipeline(denoiser=unet, scheduler=scheduler or ExtDDIMScheduler(**SCHEDULE))


def measure(pipeline, images, **settings):
    return measure_bits_per_dim(pipeline, images, show_progress=False, **settings)


@pytest.mark.parametrize("with_labels", [True, False])
@pytest.mark.parametrize("out_channels, variance", [(1, "fixed_large"), (2, "learned_range")])
def test_it_is_the_bound_of_each_image_with_its_label_and_its_own_noise(with_labels, out_channels, variance):
    pipeline, images = make_pipeline(out_channels=out_channels), make_images(with_labels=with_labels)
    result = measure(pipeline, images, batch_size=3, seed=4)
    assert result["variance"] == variance and result["by_label"] == with_labels
    chain, totals = ReverseChain(pipeline.scheduler.schedule), []
    for row in range(7):
        label = torch.tensor([row % 3 if with_labels else 3])

        def denoise(x_t, timesteps, label=label):
            return pipeline.denoiser(x_t.float(), timesteps, class_labels=label).sample

        terms = variational_bound(
            denoise,
            images.images[row : row + 1].double() / 127.5 - 1,
            *(chain, "epsilon", variance),
            clip=lambda x0: x0.clamp(-1, 1),  # as the scheduler does by default
            generator=[torch.Generator().manual_seed(4_000_000 + row)],
        )
        totals.append(bits_per_dim(terms.total, 64))
    totals = torch.cat(totals)
    assert result["bits_per_dim"] == pytest.approx(totals.mean().item(), rel=1e-5)
    assert result["standard_error"] == pytest.approx((totals.std() / 7**0.5).item(), rel=1e-4)
    assert result["num_steps"] == 12 and result["num_terms"] == 11 and result["num_dims"] == 64


SCHEDULERS_OF_PATHS = [
    (FlowScheduler(12), "linear", "flow"),
    (ScoreSDEScheduler(12, path="ve", prediction_type="score"), "ve", "score"),
    (ScoreSDEScheduler(12, path="subvp", prediction_type="epsilon"), "subvp", "epsilon"),
]


@pytest.mark.parametrize("scheduler, name, prediction_type", SCHEDULERS_OF_PATHS)
def test_the_bound_is_that_of_the_path_at_the_scale_at_which_the_network_sees_it(scheduler, name, prediction_type):
    pipeline, images = make_pipeline(scheduler, num_classes=None), make_images(2, with_labels=False)
    result = measure(pipeline, images)
    schedule = PathSchedule(PATHS[name](), 12, first_label=int(name == "linear"))
    totals = []
    for row in range(2):
        terms = variational_bound(
            lambda x_t, timesteps: pipeline.denoiser(x_t.float(), timesteps).sample,
            images.images[row : row + 1].double() / 127.5 - 1,
            *(ReverseChain(schedule), prediction_type, "fixed_large"),
            generator=[torch.Generator().manual_seed(row)],
        )
        totals.append(bits_per_dim(terms.total, 64))
    assert result["bits_per_dim"] == pytest.approx(torch.cat(totals).mean().item(), rel=1e-5)
    assert result["variance"] == "fixed_large"  # without training images
    measured = {variance: measure(pipeline, images, train=images, variance=variance) for variance in (None, "optimal")}
    assert measured[None] == measured["optimal"] and measured[None]["variance"] == "optimal"
    assert measure(pipeline, images, num_flow_steps=2)["flow_bits_per_dim"] > 0
    if name == "linear":
        stock = diffusers.FlowMatchEulerDiscreteScheduler(12)
        again = measure(make_pipeline(stock, num_classes=None), images)
        assert again["bits_per_dim"] == pytest.approx(result["bits_per_dim"], rel=1e-6)


@pytest.mark.parametrize("out_channels", [1, 2])
def test_the_flow_measures_the_same_model(out_channels):
    """Each image's own bound by the flow, besides the other one."""
    pipeline, images = make_pipeline(out_channels=out_channels), make_images(3)
    pipeline.scheduler = ExtDDIMScheduler(**SCHEDULE, clip_sample=False)
    result = measure(pipeline, images, num_flow_steps=3, batch_size=2)
    plain = measure(pipeline, images)
    assert result["bits_per_dim"] == pytest.approx(plain["bits_per_dim"], rel=1e-6) and result["num_flow_steps"] == 3
    assert "flow_bits_per_dim" not in plain
    chain, totals = ReverseChain(pipeline.scheduler.schedule), []
    for row in range(3):
        totals.append(
            flow_bound(
                lambda x_t, t, row=row: pipeline.denoiser(x_t.float(), t, class_labels=torch.tensor([row % 3])).sample,
                images.images[row : row + 1].double() / 127.5 - 1,
                *(chain, "epsilon", result["variance"]),
                num_steps=3,
                generator=[torch.Generator().manual_seed(row)],
            ).total
        )
    expected = bits_per_dim(torch.cat(totals), 64)
    assert result["flow_bits_per_dim"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert result["flow_standard_error"] == pytest.approx((expected.std() / 3**0.5).item(), rel=1e-3)


def test_every_figure_has_the_standard_error_of_its_own_column():
    """The curves end at the whole rate; and the flow says how it was solved."""
    pipeline, images = make_pipeline(), make_images(3)
    pipeline.scheduler = ExtDDIMScheduler(**SCHEDULE, clip_sample=False)
    how = {"flow_tolerance": 1e-2, "dequantization": "truncated_normal"}
    result = measure(pipeline, images, num_terms=4, with_curves=True, batch_size=2, **how)
    last = result["curves"][-1]
    assert last["bits_so_far"] == pytest.approx(result["rate"], rel=1e-9)
    assert last["bits_so_far_error"] == pytest.approx(result["rate_standard_error"], rel=1e-9)
    assert how.items() <= result.items() and result["flow_calls"] >= 8
    assert all(part["standard_error"] >= 0 for part in result["rate_by_timesteps"])
    alone = measure(pipeline, images, num_images=1, num_terms=4, with_curves=True)
    assert alone["standard_error"] is None and alone["curves"][-1]["rmse_error"] is None
    for settings, message in (
        ({"flow_tolerance": 1e-2, "num_flow_steps": 2}, "both say how the flow is solved"),
        ({"dequantization": "uniform"}, "dequantization 'uniform' is of the flow: give num_flow_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            measure(pipeline, images, **settings)


def save_result(folder):
    result = measure(make_pipeline(), make_images(), num_terms=3, batch_size=2)
    (folder / f"{torch.distributed.get_rank()}.txt").write_text(repr(result["bits_per_dim"]))


def test_some_terms_processes_and_batches_change_no_digit_that_counts(tmp_path):
    whole = measure(make_pipeline(), make_images(), num_terms=3)
    debug_launcher(save_result, args=(tmp_path,), num_processes=2)
    first, second = (float((tmp_path / f"{rank}.txt").read_text()) for rank in range(2))
    assert first == second == pytest.approx(whole["bits_per_dim"], rel=1e-6)
    assert whole["num_terms"] == 3
    exact = measure(make_pipeline(), make_images())
    assert whole["bits_per_dim"] != exact["bits_per_dim"]
    assert whole["distortion"] != whole["rate"] > whole["prior"] >= 0


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large", "fixed_small_log"])
def test_a_pipeline_of_diffusers_has_the_bound_of_its_own_variance(tmp_path, variance_type):
    """Three channels on grey images: each value three times over."""
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(sample_size=8, block_out_channels=(32, 32), layers_per_block=1, **blocks)
    scheduler = diffusers.DDPMScheduler(variance_type=variance_type, num_train_timesteps=1000)
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(tmp_path)
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    result = measure(pipeline, make_images(2), num_steps=6)
    assert result["variance"] == variance_type.removesuffix("_log") and result["num_dims"] == 192
    assert not result["by_label"]
    timesteps = [part["last_timestep"] for part in result["rate_by_timesteps"]]
    assert timesteps == [166, 332, 498, 664, 830]  # "leading", as its sampler visits them
    other = measure(pipeline, make_images(2), num_steps=6, variance="fixed_small")
    assert (other["rate"] == result["rate"]) == (variance_type != "fixed_large")


def test_variances_measured_on_the_images_themselves_are_the_best():
    pipeline, images = make_pipeline(), make_images(40)
    bounds = {
        variance: measure(pipeline, images, variance=variance, train=images, batch_size=40)
        for variance in ("fixed_small", "fixed_large", "optimal")
    }
    best = bounds["optimal"]["bits_per_dim"]
    assert best < bounds["fixed_small"]["bits_per_dim"] and best < bounds["fixed_large"]["bits_per_dim"]


def test_the_analytic_variance_of_a_scheduler_is_that_of_its_likelihood():
    images = make_images(60, with_labels=False)
    config = SCHEDULE | {"clip_sample": True, "timestep_spacing": "trailing"}
    pipeline = make_pipeline(ExtDDIMScheduler(**config))
    x0, schedule = images.images.double() / 127.5 - 1, pipeline.scheduler.schedule

    def denoise(x_t, timesteps):
        return pipeline.denoiser(x_t.float(), timesteps, class_labels=torch.full((len(x_t),), 3)).sample

    generator = torch.Generator().manual_seed(0)
    measured = measure_prediction(
        *(denoise, [x0], schedule, torch.arange(12), "epsilon"), clip=lambda x: x.clamp(-1, 1), generator=generator
    )
    table = {"timesteps": list(range(12)), "x0_variance": measured.x0_variance.tolist()}
    pipeline.scheduler = ExtDDIMScheduler(**config, variance_type="analytic", analytic_variance=table)
    result = measure(pipeline, images)
    best = measure(pipeline, images, train=images, variance="optimal", batch_size=60)
    assert result["variance"] == "analytic"
    assert result["bits_per_dim"] == pytest.approx(best["bits_per_dim"], rel=2e-3)
    assert result["bits_per_dim"] < measure(pipeline, images, variance="fixed_large")["bits_per_dim"]
    lists = {"spacing": "trailing", "trajectory": {"3": [11, 5, 1]}, "bound": {"3": [11, 7, 2]}}
    pipeline.scheduler = ExtDDIMScheduler.from_config(pipeline.scheduler.config, optimal_timesteps=lists)
    assert LikelihoodModel.of(pipeline, 3).chain().timesteps.tolist() == [2, 7, 11]
    with pytest.raises(
        ValueError, match="the variance 'analytic' needs a scheduler with analytic_variance: measure it"
    ):
        measure(make_pipeline(), images, variance="analytic")


def test_what_has_no_bits_per_dim_is_refused():
    images = make_images()
    learned = ExtDDPMScheduler(**SCHEDULE, variance_type="learned_range")
    latents = make_pipeline()
    latents.register_modules(vae=diffusers.AutoencoderKL(block_out_channels=(32,)))
    for pipeline, given, settings, message in [
        (latents, images, {}, "makes latents, whose bits are not those of images"),
        (
            diffusers.DDPMPipeline(make_pipeline().denoiser, diffusers.EDMEulerScheduler()),
            images,
            {},
            "that of EDMEulerScheduler, for a model with EDM's preconditioning, is not",
        ),
        (
            make_pipeline(learned),
            images,
            {},
            "'learned_range' needs a network with twice the output channels of its 1",
        ),
        (make_pipeline(sample_size=16), images, {}, r"takes images of \(16, 16\) \(height, width\), got \(8, 8\)"),
        (make_pipeline(num_classes=5), images, {}, "the network takes 5 labels, the images have 3"),
        (
            make_pipeline(),
            images,
            {"variance": "learned"},
            "variance must be one of fixed_small, fixed_large, analytic, optimal",
        ),
        (make_pipeline(), images, {"variance": "optimal"}, "is measured on training images: give train"),
    ]:
        with pytest.raises(ValueError, match=message):
            measure(pipeline, given, **settings)
