import diffusers
import pytest
import torch
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, KDPM2DiscreteScheduler

from diffusers_ext import (
    ClassifierGuidance,
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    GuidedDiffusionPipeline,
    NoisyClassifierModel,
    VPredictionScheduler,
)
from diffusers_ext.schedulers.levels import describe_path
from tiny import assert_same_output, tiny_unet


def classifier(scheduler=None, **config):
    torch.manual_seed(0)
    options = {"sample_size": 8, "in_channels": 1, "num_classes": 3, "block_out_channels": (8, 16)} | config
    model = NoisyClassifierModel(**options, noise_schedule=describe_path(scheduler or ExtDDPMScheduler()))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def pipeline(scheduler=None, num_classes=3, **components):
    scheduler = scheduler or ExtDDIMScheduler(clip_sample=False)
    components = {"classifier": classifier(scheduler)} | components
    pipe = GuidedDiffusionPipeline(tiny_unet(num_classes), scheduler, **components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe, class_labels=(1, 2), **kwargs):
    kwargs = {"num_inference_steps": 4, "output_type": "latent", "generator": generators(1, 2)} | kwargs
    return pipe(class_labels if class_labels is None else list(class_labels), **kwargs).images


def calls(pipe, **kwargs):
    counts = {"denoiser": 0, "classifier": 0}

    def count(name):
        def hook(module, args):
            counts[name] += len(args[0])

        return hook

    hooks = [getattr(pipe, name).register_forward_pre_hook(count(name)) for name in counts]
    sample(pipe, class_labels=[1], **({"generator": generators(1)} | kwargs))
    for hook in hooks:
        hook.remove()
    return counts["denoiser"], counts["classifier"]


