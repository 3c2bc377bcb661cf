import pytest
import torch
import torch.nn.functional as F
from diffusers import LayerSkipConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.hooks.smoothed_energy_guidance_utils import (
    SmoothedEnergyGuidanceConfig,
    _apply_smoothed_energy_guidance_hook,
)

from diffusers_ext import DiTModel
from diffusers_ext.models.dit_blocks import DiTAttention
from tiny import assert_same_output, assert_same_weights, random_stock_dit


def tiny(**kwargs):
    torch.manual_seed(0)
    config = {
        "sample_size": 8,
        "patch_size": 2,
        "in_channels": 4,
        "hidden_size": 32,
        "num_layers": 2,
        "num_attention_heads": 2,
    }
    return DiTModel(**(config | kwargs))


def awake(model, std=0.15):
    """The model with random numbers in all parameters, so that every path has an effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=std, generator=generator)
    return model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reference(model, sample, timestep, label):
    """The network of the paper written out in float64, a sample at a time, from the parameters by name."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    config, patch = model.config, model.config.patch_size

    def linear(name, x):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, eps):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()

    angles = timestep * 10000 ** -(torch.arange(128).double() / 127)
    embedding = torch.cat([angles.cos(), angles.sin()])
    embedding = linear("time_embedding.linear_2", F.silu(linear("time_embedding.linear_1", embedding)))
    embedding = F.silu(embedding + weights["time_embedding.class_embedding.weight"][label])

    rows, columns = sample.shape[1] // patch, sample.shape[2] // patch
    tokens = []
    for i in range(rows):
        for j in range(columns):
            piece = sample.double()[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch]
            frequencies = 10000 ** -(torch.arange(config.hidden_size // 4).double() / (config.hidden_size // 4))
            place = [f(n * frequencies) for n in (j, i) for f in (torch.sin, torch.cos)]
            tokens.append(linear("patch_in", piece.flatten()) + torch.cat(place))
    x = torch.stack(tokens)
    for n in range(config.num_layers):
        name, width = f"transformer_blocks.{n}", config.hidden_size // config.num_attention_heads
        shift, scale, gate, shift_ff, scale_ff, gate_ff = linear(f"{name}.modulation", embedding).chunk(6)
        h = norm(x, 1e-6) * (1 + scale) + shift
        query, (key, value) = linear(f"{name}.attn.to_q", h), linear(f"{name}.attn.to_kv", h).chunk(2, -1)
        heads = []
        for q, k, v in zip(query.split(width, -1), key.split(width, -1), value.split(width, -1), strict=True):
            heads.append((q @ k.T / width**0.5).softmax(-1) @ v)
        x = x + gate * linear(f"{name}.attn.to_out", torch.cat(heads, -1))
        h = F.gelu(linear(f"{name}.ff.net.0.proj", norm(x, 1e-6) * (1 + scale_ff) + shift_ff), approximate="tanh")
        x = x + gate_ff * linear(f"{name}.ff.net.2", h)
    shift, scale = linear("modulation_out", embedding).chunk(2)
    x = linear("patch_out", norm(x, 1e-6) * (1 + scale) + shift)
    out = torch.zeros(config.out_channels, *sample.shape[1:], dtype=torch.float64)
    for token, (i, j) in zip(x, [(i, j) for i in range(rows) for j in range(columns)], strict=True):
        out[:, i * patch : (i + 1) * patch, j * patch : (j + 1) * patch] = token.view(patch, patch, -1).permute(
            2, 0, 1
        )
    return out


@pytest.mark.parametrize("sample_size, patch_size", [(8, 2), ((6, 9), 3), ((4, 8), 1)])
def test_it_computes_the_network_of_the_paper(sample_size, patch_size):
    model = awake(tiny(sample_size=sample_size, patch_size=patch_size, out_channels=8, num_classes=3)).double()
    size = (sample_size, sample_size) if isinstance(sample_size, int) else sample_size
    x, labels = draw(3, 4, *size).double(), torch.tensor([2, 0, 3])
    out = model(x, torch.tensor([0, 7, 999]), labels).sample
    for i, t in enumerate((0, 7, 999)):
        expected = reference(model, x[i], t, labels[i])
        torch.testing.assert_close(out[i], expected, rtol=0, atol=2e-4)  # tables of angles are float32


@pytest.mark.parametrize(
    "config, shape",
    [
        ({}, (2, 4, 8, 8)),
        ({}, (2, 4, 6, 14)),
        ({"sample_size": (4, 12)}, (2, 4, 4, 12)),
        ({"patch_size": 8, "out_channels": 8}, (1, 4, 16, 8)),
        ({"patch_size": 1, "in_channels": 1, "sample_size": 4}, (2, 1, 4, 4)),
        ({"patch_size": 7, "sample_size": 7, "num_registers": 3, "qk_norm": True}, (2, 4, 7, 21)),
    ],
)
def test_every_size_that_the_config_allows(config, shape):
    model = tiny(**config)
    out = model(draw(*shape), 3).sample
    assert out.shape == (shape[0], model.config.out_channels, *shape[2:])
    assert not out.any()  # the output layer starts at zero
    assert model.config.out_channels == config.get("out_channels", model.config.in_channels)


def test_a_new_block_is_the_identity():
    model = tiny(cross_attention_dim=8, num_classes=2)
    x = draw(2, 5, 32)
    assert torch.equal(model.transformer_blocks[0](x, draw(2, 32), draw(2, 3, 8)), x)


@pytest.mark.parametrize(
    "name, millions", [("DiT-S/8", 33), ("DiT-S/2", 33), ("DiT-B/4", 130), ("DiT-L/2", 458), ("DiT-XL/2", 675)]
)
def test_sizes_by_name_have_the_parameters_of_the_paper(name, millions):
    """Table 1 of the paper in full millions, for latents of 4 channels, 1000 labels and a learned variance."""
    with torch.device("meta"):
        model = DiTModel.from_name(name, in_channels=4, out_channels=8, num_classes=1000)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert model.config.patch_size == int(name[-1])


@pytest.mark.parametrize("name", ["DiT-S", "DiT-M/2", "S/2", "DiT-S/9", "DiT-S/0", "DiT-S/2/2"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=r"one of DiT-S, DiT-B, DiT-L, DiT-XL, a slash and a patch size in \[1, 8\]"):
        DiTModel.from_name(name)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"sample_size": 9}, r"multiple of patch_size \(2\), got 9 x 9"),
        (
            {"sample_size": (8, 8, 8)},
            r"sample_size must be one positive number or one for each of 2 axes, got \(8, 8, 8\)",
        ),
        ({"sample_size": 0}, "sample_size must be one positive number or one for each of 2 axes, got 0"),
        ({"patch_size": 9}, r"patch_size must be in \[1, 8\], got 9"),
        ({"hidden_size": 30}, r"multiple of num_attention_heads \(2\) and of 4, got 30"),
        ({"hidden_size": 32, "num_attention_heads": 3}, r"multiple of num_attention_heads \(3\)"),
        ({"num_layers": 0}, "must be at least 1, got 4, 4, 32, 0, 2"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be positive"),
        ({"num_registers": -1}, "num_registers not negative"),
    ],
)
def test_a_config_that_cannot_work_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        tiny(**config)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"sample": draw(2, 4, 7, 8)}, r"multiple of patch_size \(2\), got 7 x 8"),
        ({"sample": draw(2, 3, 8, 8)}, r"shape \(batch, 4, height, width\), got \(2, 3, 8, 8\)"),
        ({"class_labels": torch.tensor([0, 4])}, r"class_labels must be in \[0, 3\], got \[4\]"),
        ({"class_labels": torch.tensor([-1, 999])}, r"got \[-1, 999\]"),
        ({"class_labels": torch.tensor([0, 1, 2])}, r"one for each of the 2 samples, or sets .*, got \(3,\)"),
        ({"encoder_hidden_states": draw(2, 3, 8)}, "cross_attention_dim=None"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        tiny(num_classes=3)(**({"sample": draw(2, 4, 8, 8), "timestep": 3} | kwargs))


def test_no_label_is_the_null_label_and_so_is_that_of_diffusers():
    model, x = awake(tiny(num_classes=3)), draw(2, 4, 8, 8)
    null, other, theirs = torch.full((2,), 3), torch.full((2,), 1), torch.full((2,), 1000)
    expected = model(x, 5, null).sample
    assert torch.equal(model(x, 5).sample, expected) and torch.equal(model(x, 5, theirs).sample, expected)
    assert (model(x, 5, other).sample - expected).abs().max() > 1e-3
    assert theirs.tolist() == [1000, 1000]
    many = awake(tiny(num_classes=1200))
    assert not torch.equal(many(x, 5, theirs).sample, many(x, 5).sample)


def test_each_sample_is_on_its_own():
    """A sample's output depends on its own timestep, label and context, not on the rest of the batch."""
    model = awake(
        tiny(num_classes=3, cross_attention_dim=8, num_registers=2, qk_norm=True, pool_context=True)
    ).double()
    x, timesteps, labels = draw(3, 4, 8, 8).double(), torch.tensor([1, 50, 900]), torch.tensor([0, 2, 3])
    context = draw(3, 4, 8).double()
    together = model(x, timesteps, labels, context).sample
    for i in range(3):
        alone = model(x[i : i + 1], timesteps[i], labels[i : i + 1], context[i : i + 1]).sample
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-6)
    for changed in (
        model(x, timesteps.flip(0), labels, context),
        model(x, timesteps, labels.flip(0), context),
        model(x, timesteps, labels, context.flip(0)),
    ):
        assert (changed.sample - together)[[0, 2]].flatten(1).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("autocast", [False, True])
