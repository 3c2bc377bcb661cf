import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffusers_ext import DiffusionPipeline, DiTModel, ExtDDIMScheduler, GuidedDiffusionPipeline
from tiny import assert_same_output, assert_same_weights, random_stock_dit
from tiny_vae import tiny_vae


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_published(**config):
    """One embedding for all blocks, as in the weights of the paper."""
    model = random_stock_dit(**config)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


@pytest.mark.product
@pytest.mark.parametrize("make", [random_stock_dit, as_published])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"out_channels": 8, "num_embeds_ada_norm": 5, "patch_size": 4, "num_layers": 3},
        {"patch_size": 1, "sample_size": 4, "in_channels": 3, "norm_eps": 1e-3},
        {"attention_bias": False, "attention_head_dim": 24, "num_attention_heads": 1},
    ],
    ids=["as it comes", "learned variance", "small", "no bias"],
)
def test_the_same_weights_give_the_same_output_both_ways(make, config):
    """All timesteps' ends, a label, the null label, and sizes other than the config's."""
    theirs = make(**config)
    ours = DiTModel.from_diffusers(theirs)
    back = ours.to_diffusers()
    assert ours.config.embedding_per_block == (make is random_stock_dit)
    timesteps, labels = torch.tensor([0, 1, 500, 999]), torch.tensor([0, 3, 2, theirs.config.num_embeds_ada_norm])
    for size in (theirs.config.sample_size, 12):
        x = draw(4, theirs.config.in_channels, size, size)
        expected = theirs(x, timesteps, labels).sample
        assert expected.std() > 0.3 and expected.isfinite().all()
        torch.testing.assert_close(ours(x, timesteps, labels).sample, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(back(x, timesteps, labels).sample, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("make", [random_stock_dit, as_published])
def test_there_and_back_are_the_same_weights(make):
    theirs = make(out_channels=8)
    back = DiTModel.from_diffusers(theirs).to_diffusers()
    torch.testing.assert_close(dict(back.state_dict()), dict(theirs.state_dict()), rtol=0, atol=0)
    changed = {name for name in theirs.config if theirs.config[name] != back.config[name]}
    assert changed <= {"_use_default_values", "_name_or_path"}
    ours = DiTModel.from_diffusers(theirs)
    again = DiTModel.from_diffusers(ours.to_diffusers())
    torch.testing.assert_close(dict(again.state_dict()), dict(ours.state_dict()), rtol=0, atol=0)
    assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
        k: v for k, v in ours.config.items() if k[0] != "_"
    }


def test_a_new_model_of_ours_has_a_counterpart():
    torch.manual_seed(0)
    ours = DiTModel(sample_size=(8, 8), hidden_size=32, num_layers=2, num_attention_heads=2, num_classes=4)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x, timesteps, labels = draw(2, 3, 8, 8), torch.tensor([3, 800]), torch.tensor([1, 4])
    theirs = ours.eval().to_diffusers()
    torch.testing.assert_close(
        theirs(x, timesteps, labels).sample, ours(x, timesteps, labels).sample, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("training", [False, True])
def test_dtype_and_mode_are_kept_and_weights_are_not_shared(training):
    theirs = random_stock_dit().to(torch.float64).train(training)
    ours = DiTModel.from_diffusers(theirs)
    assert ours.dtype == torch.float64 and ours.training == training == ours.to_diffusers().training
    before = [p.clone() for p in theirs.parameters()]
    for parameter in ours.parameters():
        parameter.data.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, theirs.parameters(), strict=True))


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"activation_fn": "gelu"},
            "activation_fn must be 'gelu-approximate' to be converted to a DiTModel, got 'gelu'",
        ),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine must be False .*, got True"),
    ],
)
def test_what_we_do_not_have_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        DiTModel.from_diffusers(random_stock_dit(**config))


