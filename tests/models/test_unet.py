import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

from diffusers_ext.models.layers import Attention
from diffusers_ext.models.unet import UNetBlock, UNetModel
from tiny import assert_same_output, assert_same_weights


def tiny(**kwargs):
    torch.manual_seed(0)
    config = {
        "sample_size": 16,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
    }
    return UNetModel(**(config | kwargs))


def awake(model):
    """The model with its zero-initialised layers filled, so that every path has an effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "config, shape",
    [
        ({}, (2, 1, 16, 16)),
        ({}, (2, 1, 8, 20)),
        ({"sample_size": (8, 12)}, (2, 1, 8, 12)),
        ({"dims": 1, "sample_size": 24}, (2, 1, 24)),
        ({"in_channels": 5, "out_channels": 10}, (2, 5, 16, 16)),
        ({"block_out_channels": (8, 12, 20), "sample_size": 12, "layers_per_block": 2}, (1, 1, 12, 12)),
        ({"block_out_channels": (96,), "attention_resolutions": (16,)}, (1, 1, 16, 16)),
    ],
)
def test_every_size_that_the_config_allows(config, shape):
    model = tiny(**config)
    out = model(draw(*shape), 3).sample
    assert out.shape == (shape[0], model.config.out_channels, *shape[2:])
    assert not out.any()  # the output layer starts at zero


@pytest.mark.parametrize(
    "config, message",
    [
        ({"sample_size": 15}, "multiple of 2, .* got 15 x 15"),
        (
            {"sample_size": (16, 16, 16)},
            r"sample_size must be one positive number or one for each of 2 axes, got \(16, 16, 16\)",
        ),
        ({"block_out_channels": (15, 32)}, "must be even, got 15"),
        ({"block_out_channels": ()}, "at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"dims": 3}, "dims must be 1 or 2, got 3"),
        ({"layers_per_block": 0}, "at least 1"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"sample": draw(2, 1, 15, 16)}, "multiple of 2, .* got 15 x 16"),
        ({"sample": draw(2, 3, 16, 16)}, r"shape \(batch, 1, height, width\), got \(2, 3, 16, 16\)"),
        ({"class_labels": torch.zeros(2, dtype=torch.long)}, "num_classes=None"),
        ({"encoder_hidden_states": draw(2, 3, 8)}, "cross_attention_dim=None"),
        ({"timestep_cond": draw(2, 3)}, "takes no timestep_cond"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny()(**({"sample": draw(2, 1, 16, 16), "timestep": 3} | kwargs))


def test_no_label_is_the_null_label():
    model, x = awake(tiny(num_classes=3)), draw(2, 1, 16, 16)
    null, other = torch.full((2,), 3), torch.full((2,), 1)
    assert torch.equal(model(x, 5).sample, model(x, 5, null).sample)
    assert not torch.allclose(model(x, 5).sample, model(x, 5, other).sample)


def test_each_sample_is_on_its_own():
    """A sample's output depends on its own timestep, label and context, not on the rest of the batch."""
    model = awake(tiny(num_classes=3, cross_attention_dim=8, pool_context=True)).double()
    x, timesteps, labels = draw(3, 1, 16, 16).double(), torch.tensor([1, 50, 900]), torch.tensor([0, 2, 3])
    context = draw(3, 4, 8).double()
    together = model(x, timesteps, labels, context).sample
    for i in range(3):
        alone = model(x[i : i + 1], timesteps[i], labels[i : i + 1], context[i : i + 1]).sample
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(together, model(x, timesteps, labels, context.flip(0)).sample)


def test_masked_context_is_not_seen():
    model, x = awake(tiny(cross_attention_dim=8, pool_context=True)), draw(2, 1, 16, 16)
    context = draw(2, 4, 8)
    mask = torch.tensor([[1, 1, 0, 0]] * 2)
    other = torch.cat([context[:, :2], draw(2, 2, 8, seed=7)], dim=1)
    masked = model(x, 5, None, context, mask).sample
    torch.testing.assert_close(masked, model(x, 5, None, other, mask).sample)
    torch.testing.assert_close(masked, model(x, 5, None, context[:, :2]).sample)


def test_every_parameter_gets_a_gradient():
    model = awake(tiny(num_classes=3, cross_attention_dim=8, pool_context=True))
    labels, context = torch.tensor([0, 1, 2, 3]), draw(4, 4, 8)
    model(draw(4, 1, 16, 16), torch.tensor([1, 10, 100, 900]), labels, context).sample.square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert without == []


