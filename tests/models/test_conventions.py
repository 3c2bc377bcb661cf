"""What diffusers expects of a model, beyond its output: see docs/conventions.md for what else there is, and what there is not."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline, DiTPipeline

from diffusers_ext import DiTModel, ExtDDIMScheduler, GuidedDiffusionPipeline, UNetModel, VAEModel
from diffusers_ext.models.dit_blocks import DiTAttention, DiTAttentionProcessor
from diffusers_ext.models.layers import AttentionProcessor


def random_weights(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


MODELS = {
    "dit": lambda: DiTModel(8, 2, 1, hidden_size=16, num_layers=2, num_attention_heads=2, num_registers=1),
    "unet": lambda: UNetModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1, attention_resolutions=(4,)),
    "vae": lambda: VAEModel(8, 1, 1, block_out_channels=(8, 16), layers_per_block=1),
}
DENOISERS = ("dit", "unet")


@pytest.fixture(params=MODELS)
def model(request):
    return random_weights(MODELS[request.param]())


@torch.no_grad()
def output_of(model):
    x = torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8).to(model.dtype)
    arguments = () if isinstance(model, VAEModel) else (500,)
    return model(x, *arguments, return_dict=False)[0]


class Silent:
    """Attention that adds nothing."""

    def __call__(self, attn, hidden_states, context=None, mask=None):
        return (
            torch.zeros_like(hidden_states) if isinstance(attn, DiTAttention) else hidden_states
        )  # with its residual


@pytest.mark.parametrize("name", DENOISERS)
def test_attention_processors_are_read_and_replaced(name):
    model = random_weights(MODELS[name]())
    expected, before = output_of(model), model.attn_processors
    kind = DiTAttentionProcessor if name == "dit" else AttentionProcessor
    assert before and all(type(each) is kind for each in before.values())
    model.set_attn_processor(Silent())
    assert not torch.equal(output_of(model), expected)
    model.set_attn_processor(dict(before))
    assert torch.equal(output_of(model), expected)


@pytest.mark.parametrize("name", DENOISERS)
def test_projections_are_fused_as_they_are(name):
    """Keys and values are one layer from the start, so that the method finds nothing to fuse."""
    model = random_weights(MODELS[name]())
    expected, names = output_of(model), model.state_dict().keys()
    model.fuse_qkv_projections()
    assert torch.equal(output_of(model), expected) and model.state_dict().keys() == names
    model.unfuse_qkv_projections()
    assert torch.equal(output_of(model), expected)


def test_a_precision_is_asked_for_by_either_name(model, tmp_path):
    model.save_pretrained(tmp_path)
    for name in ("dtype", "torch_dtype"):
        loaded = type(model).from_pretrained(tmp_path, **{name: torch.bfloat16})
        assert loaded.dtype == torch.bfloat16
        for key, value in loaded.state_dict().items():
            assert torch.equal(value, model.state_dict()[key].to(value.dtype)), key


def test_a_pipeline_loads_in_a_precision_by_either_name(tmp_path):
    GuidedDiffusionPipeline(MODELS["dit"](), ExtDDIMScheduler()).save_pretrained(tmp_path)
    for name in ("dtype", "torch_dtype"):
        assert DiffusionPipeline.from_pretrained(tmp_path, **{name: torch.bfloat16}).denoiser.dtype == torch.bfloat16


def test_weights_stored_in_fewer_bits_compute_nearly_the_same(model):
    expected = output_of(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    assert any(value.dtype == torch.bfloat16 for value in model.state_dict().values())
    torch.testing.assert_close(output_of(model), expected, rtol=0, atol=0.03 * expected.abs().max().item())


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_a_map_of_devices_places_the_model(model, tmp_path, device_map):
    model.save_pretrained(tmp_path)
    if device_map == "auto" and torch.cuda.is_available():
        device_map = {"": "cuda"}
    loaded = type(model).from_pretrained(tmp_path, device_map=device_map).to("cpu")
    torch.testing.assert_close(output_of(loaded), output_of(model))


def test_an_output_is_no_view(model):
    """What is changed in place in a view passes by the hooks of FSDP, which warns of it."""
    x = torch.zeros(2, 1, 8, 8)
    assert not model(x, *(() if isinstance(model, VAEModel) else (500,)), return_dict=False)[0]._is_view()
    if isinstance(model, DiTModel):  # tokens of single pixels stand in memory as the image does
        assert not DiTModel(8, 1, 1, hidden_size=8, num_layers=1, num_attention_heads=2)(x, 5).sample._is_view()


def test_a_model_is_made_without_numbers_from_memory():
    """Those that were never written would differ from process to process; each parameter has a value of its own."""
    for make in MODELS.values():
        torch.manual_seed(3)
        first = make()
        torch.manual_seed(3)
        assert all(torch.equal(a, b) for a, b in zip(first.parameters(), make().parameters(), strict=True))
        assert all(parameter.isfinite().all() for parameter in copy.deepcopy(first).parameters())


@pytest.mark.parametrize("size", [(8, 8), [8, 8], 8])
def test_a_square_is_one_number_in_the_config_by_which_diffusers_draws_noise(size, tmp_path):
    for model in (
        DiTModel(size, 2, 4, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=3),
        UNetModel(size, 4, 4, block_out_channels=(8, 16), layers_per_block=1),
        VAEModel(size, 1, 1, block_out_channels=(8, 16), layers_per_block=1),
    ):
        assert model.config.sample_size == 8
        model.save_pretrained(tmp_path)
        assert type(model).from_pretrained(tmp_path).config.sample_size == 8
    assert tuple(UNetModel((8, 16), 1, 1, block_out_channels=(8, 16)).config.sample_size) == (8, 16)
    dit = DiTModel(size, 2, 4, hidden_size=16, num_layers=1, num_attention_heads=2, num_classes=3)
    vae = VAEModel(16, 3, 3, block_out_channels=(8, 16), layers_per_block=1, latent_channels=4)
    pipe = DiTPipeline(dit, vae, ExtDDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    assert pipe([1], num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
