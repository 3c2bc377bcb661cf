"""The parts that options of `DiTModel` put in the place of the paper's, each beside another way to compute it."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import LayerSkipConfig
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from diffusers.models.attention import FeedForward
from peft import LoraConfig

from diffusers_ext import DiTModel
from diffusers_ext.models.dit_blocks import DiTFeedForward, gelu, modulated_norm
from diffusers_ext.models.dit_parts import ConvPatchEmbedding, gated_width, rotary_table, rotate
from tiny import assert_same_output, assert_same_weights


ALL_PARTS = {
    **{"position_embedding": "rope", "norm": "rms", "mlp": "swiglu", "qk_norm": True},
    **{"value_residual": True, "patch_embedding": "conv", "long_skips": True},
}


def tiny(**kwargs):
    torch.manual_seed(0)
    size = {"sample_size": 8, "in_channels": 2, "hidden_size": 16, "num_layers": 4, "num_attention_heads": 2}
    return DiTModel(**(size | kwargs))


def awake(model):
    """The model with random numbers in all parameters, so that every path has an effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.15, generator=generator)
    return model


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(5,), (3, 4)])
def test_rotary_scores_depend_on_the_distance_alone(size):
    """The same query and key at each position: their product is one number for each distance along the axes."""
    head_dim = 8
    query, key = draw(head_dim).double(), draw(head_dim, seed=1).double()
    table = rotary_table(size, size, head_dim).double()
    at_each = [rotate(x.expand(1, 1, table.shape[1], head_dim), table)[0, 0] for x in (query, key)]
    scores = at_each[0] @ at_each[1].T
    grid = torch.cartesian_prod(*[torch.arange(n) for n in size]).view(len(scores), -1)
    of_distance = {}
    for i, here in enumerate(grid):
        for j, there in enumerate(grid):
            of_distance.setdefault(tuple((here - there).tolist()), []).append(scores[i, j])
    for distance, values in of_distance.items():
        torch.testing.assert_close(torch.stack(values), values[0].expand(len(values)), rtol=0, atol=1e-5)
        expected = query @ key if not any(distance) else None
        assert expected is None or torch.isclose(values[0], expected, atol=1e-5)
    means = torch.stack([values[0] for values in of_distance.values()])
    assert means.unique().numel() == len(means)  # every distance is told from the others


def test_rotation_is_multiplication_by_complex_numbers():
    x, (rows, columns) = draw(2, 3, 7, 8), (2, 3)
    table = rotary_table((rows, columns), (rows, columns), 8, num_unrotated=1)
    pairs = torch.complex(x[..., ::2], x[..., 1::2]).to(torch.complex128)
    for token in range(rows * columns):
        row, column = divmod(token, columns)
        angles = torch.tensor([row, row * 0.1, column, column * 0.1], dtype=torch.float64)
        pairs[:, :, token] *= torch.polar(torch.ones(4, dtype=torch.float64), angles)
    expected = torch.view_as_real(pairs).flatten(-2).float()
    torch.testing.assert_close(rotate(x, table), expected)
    torch.testing.assert_close(torch.func.vmap(lambda each: rotate(each, table))(x[None])[0], expected)


def test_a_point_of_the_image_keeps_its_rotation_at_another_resolution():
    fine, coarse = rotary_table((4, 6), (2, 3), 8), rotary_table((2, 3), (2, 3), 8)
    torch.testing.assert_close(fine.view(2, 4, 6, 4)[:, ::2, ::2], coarse.view(2, 2, 3, 4))
    model = awake(tiny(position_embedding="rope"))
    assert model(draw(1, 2, 12, 4), 5).sample.shape == (1, 2, 12, 4)