def test_its_gradient_is_there_in_inference_mode_too():
    pipe = pipeline()
    expected = sample(pipe, classifier_scale=2.0, guidance_scale=2.0)
    with torch.inference_mode():
        assert torch.equal(sample(pipe, classifier_scale=2.0, guidance_scale=2.0), expected)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_step_is_the_formula_by_hand(scale):
    pipe, noise = pipeline(), torch.randn(2, 1, 8, 8)
    labels = torch.tensor([1, 2])
    images = pipe(
        labels, latents=noise, timesteps=[600], guidance_scale=scale, classifier_scale=2.0, output_type="latent"
    ).images
    x = noise.clone().requires_grad_()
    of_labels = pipe.classifier(x, 600).logits.log_softmax(-1)[torch.arange(2), labels]
    (gradient,) = torch.autograd.grad(of_labels.sum(), x)
    with torch.no_grad():
        cond, null = (pipe.denoiser(noise, 600, ids).sample for ids in (labels, torch.tensor([3, 3])))
    alpha_bar = pipe.scheduler.schedule.alpha_bar[600].float()
    eps = null + scale * (cond - null) - 2.0 * (1 - alpha_bar).sqrt() * gradient
    torch.testing.assert_close(images, (noise - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt(), rtol=1e-4, atol=1e-3)


@pytest.mark.product
@pytest.mark.parametrize(
    "scheduler",
    [
        ExtDDPMScheduler,
        ExtDDIMScheduler,
        VPredictionScheduler,
        EulerDiscreteScheduler,
        HeunDiscreteScheduler,
        KDPM2DiscreteScheduler,
    ],
)
@pytest.mark.parametrize("guider", [ClassifierGuidance(2.0), ClassifierGuidance(2.0, guidance_scale=3.0)])
def test_image_i_is_the_same_alone_in_a_batch_and_with_low_memory(scheduler, guider):
    pipe = pipeline(scheduler())
    together = sample(pipe, [2, 0, 1], guider=guider, generator=generators(5, 6, 7))
    assert together.isfinite().all()
    assert not torch.allclose(together, sample(pipe, [2, 0, 1], generator=generators(5, 6, 7)), rtol=1e-2, atol=1e-2)
    kwargs = {"rtol": 1e-3, "atol": 1e-3}
    low = sample(pipe, [2, 0, 1], guider=guider, generator=generators(5, 6, 7), low_memory=True)
    torch.testing.assert_close(low, together, **kwargs)
    for i, label in enumerate([2, 0, 1]):
        torch.testing.assert_close(
            sample(pipe, [label], guider=guider, generator=generators(5 + i))[0], together[i], **kwargs
        )


def test_networks_are_called_no_more_than_needed():
    pipe = pipeline()
    assert calls(pipe, guider=ClassifierGuidance(2.0)) == (4, 4)
    assert calls(pipe, guider=ClassifierGuidance(2.0, guidance_scale=0.0)) == (4, 4)
    assert calls(pipe, guider=ClassifierGuidance(2.0, guidance_scale=3.0)) == (8, 4)
    assert calls(pipe, guider=ClassifierGuidance(0.0)) == (4, 0)
    assert calls(pipe, guider=ClassifierGuidance(2.0, start=0.25, stop=0.75)) == (4, 2)
    assert calls(pipe, guider=ClassifierGuidance(2.0, guidance_scale=3.0), guidance_interval=(0.5, 1.0)) == (6, 2)
    assert calls(pipe, guider=ClassifierGuidance(2.0, enabled=False)) == (4, 0)
    assert calls(pipe, guidance_scale=3.0) == (8, 0)


def test_short_forms_mean_the_guider():
    pipe = pipeline()
    by_name = sample(pipe, guidance_scale=3.0, classifier_scale=2.0, guidance_rescale=0.5)
    assert torch.equal(by_name, sample(pipe, guider=ClassifierGuidance(2.0, 3.0, guidance_rescale=0.5)))
    assert not torch.equal(by_name, sample(pipe, guider=ClassifierGuidance(2.0, 3.0)))


def test_a_network_without_labels_is_led_by_the_classifiers():
    pipe = pipeline(num_classes=None)
    assert pipe.num_classes == 3
    first, second = (sample(pipe, [label] * 2, classifier_scale=3.0) for label in (0, 1))
    assert not torch.allclose(first, second, rtol=1e-2, atol=1e-2)
    assert torch.equal(sample(pipe, [0, 0], guider=ClassifierGuidance(3.0, guidance_scale=0.0)), first)
    with pytest.raises(ValueError, match="must be in .0, 2., got 3"):
        sample(pipe, [0, 3], classifier_scale=3.0)


@torch.no_grad()
def test_a_learned_variance_is_not_guided():
    scheduler = ExtDDPMScheduler(variance_type="learned_range", clip_sample=False)
    seen = []

    class Recording(type(scheduler)):
        def step(self, model_output, *args, **kwargs):
            seen.append(model_output)
            return super().step(model_output, *args, **kwargs)

    pipe = pipeline(scheduler)
    torch.manual_seed(0)
    unet = diffusers.UNetModel(8, 1, 2, block_out_channels=(8, 16), layers_per_block=1, num_classes=3)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.register_modules(denoiser=unet, scheduler=Recording.from_config(scheduler.config))
    noise, labels = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    sample(pipe, latents=noise, timesteps=[600, 300], num_inference_steps=None, guider=ClassifierGuidance(5.0, 3.0))
    expected = unet(noise, 600, labels).sample
    torch.testing.assert_close(seen[0][:, 1:], expected[:, 1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen[0][:, :1], expected[:, :1], rtol=1e-2)


def test_the_guidance_is_saved_with_the_pipeline(tmp_path):
    pipe = pipeline(guider=ClassifierGuidance(2.0, guidance_scale=3.0))
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.guider) is ClassifierGuidance
    assert type(loaded.classifier) is NoisyClassifierModel
    assert_same_output(sample(loaded), sample(pipe))


@pytest.mark.parametrize(
    "trained_on, message",
    [
        (
            ExtDDPMScheduler(beta_schedule="cosine"),
            "trained on 'cosine' of 1000 timesteps, and the scheduler has 'linear'",
        ),
        (ExtDDPMScheduler(num_train_timesteps=500, beta_end=0.04), "'linear' of 500 timesteps, .* of 1000 timesteps$"),
        (ExtDDPMScheduler(beta_end=0.03), "alpha_bar up to .* apart"),
    ],
)
@pytest.mark.parametrize("cls", [ExtDDIMScheduler, EulerDiscreteScheduler])
def test_a_classifier_of_another_schedule_is_refused(cls, trained_on, message):
    pipe = pipeline(cls.from_config(ExtDDPMScheduler().config), classifier=classifier(trained_on))
    with pytest.raises(ValueError, match=message):
        sample(pipe, classifier_scale=1.0)


def test_a_classifier_of_an_unknown_schedule_is_warned_of():
    model = classifier()
    model.register_to_config(noise_schedule=None)
    with pytest.warns(UserWarning, match="has no noise_schedule"):
        sample(pipeline(classifier=model), classifier_scale=1.0)


def test_what_is_missing_is_said():
    with pytest.raises(ValueError, match="needs a classifier: give the pipeline one"):
        sample(pipeline(classifier=None), classifier_scale=1.0)
    for labels in (None, [1, 3]):
        with pytest.raises(
            ValueError, match="needs class_labels to guide to, one for each image, none of them the null"
        ):
            sample(pipeline(), labels, classifier_scale=1.0, generator=None)
    with pytest.raises(ValueError, match="classifier_scale must be finite and at least 0, got -1"):
        sample(pipeline(), classifier_scale=-1.0)
    with pytest.raises(ValueError, match="classifier must have the denoiser's 3 labels, got 5"):
        pipeline(classifier=classifier(num_classes=5))
    with pytest.raises(ValueError, match="classifier must take the denoiser's 1 channels, got 3"):
        pipeline(classifier=classifier(in_channels=3))
    with pytest.raises(ValueError, match="classifier must take the denoiser's size, 8x8, got 16x16"):
        pipeline(classifier=classifier(sample_size=16))
    with pytest.raises(ValueError, match="guidance needs a model with labels"):
        sample(pipeline(num_classes=None), guider=ClassifierGuidance(1.0, guidance_scale=2.0))
