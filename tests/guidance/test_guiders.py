"""Every guider of diffusers, and ours, with the U-Net and the transformer."""

import diffusers.guiders
import pytest
import torch
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    BaseGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    FrequencyDecoupledGuidance,
    MagnitudeAwareGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.hooks import LayerSkipConfig
from diffusers.hooks.smoothed_energy_guidance_utils import SmoothedEnergyGuidanceConfig
from diffusers.utils import is_kornia_available

import diffusers_ext
from diffusers_ext import DiTModel, ExtDDIMScheduler, ExtDDPMScheduler, GuidedDiffusionPipeline, WeakModelGuidance
from diffusers_ext.diffusion.noising import output_eps, predict_x0
from tiny import assert_same_output, tiny_unet


# How each is made so that it acts in every step of a short run.
ALWAYS = {"perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
GUIDERS = {
    "ClassifierFreeGuidance": lambda: ClassifierFreeGuidance(3.0),
    "AdaptiveProjectedGuidance": lambda: AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5),
    "AdaptiveProjectedMixGuidance": lambda: AdaptiveProjectedMixGuidance(
        3.0, adaptive_projected_guidance_scale=5.0, adaptive_projected_guidance_start_step=1
    ),
    "ClassifierFreeZeroStarGuidance": lambda: ClassifierFreeZeroStarGuidance(3.0),
    "FrequencyDecoupledGuidance": lambda: FrequencyDecoupledGuidance([3.0, 2.0]),
    "LTX2Guidance": lambda: diffusers.guiders.LTX2Guidance(guidance_scale=3.0),
    "MagnitudeAwareGuidance": lambda: MagnitudeAwareGuidance(3.0),
    "TangentialClassifierFreeGuidance": lambda: TangentialClassifierFreeGuidance(3.0),
    "AutoGuidance": lambda: AutoGuidance(3.0, auto_guidance_layers=[0], dropout=1.0),
    "SkipLayerGuidance": lambda: SkipLayerGuidance(
        3.0, skip_layer_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
    ),
    "PerturbedAttentionGuidance": lambda: PerturbedAttentionGuidance(3.0, perturbed_guidance_layers=0, **ALWAYS),
    "SmoothedEnergyGuidance": lambda: SmoothedEnergyGuidance(3.0, seg_guidance_layers=[0]),
    "WeakModelGuidance": lambda: WeakModelGuidance(3.0),
}
if not hasattr(diffusers.guiders, "LTX2Guidance"):  # older versions of diffusers
    del GUIDERS["LTX2Guidance"]
# Without classifier-free guidance beside them.
PERTURBING = {
    "AutoGuidance": GUIDERS["AutoGuidance"],
    "SkipLayerGuidance": lambda: SkipLayerGuidance(
        1.0, skip_layer_guidance_layers=[0], skip_layer_guidance_start=0.0, skip_layer_guidance_stop=1.0
    ),
    "PerturbedAttentionGuidance": lambda: PerturbedAttentionGuidance(1.0, perturbed_guidance_layers=[0], **ALWAYS),
    "SmoothedEnergyGuidance": lambda: SmoothedEnergyGuidance(1.0, seg_guidance_layers=0),
}
NETWORKS = ["unet", "dit"]
PAIRS = [("unet", name) for name in GUIDERS] + [("dit", name) for name in PERTURBING]