def test_without_its_rotation_attention_sees_no_positions():
    """Patches in another order come out in that order, but with rotary positions they do not."""
    model, x = awake(tiny(position_embedding="rope")), draw(1, 2, 8, 8)
    swapped = x.roll(4, dims=3)  # two columns of patches
    outputs = []
    for table in (model.positions, rotary_table((4, 4), (4, 4), 8) * 0 + torch.tensor([1.0, 0.0])[:, None, None]):
        model.positions = table
        outputs.append((model(swapped, 5).sample.roll(-4, dims=3) - model(x, 5).sample).abs().max())
    assert outputs[0] > 1e-3 and outputs[1] < 1e-5


def test_rms_norm_divides_by_the_root_mean_square():
    x, scale, shift = 3 + draw(2, 5, 16), draw(2, 16), draw(2, 16, seed=1)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(modulated_norm(x, scale, shift, 1e-6, "rms"), expected)
    model = awake(tiny(norm="rms", qk_norm=True, cross_attention_dim=8))
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    block = model.transformer_blocks[0]
    for norm in (block.cross_norm, block.attn.norm_q):
        x = draw(3, len(norm.weight))
        torch.testing.assert_close(norm(x), F.rms_norm(x, x.shape[1:], norm.weight, norm.eps))


def test_gelu_is_in_its_tanh_form_but_in_training_on_cpus_where_that_is_slow():
    layer, x = DiTFeedForward(8, 32).eval(), draw(2, 4, 8)

    def by_hand(x, approximate):
        return layer.net[2](torch.nn.functional.gelu(layer.net[0].proj(x), approximate=approximate))

    torch.testing.assert_close(layer(x), by_hand(x, "tanh"), rtol=0, atol=0)
    layer.train()
    torch.testing.assert_close(layer(x), by_hand(x, "none"), rtol=0, atol=0)
    assert (layer(x) - by_hand(x, "tanh")).abs().max() < 5e-4 * layer.net[2].weight.abs().sum(1).max()
    layer.double()  # whose user wants the network as it is
    torch.testing.assert_close(layer(x.double()), by_hand(x.double(), "tanh"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.float16, 2e-3)]
)
def test_gelu_without_gradients_is_its_tanh_form_in_every_precision(dtype, tolerance):
    x = torch.cat([torch.linspace(-12, 12, 1001), torch.tensor([-3e4, 0.0, 3e4])]).to(dtype)
    expected = F.gelu(x.double(), approximate="tanh").to(dtype)
    with torch.no_grad():
        fast = gelu(x)
    torch.testing.assert_close(fast, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gelu(x), expected, rtol=tolerance, atol=tolerance)