def test_masked_context_is_not_seen(autocast):
    """With gradients, so that in bfloat16 attention takes the way that training does."""
    model, x = awake(tiny(cross_attention_dim=8, qk_norm=True)), draw(2, 4, 8, 8)
    context, grads, outputs = draw(2, 4, 8), [], []
    mask = torch.tensor([[1, 1, 0, 0]] * 2)
    other = torch.cat([context[:, :2], draw(2, 2, 8, seed=7)], dim=1)
    for tokens, seen in ((context, mask), (other, mask), (context[:, :2], None)):
        tokens = tokens.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            outputs.append(model(x, 5, None, tokens, seen).sample.float())
        grads.append(torch.autograd.grad(outputs[-1].square().mean(), tokens)[0])
    tolerance = {"rtol": 0.05, "atol": 0.05} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    for output, grad in zip(outputs[1:], grads[1:], strict=True):
        torch.testing.assert_close(output, outputs[0], **tolerance)
        torch.testing.assert_close(grad[:, :2], grads[0][:, :2], **tolerance)
    assert grads[0][:, :2].abs().min() > 0 and not grads[0][:, 2:].any()


def test_queries_and_keys_are_normalised():
    """With QK-norm the scale of their layers has no effect; without, it has."""
    for qk_norm in (True, False):
        model, x = awake(tiny(qk_norm=qk_norm)), draw(2, 4, 8, 8)
        before = model(x, 5).sample
        for module in model.modules():
            if isinstance(module, DiTAttention):
                for parameter in module.to_q.parameters():
                    parameter.data *= 3
        assert torch.allclose(model(x, 5).sample, before, rtol=1e-3, atol=1e-3) == qk_norm