def network(kind, seed=0, num_classes=3):
    if kind == "unet":
        model = tiny_unet(num_classes=num_classes)
    else:
        model = DiTModel(
            sample_size=8, in_channels=1, hidden_size=16, num_layers=2, num_attention_heads=2, num_classes=num_classes
        )
    torch.manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def pipeline(kind="unet", scheduler=None, num_classes=3, **components):
    components = {"weak_denoiser": network("unet", seed=1, num_classes=num_classes)} | components
    pipe = GuidedDiffusionPipeline(
        network(kind, num_classes=num_classes), scheduler or ExtDDIMScheduler(clip_sample=False), **components
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(name):
    if name == "FrequencyDecoupledGuidance" and not is_kornia_available():
        pytest.skip("needs kornia")
    return GUIDERS[name]()


def generators(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def sample(pipe, class_labels=(1, 2), **kwargs):
    kwargs = {"num_inference_steps": 4, "output_type": "latent", "generator": generators(1, 2)} | kwargs
    return pipe(list(class_labels) if class_labels is not None else None, **kwargs).images


def count_calls(pipe, **kwargs):
    """Images that the networks saw, by call."""
    sizes = []
    networks = [pipe.denoiser, pipe.weak_denoiser]
    hooks = [model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0]))) for model in networks]
    sample(pipe, class_labels=[1], **({"generator": generators(1)} | kwargs))
    for hook in hooks:
        hook.remove()
    return sizes


def hooks_of(model):
    return [
        hook
        for module in model.modules()
        if hasattr(module, "_diffusers_hook")
        for hook in module._diffusers_hook.hooks
    ]


def test_every_guider_of_diffusers_is_tested():
    exported = {name for name, value in vars(diffusers.guiders).items() if isinstance(value, type)}
    assert exported - {"BaseGuidance"} == set(GUIDERS) - {"WeakModelGuidance"}


@pytest.mark.parametrize("kind, name", PAIRS)
def test_a_guider_changes_the_image_and_leaves_the_network_as_it_was(kind, name):
    pipe, guider = pipeline(kind), make(name)
    before = sample(pipe)
    guided = sample(pipe, guider=guider)
    assert guided.isfinite().all()
    assert not torch.allclose(guided, before, rtol=1e-2, atol=1e-2)
    assert hooks_of(pipe.denoiser) == []
    assert torch.equal(sample(pipe), before)
    assert torch.equal(sample(pipe, guider=guider), guided)  # nothing is left in the guider either


@pytest.mark.parametrize("kind, name", PAIRS)
def test_image_i_is_the_same_alone_in_a_batch_and_with_low_memory(kind, name):
    pipe, guider = pipeline(kind, ExtDDPMScheduler()), make(name)
    together = sample(pipe, [2, 0, 1], guider=guider, generator=generators(5, 6, 7))
    tolerance = {"rtol": 1e-3, "atol": 1e-4}
    one_by_one = sample(pipe, [2, 0, 1], guider=guider, generator=generators(5, 6, 7), low_memory=True)
    torch.testing.assert_close(one_by_one, together, **tolerance)
    for i, label in enumerate([2, 0, 1]):
        alone = sample(pipe, [label], guider=guider, generator=generators(5 + i))
        torch.testing.assert_close(alone[0], together[i], **tolerance)


@pytest.mark.parametrize("name", GUIDERS)
def test_guidance_that_is_off_costs_one_call_and_changes_nothing(name):
    pipe, guider = pipeline(), make(name)
    plain = sample(pipe)
    guider.disable()
    assert count_calls(pipe, guider=guider) == [1] * 4
    assert torch.equal(sample(pipe, guider=guider), plain)
    guider.enable()
    calls = count_calls(pipe, guider=guider, guidance_interval=(0.5, 1.0))
    assert calls[:2] == [1, 1]
    assert sum(calls[2:]) >= 4
    assert guider._enabled
    assert count_calls(pipe, guider=guider, guidance_interval=(0, 0)) == [1] * 4
    assert torch.equal(sample(pipe, guider=guider, guidance_interval=(0, 0)), plain)