def test_gelu_without_gradients_leaves_its_input_and_the_other_derivatives_alone():
    x = torch.linspace(-3, 3, 7, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        gelu(x)
        batched = torch.func.vmap(gelu)(x)
        _, tangent = torch.func.jvp(gelu, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    torch.testing.assert_close(batched, F.gelu(x, approximate="tanh"))
    slope = torch.func.vmap(torch.func.grad(lambda x: F.gelu(x, approximate="tanh")))(x)
    torch.testing.assert_close(tangent, slope)


def test_swiglu_is_that_of_diffusers_with_the_parameters_of_gelu():
    layer, x = awake(DiTFeedForward(16, 64, mlp="swiglu")), draw(2, 5, 16)
    torch.testing.assert_close(layer(x), FeedForward.forward(layer, x))
    value, gate = F.linear(x, layer.net[0].proj.weight, layer.net[0].proj.bias).chunk(2, dim=-1)
    by_hand = F.linear(value * gate * gate.sigmoid(), layer.net[2].weight, layer.net[2].bias)
    torch.testing.assert_close(layer(x), by_hand)
    for width in (128, 256, 1152):
        with torch.device("meta"):
            plain, gated = (
                sum(p.numel() for p in DiTFeedForward(width, 4 * width, mlp=mlp).parameters())
                for mlp in ("gelu", "swiglu")
            )
        assert gated == pytest.approx(plain, rel=0.02)
    assert gated_width(4) == 8


def test_values_are_the_blocks_own_at_a_share_of_1_and_the_firsts_at_0():
    model, x = awake(tiny(value_residual=True)), draw(2, 2, 8, 8)
    shares = [block.attn.own_share for block in model.transformer_blocks]
    assert shares[0] is None and all(share.shape == (1,) for share in shares[1:])
    plain = tiny()
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "own_share" not in name})

    def with_share(share):
        for parameter in shares[1:]:
            parameter.data.fill_(share)
        return model(x, 5).sample

    torch.testing.assert_close(with_share(1.0), plain(x, 5).sample)
    of_first, half = with_share(0.0), with_share(0.5)
    for block in model.transformer_blocks[1:]:  # whose own values then have no part
        block.attn.to_kv.weight.data[16:].normal_(generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(with_share(0.0), of_first)
    assert (with_share(0.5) - half).abs().max() > 1e-3 and (of_first - plain(x, 5).sample).abs().max() > 1e-3


def test_where_the_first_block_is_skipped_the_others_have_their_own_values():
    model, x = awake(tiny(value_residual=True)), draw(2, 2, 8, 8)
    apply_layer_skip(model, LayerSkipConfig(indices=[0]))
    before = model(x, 5).sample
    for block in model.transformer_blocks[1:]:
        block.attn.own_share.data.fill_(0.9)
    assert torch.equal(model(x, 5).sample, before)


@pytest.mark.parametrize("num_layers, pairs", [(3, {2: 0}), (4, {3: 0}), (5, {3: 1, 4: 0}), (6, {4: 1, 5: 0})])
def test_long_skips_join_the_first_blocks_to_the_last(num_layers, pairs):
    model, x = tiny(num_layers=num_layers, long_skips=True), draw(2, 16, 16)
    blocks = model.transformer_blocks
    assert {i for i, block in enumerate(blocks) if block.skip_in is not None} == set(pairs)
    received = {}
    for i, block in enumerate(blocks):
        block.register_forward_hook(lambda _, args, out, i=i: received.update({i: (args[0], args[4], out)}))
    awake(model)(draw(2, 2, 8, 8), 5)
    for i in range(num_layers):
        _, skip, _ = received[i]
        assert (skip is None) == (i not in pairs)
        assert skip is None or torch.equal(skip, received[pairs[i]][2])
    block, (x, skip, out) = blocks[-1], received[num_layers - 1]
    weight, bias = block.skip_in.weight, block.skip_in.bias
    joined = x @ weight[:, :16].T + skip @ weight[:, 16:].T + bias
    assert not torch.allclose(joined, x, atol=1e-2) and out.shape == x.shape


def test_a_long_skip_begins_as_nothing():
    model, plain, x = tiny(long_skips=True), tiny(), draw(2, 2, 8, 8)
    skips = {name: value for name, value in model.state_dict().items() if "skip_in" in name}
    awake(plain)
    model.load_state_dict(plain.state_dict() | skips)
    torch.testing.assert_close(model(x, 5).sample, plain(x, 5).sample)


@pytest.mark.parametrize("patch_size", [1, 2, 4, 8])
def test_convolved_patches_move_with_the_image(patch_size):
    """But at the border, whose neighbours are zeros."""
    torch.manual_seed(0)
    stem, x = ConvPatchEmbedding(2, 16, patch_size), draw(1, 2, 6 * patch_size, 6 * patch_size)
    tokens, moved = (stem(each).unflatten(1, (6, 6)) for each in (x, x.roll(patch_size, dims=2)))
    torch.testing.assert_close(moved[:, 2:5, 1:5], tokens[:, 1:4, 1:5])
    far = x.clone()
    far[..., -patch_size:] += 1
    assert torch.equal(stem(far).unflatten(1, (6, 6))[:, :, :3], tokens[:, :, :3])
    assert len(stem.convs) == max(1, patch_size.bit_length() - 1)


@pytest.fixture(scope="module")
def complete():
    return awake(tiny(**ALL_PARTS, num_classes=3, cross_attention_dim=8, num_registers=1)).eval()


INPUTS = (draw(2, 2, 8, 8), torch.tensor([5, 600]), torch.tensor([0, 3]), draw(2, 3, 8))


def test_all_parts_together_train(complete):
    """Every parameter gets a gradient, the same where activations are recomputed."""
    grads = []
    for checkpointing in (False, True):
        complete.zero_grad()
        complete.enable_gradient_checkpointing() if checkpointing else complete.disable_gradient_checkpointing()
        complete.train()(*INPUTS).sample.square().sum().backward()
        grads.append([p.grad.clone() for p in complete.parameters()])
    complete.disable_gradient_checkpointing()
    complete.eval().zero_grad()
    torch.testing.assert_close(*grads)
    assert [name for name, p in complete.named_parameters() if p.grad is not None and p.grad.any()] == []
    assert all(grad.any() for grad in grads[0])


def test_all_parts_together_keep_samples_apart(complete):
    together = complete(*INPUTS).sample
    for i in range(2):
        alone = complete(*(each[i : i + 1] for each in INPUTS)).sample
        torch.testing.assert_close(alone[0], together[i], rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_block", [False, True])
def test_all_parts_together_compile_without_graph_breaks(by_block):
    model = awake(tiny(**ALL_PARTS, num_layers=3)).eval()
    expected = model(*INPUTS[:2]).sample
    if by_block:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
    compiled = model if by_block else torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*INPUTS[:2]).sample, expected, rtol=1e-4, atol=1e-5)