def test_every_parameter_gets_a_gradient():
    model = awake(tiny(num_classes=3, cross_attention_dim=8, num_registers=2, qk_norm=True, embedding_per_block=True))
    labels, context = torch.tensor([0, 1, 2, 3]), draw(4, 4, 8)
    model(draw(4, 4, 8, 8), torch.tensor([1, 10, 100, 900]), labels, context).sample.square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_bfloat16_is_as_near_to_float32_as_diffusers_own():
    """Forward and gradients under autocast, where attention and GELU take other ways on a CPU."""
    x, timesteps, labels = draw(4, 4, 16, 16), torch.tensor([1, 100, 500, 999]), torch.tensor([0, 1, 2, 3])
    theirs = random_stock_dit(sample_size=16, num_embeds_ada_norm=3)
    errors = []
    for model in (theirs, DiTModel.from_diffusers(theirs)):
        exact = model(x, timesteps, labels).sample
        exact_grad = torch.autograd.grad(exact.square().mean(), model.parameters())
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(x, timesteps, labels).sample
        assert rounded.dtype == torch.bfloat16
        grads = torch.autograd.grad(rounded.float().square().mean(), model.parameters())
        norms = [
            torch.stack([g.norm() for g in many]).norm()
            for many in (exact_grad, [a - b for a, b in zip(grads, exact_grad, strict=True)])
        ]
        errors.append(((rounded.float() - exact).norm() / exact.norm(), norms[1] / norms[0]))
    (their_output, their_gradient), (output, gradient) = errors
    # What rounding does to one network or the other differs by about a third from one draw of weights to the next.
    assert 0 < output < 1.5 * their_output < 0.02
    assert 0 < gradient < 1.5 * their_gradient < 0.02