@pytest.mark.product
@pytest.mark.parametrize("name", PERTURBING)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_perturbed_prediction_differs_from_the_plain_one(kind, name):
    pipe, guider = pipeline(kind), PERTURBING[name]()
    outputs = []
    hook = pipe.denoiser.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    sample(pipe, guider=guider, num_inference_steps=2)
    hook.remove()
    plain, perturbed = outputs[-2:]
    assert not torch.allclose(plain, perturbed, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", NETWORKS)
def test_perturbing_guiders_need_no_labels(kind):
    pipe = pipeline(kind, num_classes=None, weak_denoiser=None)
    plain = sample(pipe, None, batch_size=2)
    for name in PERTURBING:
        guided = sample(pipe, None, batch_size=2, guider=PERTURBING[name]())
        assert not torch.allclose(guided, plain), name


def test_perturbed_attention_is_the_identity_map():
    """With attention scores skipped each position gets its own value."""
    model = network("unet")
    layer = model.middle[0].attention
    guider = PerturbedAttentionGuidance(
        1.0, perturbed_guidance_config=LayerSkipConfig([0], "middle", False, True, False), **ALWAYS
    )
    x, seen = torch.randn(2, 16, 4, 4), []
    with torch.no_grad():
        value = layer.to_kv(layer.norm(x).flatten(2).transpose(1, 2)).unflatten(-1, (2, -1))[:, :, 1]
        expected = x + layer.to_out(value).transpose(1, 2).unflatten(2, (4, 4))
        hook = model.register_forward_pre_hook(lambda module, args: seen.append(layer(x)))
        pipe = pipeline(weak_denoiser=None)
        pipe.register_modules(denoiser=model)
        sample(pipe, guider=guider, num_inference_steps=2)
        hook.remove()
    assert not torch.allclose(seen[-2], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(seen[-1], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind, fqn", [("unet", "middle"), ("dit", "transformer_blocks")])
@pytest.mark.parametrize("attention, feed_forward", [(True, True), (True, False)])
def test_layers_are_found_by_their_name_too(kind, fqn, attention, feed_forward):
    pipe = pipeline(kind)
    config = LayerSkipConfig(indices=[0], fqn=fqn, skip_attention=attention, skip_ff=feed_forward)
    guider = SkipLayerGuidance(
        1.0, skip_layer_config=config, skip_layer_guidance_start=0, skip_layer_guidance_stop=1.0
    )
    assert not torch.allclose(sample(pipe, guider=guider), sample(pipe), rtol=1e-2, atol=1e-2)
    blurred = SmoothedEnergyGuidance(1.0, seg_guidance_config=SmoothedEnergyGuidanceConfig([0], fqn))
    assert not torch.allclose(sample(pipe, guider=blurred), sample(pipe), rtol=1e-2, atol=1e-2)


def test_a_guider_that_finds_nothing_to_change_is_refused_and_leaves_no_hook():
    pipe = pipeline()
    config = LayerSkipConfig(indices=[0], skip_attention=False, skip_ff=True)  # a U-Net has no feed-forward layers
    guider = SkipLayerGuidance(
        1.0, skip_layer_config=config, skip_layer_guidance_start=0, skip_layer_guidance_stop=1.0
    )
    with pytest.raises(ValueError, match="SkipLayerGuidance found nothing to change in UNetModel"):
        sample(pipe, guider=guider)
    with pytest.raises(ValueError, match="any transformer blocks matching the provided indices"):
        sample(pipe, guider=AutoGuidance(2.0, auto_guidance_layers=[99], dropout=1.0))
    assert hooks_of(pipe.denoiser) == []


@pytest.mark.parametrize("name", GUIDERS)
def test_a_guider_is_saved_with_the_pipeline(tmp_path, name):
    weak = network("unet", seed=1) if name == "WeakModelGuidance" else None
    pipe = pipeline(guider=make(name), weak_denoiser=weak)
    expected = sample(pipe)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is GuidedDiffusionPipeline
    assert type(loaded.guider) is type(pipe.guider)
    assert_same_output(sample(loaded), expected)
    assert not torch.allclose(sample(loaded, guider=ClassifierFreeGuidance(9.0)), expected)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_weaker_network_guides_by_the_formula(scale):
    pipe, noise = pipeline(), torch.randn(2, 1, 8, 8)
    kwargs = {"latents": noise, "timesteps": [600], "output_type": "latent"}
    images = pipe([1, 2], guider=WeakModelGuidance(scale), **kwargs).images
    with torch.no_grad():
        strong, weak = (
            model(noise, 600, torch.tensor([1, 2])).sample for model in (pipe.denoiser, pipe.weak_denoiser)
        )
    alpha_bar = pipe.scheduler.schedule.alpha_bar[600].float()
    expected = (noise - (1 - alpha_bar).sqrt() * (weak + scale * (strong - weak))) / alpha_bar.sqrt()
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-3)
    assert count_calls(pipe, guider=WeakModelGuidance(scale)) == [1] * (4 if scale == 1 else 8)


def test_a_weaker_network_may_be_one_without_labels():
    pipe = pipeline(weak_denoiser=network("unet", num_classes=None))
    assert not torch.allclose(sample(pipe, guider=WeakModelGuidance(2.0)), sample(pipe), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(
    "interval, guided", [((0.25, 0.75), [1, 2]), ((0, 1), [0, 1, 2, 3]), ({"timestep": (200, 600)}, [1, 2])]
)
def test_an_interval_saves_the_calls_outside_of_it(interval, guided, low_memory):
    pipe = pipeline(scheduler=ExtDDIMScheduler(timestep_spacing="trailing"))  # 999, 749, 499, 249
    interval = {"timestep": (249, 499)} if isinstance(interval, dict) else interval
    guided = [2, 3] if isinstance(interval, dict) else guided
    calls = count_calls(pipe, guidance_scale=2.0, guidance_interval=interval, low_memory=low_memory)
    assert sum(calls) == 4 + len(guided)
    assert len(calls) == (sum(calls) if low_memory else 4)
    if not low_memory:
        assert [i for i, size in enumerate(calls) if size == 2] == guided


def test_an_interval_of_noise_levels_is_that_of_sigma_over_alpha():
    scheduler = ExtDDIMScheduler(timestep_spacing="trailing")
    alpha_bar = scheduler.schedule.alpha_bar[[999, 749, 499, 249]]
    ratios = ((1 - alpha_bar) / alpha_bar).sqrt().tolist()
    interval = {"sigma": (0.99 * ratios[2], 1.01 * ratios[1])}
    assert count_calls(pipeline(scheduler=scheduler), guidance_scale=2.0, guidance_interval=interval) == [1, 2, 2, 1]


def test_an_interval_of_all_steps_equals_the_guiders_own():
    pipe = pipeline()
    expected = sample(pipe, guider=ClassifierFreeGuidance(3.0, start=0.25, stop=0.75))
    assert torch.equal(sample(pipe, guidance_scale=3.0, guidance_interval=(0.25, 0.75)), expected)
    assert torch.equal(sample(pipe, guidance_scale=3.0, guidance_interval=(0, 1)), sample(pipe, guidance_scale=3.0))


def test_rescaling_gives_the_standard_deviation_of_the_conditional_prediction_back():
    pipe, noise = pipeline(), torch.randn(2, 1, 8, 8)
    kwargs = {"latents": noise, "timesteps": [600], "output_type": "latent", "guidance_scale": 4.0}
    with torch.no_grad():
        cond, null = (pipe.denoiser(noise, 600, torch.tensor(labels)).sample for labels in ([1, 2], [3, 3]))
    guided = null + 4 * (cond - null)
    stds = [prediction.flatten(1).std(1).view(-1, 1, 1, 1) for prediction in (cond, guided)]
    alpha_bar = pipe.scheduler.schedule.alpha_bar[600].float()
    for rescale in (0.0, 0.7, 1.0):
        eps = rescale * guided * stds[0] / stds[1] + (1 - rescale) * guided
        expected = (noise - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()
        images = pipe([1, 2], guidance_rescale=rescale, **kwargs).images
        torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "scale, saved, reuse, expected",
    [
        (4.0, False, None, False),
        (4.0, True, None, True),
        (1.0, True, None, False),
        (4.0, True, False, False),
        (1.0, False, True, True),
        (1.0, "always", None, True),
        (4.0, "always", None, True),
        (1.0, "always", False, False),
    ],
)
def test_a_guided_x0_that_is_clipped_leaves_no_noise_behind(tmp_path, prediction_type, scale, saved, reuse, expected):
    """One DDIM step by hand: with guidance the noise is what the clipped x_0 leaves of x_t, if the pipeline says so."""
    pipe, noise = pipeline(scheduler=ExtDDIMScheduler(prediction_type=prediction_type)), torch.randn(2, 1, 8, 8)
    if saved:
        GuidedDiffusionPipeline(**pipe.components, clip_guided_noise=saved).save_pretrained(tmp_path)
        pipe = diffusers_ext.DiffusionPipeline.from_pretrained(tmp_path)
        pipe.set_progress_bar_config(disable=True)
    seen = (
        pipe(
            [1, 2],
            latents=noise,
            timesteps=[600, 300],
            guidance_scale=scale,
            use_clipped_model_output=reuse,
            output_type="latent",
            trajectory_steps=[1],
        )
        .trajectory[0]
        .x_t
    )
    with torch.no_grad():
        cond, null = (pipe.denoiser(noise, 600, torch.tensor(labels)).sample for labels in ([1, 2], [3, 3]))
    t, s = (pipe.scheduler.schedule.level(timestep, noise) for timestep in (600, 300))
    output = null + scale * (cond - null)
    x0 = predict_x0(output, noise, t, prediction_type).clamp(-1, 1)
    eps = (noise - t.alpha * x0) / t.sigma if expected else output_eps(output, noise, t, prediction_type)
    torch.testing.assert_close(seen, s.alpha * x0 + s.sigma * eps, rtol=1e-3, atol=1e-3)


def test_schedulers_without_the_choice_do_not_get_it():
    pipe = pipeline(scheduler=ExtDDPMScheduler())
    assert sample(pipe, guidance_scale=4.0).isfinite().all()
    with pytest.raises(ValueError, match="use_clipped_model_output must be None for ExtDDPMScheduler"):
        sample(pipe, use_clipped_model_output=True)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"guidance_interval": (0.8, 0.2)}, r"two numbers in \[0, 1\], the smaller one first, got \(0.8, 0.2\)"),
        ({"guidance_interval": (0.0, 1.5)}, r"two numbers in \[0, 1\]"),
        ({"guidance_interval": {"sigma": (5.0, 0.2)}}, r"the smaller one first, got \(5.0, 0.2\) \(sigma\)"),
        ({"guidance_interval": {"snr": (0.2, 5.0)}}, "one of the units steps, sigma, timestep"),
        ({"guidance_rescale": 1.5}, r"guidance_rescale must be in \[0, 1\], got 1.5"),
        (
            {"guidance_rescale": 0.5, "guider": ClassifierFreeGuidance(2.0)},
            "guidance_rescale must not be given together",
        ),
        ({"guider": WeakModelGuidance(2.0)}, "needs a weaker network"),
    ],
)
def test_bad_input_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample(pipeline(weak_denoiser=None), **kwargs)