def test_all_parts_together_are_saved_and_loaded(complete, tmp_path):
    complete.save_pretrained(tmp_path)
    loaded = DiTModel.from_pretrained(tmp_path)
    assert_same_weights(loaded, complete)
    assert_same_output(loaded(*INPUTS).sample, complete(*INPUTS).sample)
    assert {name: loaded.config[name] for name in ALL_PARTS} == ALL_PARTS
    with pytest.raises(ValueError, match="must be .* to be converted to diffusers' DiTTransformer2DModel"):
        complete.to_diffusers()


def test_all_parts_together_run_in_bfloat16(complete):
    expected = complete(*INPUTS).sample
    with torch.autocast("cpu", torch.bfloat16):
        rounded = complete(*INPUTS).sample
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - expected).norm() < 0.05 * expected.norm()


def test_all_parts_together_have_a_cache_and_an_adapter():
    model = awake(tiny(**ALL_PARTS)).eval()
    x, plain = INPUTS[0], None
    with torch.no_grad():
        plain = model(x, 5).sample
        model.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        with model.cache_context("cond"):
            torch.testing.assert_close(model(x, 5).sample, plain)
            torch.testing.assert_close(model(x, 5).sample, plain)  # of the cache alone
        model.disable_cache()
        model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_kv", "to_out", "skip_in", "patch_in.proj"]))
        torch.testing.assert_close(model(x, 5).sample, plain)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
        beside = model(x, 5).sample
        model.fuse_lora()
        torch.testing.assert_close(model(x, 5).sample, beside, rtol=1e-4, atol=1e-4)
        assert (beside - plain).abs().max() > 1e-3


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"position_embedding": "rope", "num_attention_heads": 8},
            "rope needs attention heads of a multiple of 4 .* 2",
        ),
        ({"patch_embedding": "conv", "patch_size": 3, "sample_size": 9}, "must be one of 1, 2, 4, 8, got 3"),
        ({"value_residual": True, "num_layers": 1}, "num_layers must be at least 2, got 1"),
        ({"long_skips": True, "num_layers": 2}, "num_layers must be at least 3, got 2"),
        ({"norm": "batch"}, "norm must be one of layer, rms, got 'batch'"),
        ({"mlp": "relu"}, "mlp must be one of gelu, swiglu"),
        ({"position_embedding": "learned"}, "position_embedding must be one of sincos, rope"),
        ({"value_residual": 1}, "value_residual must be true or false"),
    ],
)
def test_parts_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny(**options)