def test_checkpointing_changes_memory_and_not_gradients():
    x = draw(2, 4, 8, 8)
    grads = []
    for checkpointing in (False, True):
        model = awake(tiny())
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()(x, 5).sample.square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*grads)


def test_dropout_is_for_training():
    model, x = awake(tiny(dropout=0.5)), draw(2, 4, 8, 8)
    assert torch.equal(model.eval()(x, 5).sample, awake(tiny()).eval()(x, 5).sample)
    assert not torch.equal(model.train()(x, 5).sample, model(x, 5).sample)


def test_it_compiles_without_graph_breaks():
    model = awake(tiny(num_layers=1, num_classes=3, cross_attention_dim=8, num_registers=1, qk_norm=True)).eval()
    args = (draw(2, 4, 4, 12), torch.tensor([5, 600]), torch.tensor([0, 3]), draw(2, 4, 8))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args).sample, model(*args).sample, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_keep_weights_and_dtype(tmp_path, dtype):
    model = awake(tiny(num_classes=3, num_registers=2)).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = DiTModel.from_pretrained(tmp_path, torch_dtype=dtype)
    x = draw(2, 4, 8, 8).to(dtype)
    assert_same_weights(loaded, model)
    assert loaded(x, 5).sample.dtype == dtype
    assert_same_output(loaded(x, 5).sample, model.eval()(x, 5).sample)


def test_weights_can_be_kept_in_eight_bits():
    """diffusers' layerwise casting, which leaves norms, embeddings and the first layer as they are."""
    model, x = awake(tiny(), std=0.1).bfloat16(), draw(2, 4, 8, 8).bfloat16()
    with torch.no_grad():
        before = model(x, 5).sample
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
        assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
        assert model.patch_in.weight.dtype == torch.bfloat16
        assert 0 < (model(x, 5).sample - before).norm() < 0.1 * before.norm()


def test_skipping_a_block_is_the_model_without_it():
    """diffusers' hooks find the blocks, as its guiders SLG and PAG do."""
    model, x = awake(tiny(num_layers=3)), draw(2, 4, 8, 8)
    shorter = awake(tiny(num_layers=2))
    weights = {
        name.replace("blocks.2.", "blocks.1."): v for name, v in model.state_dict().items() if "s.1." not in name
    }
    shorter.load_state_dict(weights)
    apply_layer_skip(model, LayerSkipConfig(indices=[1]))
    torch.testing.assert_close(model(x, 5).sample, shorter(x, 5).sample)


def test_perturbed_attention_is_attention_to_oneself():
    """Each token then takes its own value, as it does in attention to a sequence of it alone."""
    model, x = awake(tiny()), draw(2, 6, 32)
    attn = model.transformer_blocks[1].attn
    expected = attn(x.flatten(0, 1)[:, None]).view(2, 6, 32)
    apply_layer_skip(
        model, LayerSkipConfig(indices=[1], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    )
    with torch.no_grad():
        torch.testing.assert_close(attn(x), expected)


def test_guiders_find_the_feed_forward_layers_and_the_queries():
    for change in (
        lambda model: apply_layer_skip(model, LayerSkipConfig(indices=[1], skip_attention=False)),
        lambda model: _apply_smoothed_energy_guidance_hook(model, SmoothedEnergyGuidanceConfig(indices=[1]), 2.0),
    ):
        model, x = awake(tiny()), draw(2, 4, 8, 8)
        with torch.no_grad():
            before = model(x, 5).sample
            change(model)
            assert (model(x, 5).sample - before).abs().max() > 1e-3