@pytest.mark.skipif("LTX2Guidance" not in GUIDERS, reason="this diffusers has no LTX2Guidance")
def test_predictions_that_only_another_network_makes_are_refused():
    guider = diffusers.guiders.LTX2Guidance(guidance_scale=3.0, stg_scale=1.0)
    with pytest.raises(ValueError, match="LTX2Guidance asks for predictions"):
        sample(pipeline(), guider=guider)


@pytest.mark.parametrize(
    "weak, message",
    [
        (lambda: network("unet", num_classes=5), "no labels or the denoiser's 3, got 5"),
        (lambda: diffusers_ext.UNetModel(16, 1, 1, (8, 16), 1), "the denoiser's sample_size, 8, got 16"),
    ],
)
def test_a_weaker_network_of_other_data_is_refused(weak, message):
    with pytest.raises(ValueError, match=message):
        pipeline(weak_denoiser=weak())


def test_guiders_of_ours_are_guiders():
    assert issubclass(WeakModelGuidance, BaseGuidance)
    assert diffusers.WeakModelGuidance is WeakModelGuidance


def test_another_word_for_the_clipped_noise_is_refused():
    with pytest.raises(ValueError, match="clip_guided_noise must be False, True or \"always\", got 'never'"):
        GuidedDiffusionPipeline(**pipeline().components, clip_guided_noise="never")