def test_the_training_path_computes_what_the_inference_path_does():
    """With gradients the normalisation and concatenation are our own functions; without, PyTorch's."""
    model, x = awake(tiny()), draw(2, 1, 16, 16)
    with torch.no_grad():
        expected = model(x, 5).sample
    torch.testing.assert_close(model(x, 5).sample, expected)


def test_gradients_match_double_precision_differences():
    """A directional derivative of the loss, against a central difference of it, through the whole network."""
    model, x = awake(tiny(num_classes=2)).double(), draw(2, 1, 16, 16).double()
    parameters = list(model.parameters())
    labels = torch.tensor([0, 1])

    def loss():
        return model(x, torch.tensor([5, 600]), labels).sample.square().mean()

    directions = [draw(*p.shape, seed=i).double() for i, p in enumerate(parameters)]
    slope = sum((g * d).sum() for g, d in zip(torch.autograd.grad(loss(), parameters), directions, strict=True))
    values, step = [], 1e-4  # the statistics of the normalisation are float32
    with torch.no_grad():
        for sign in (1, -2):
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter += sign * step * direction
            values.append(loss())
    torch.testing.assert_close(slope, (values[0] - values[1]) / (2 * step), rtol=2e-2, atol=1e-6)


def test_checkpointing_changes_memory_and_not_gradients():
    x = draw(2, 1, 16, 16)
    grads = []
    for checkpointing in (False, True):
        model = awake(tiny())
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()(x, 5).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_it_compiles_without_graph_breaks():
    model, x = awake(tiny(num_classes=3, cross_attention_dim=8, pool_context=True)), draw(2, 1, 16, 16)
    args = (x, torch.tensor([5, 600]), torch.tensor([0, 3]), draw(2, 4, 8))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args).sample, model(*args).sample, rtol=1e-4, atol=1e-5)


def test_attention_stands_where_it_is_asked_for():
    def sides(model):
        return {name for name, m in model.named_modules() if isinstance(m, UNetBlock) and m.attention is not None}

    model = tiny(sample_size=32, block_out_channels=(16, 32, 32), attention_resolutions=(8,))
    assert sides(model) == {"encoder.level2_block0", "middle.0", "decoder.level2_block0", "decoder.level2_block1"}
    default = tiny(sample_size=32, block_out_channels=(16, 32, 32))
    assert sides(default) == {"encoder.level1_block0", "middle.0", "decoder.level1_block0", "decoder.level1_block1"}
    assert all(m.num_heads == 1 for m in default.modules() if isinstance(m, Attention))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_keep_weights_and_dtype(tmp_path, dtype):
    model = awake(tiny(num_classes=3)).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    loaded = UNetModel.from_pretrained(tmp_path, torch_dtype=dtype)
    x = draw(2, 1, 16, 16).to(dtype)
    assert_same_weights(loaded, model)
    assert_same_output(loaded(x, 5).sample, model.eval()(x, 5).sample)


@pytest.mark.parametrize("pipeline, scheduler", [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_it_works_as_unet_in_the_pipelines_of_diffusers(pipeline, scheduler):
    model = awake(tiny(in_channels=3, out_channels=3))
    pipe = pipeline(model, scheduler())
    pipe.set_progress_bar_config(disable=True)
    first, again = [
        pipe(generator=torch.Generator().manual_seed(3), num_inference_steps=3, output_type="np").images for _ in "12"
    ]
    assert first.shape == (1, 16, 16, 3)
    assert (first == again).all()


def test_fourier_features_are_further_inputs_and_none_without_the_option():
    """The first convolution sees x and sin and cos of 2^n pi x, whatever the precision of x."""
    options = {
        "sample_size": 8,
        "in_channels": 2,
        "out_channels": 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
    }
    plain, rich = UNetModel(**options), UNetModel(**options, fourier_features=(3, 4))
    assert plain.conv_in.weight.shape[1] == 2 and rich.conv_in.weight.shape[1] == 10
    x = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    seen = []
    rich.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    rich(x, 3)
    expected = [x, *(wave(n * torch.pi * x) for n in (8, 16) for wave in (torch.sin, torch.cos))]
    torch.testing.assert_close(seen[0], torch.cat(expected, 1), rtol=0, atol=1e-5)
    assert plain.config.fourier_features == ()