@pytest.mark.parametrize(
    "config, message",
    [
        ({"mlp_ratio": 2.0}, "mlp_ratio must be 4.0 to be converted to diffusers' DiTTransformer2DModel, got 2.0"),
        ({"num_classes": None}, "num_classes must be given"),
        ({"qk_norm": True}, "qk_norm must be False"),
        ({"num_registers": 2}, "num_registers must be 0 .*, got 2"),
        ({"cross_attention_dim": 8}, "cross_attention_dim must be None .*, got 8"),
        ({"sample_size": (8, 4)}, "sample_size must be a square, .*, got 8 x 4"),
    ],
)
def test_what_diffusers_does_not_have_is_refused(config, message):
    tiny = {"sample_size": 8, "hidden_size": 16, "num_layers": 1, "num_attention_heads": 1, "num_classes": 3}
    with pytest.raises(ValueError, match=message):
        DiTModel(**tiny | config).to_diffusers()


def test_a_model_of_another_kind_is_refused():
    with pytest.raises(TypeError, match="must be a DiTTransformer2DModel of diffusers, got Linear"):
        DiTModel.from_diffusers(torch.nn.Linear(1, 1))


@pytest.mark.product
@pytest.mark.parametrize("out_channels", [4, 8])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, ExtDDIMScheduler])
def test_diffusers_pipeline_draws_the_same_images_with_either(scheduler, guidance_scale, out_channels):
    theirs, vae = random_stock_dit(out_channels=out_channels), tiny_vae()
    images = []
    for transformer in (theirs, DiTModel.from_diffusers(theirs)):
        pipe = DiTPipeline(transformer, vae, scheduler(timestep_spacing="trailing"))
        pipe.set_progress_bar_config(disable=True)
        images.append(
            pipe(
                [7, 999],
                guidance_scale=guidance_scale,
                num_inference_steps=3,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            ).images
        )
    assert images[0].shape == (2, 16, 16, 3) and images[0].std() > 0.05
    torch.testing.assert_close(*images, rtol=0, atol=1e-4)


def test_diffusers_pipeline_with_few_labels_saves_loads_and_is_guided(tmp_path):
    """Its null label is 1000 for any model; ours has 10 labels and takes that for its own."""
    # Ours goes on with the noise of a clipped prediction while guiding, so the two are alike where nothing is clipped.
    scheduler = ExtDDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    torch.manual_seed(0)
    model = DiTModel(sample_size=8, in_channels=4, hidden_size=32, num_layers=2, num_attention_heads=2, num_classes=10)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe = DiTPipeline(model, tiny_vae(), scheduler)
    pipe.save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.transformer, DiTModel)

    def images(pipe, scale):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        return pipe([3], scale, generator=generator, num_inference_steps=3, output_type="np").images

    assert_same_weights(loaded.transformer, model)
    assert_same_output(images(loaded, 4.0), images(pipe, 4.0))
    guided = GuidedDiffusionPipeline(model, scheduler, vae=tiny_vae())
    guided.set_progress_bar_config(disable=True)
    for scale in (1.0, 4.0):
        ours = guided(
            class_labels=[3],
            guidance_scale=scale,
            num_inference_steps=3,
            generator=torch.Generator().manual_seed(0),
            output_type="np",
        ).images
        torch.testing.assert_close(ours, images(pipe, scale), rtol=0, atol=1e-4)
    assert abs(images(pipe, 4.0) - images(pipe, 1.0)).max() > 1e-3


def test_it_is_a_denoiser_of_pixels_that_saves_and_loads(tmp_path):
    torch.manual_seed(0)
    model = DiTModel(sample_size=(8, 12), in_channels=1, hidden_size=32, num_layers=1, num_attention_heads=2)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    GuidedDiffusionPipeline(model, ExtDDIMScheduler(timestep_spacing="trailing")).save_pretrained(tmp_path)
    draws = []
    for pipe in (
        GuidedDiffusionPipeline(model, ExtDDIMScheduler(timestep_spacing="trailing")),
        DiffusionPipeline.from_pretrained(tmp_path),
    ):
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        draws.append(pipe(batch_size=2, num_inference_steps=2, generator=generator, output_type="pt").images)
    assert draws[0].shape == (2, 1, 8, 12)
    assert_same_weights(pipe.denoiser, model)
    assert_same_output(draws[1], draws[0])
    assert isinstance(pipe.denoiser, DiTModel) and not isinstance(pipe.denoiser, DiTTransformer2DModel)
