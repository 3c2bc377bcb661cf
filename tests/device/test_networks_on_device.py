"""Networks on an accelerator compute what they do on the CPU, in either memory layout, and wait for nothing."""

import pytest
import torch

from devices import DEVICES, assert_near, moved, no_host_sync
from diffusers_ext import DiTModel, HierarchicalVAEModel, NoisyClassifierModel, UNetModel, VAEModel


pytestmark = pytest.mark.device

UNET = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32), "layers_per_block": 1}
DIT = {"sample_size": 16, "in_channels": 3, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
VAE = {"sample_size": 16, "in_channels": 3, "out_channels": 3, "block_out_channels": (16, 32), "latent_channels": 4}
G = torch.Generator().manual_seed(0)
X, EACH, LABELS = torch.randn(2, 3, 16, 16, generator=G), torch.tensor([10, 900]), torch.tensor([1, 4])
CONTEXT, MASK = torch.randn(2, 5, 12, generator=G), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
TEXT = {"encoder_hidden_states": CONTEXT, "encoder_attention_mask": MASK}


def through_vae(vae, x):
    posterior = vae.encode(x).latent_dist
    return torch.cat([vae.decode(posterior.mean).sample.flatten(1), posterior.std.flatten(1)], dim=1)


NETWORKS = {
    "unet": (lambda: UNetModel(**UNET, num_classes=5), {"timestep": EACH, "class_labels": LABELS}),
    "unet, text": (lambda: UNetModel(**UNET, cross_attention_dim=12), {"timestep": EACH} | TEXT),
    "dit": (lambda: DiTModel(**DIT, num_classes=5), {"timestep": EACH, "class_labels": LABELS}),
    "dit, text": (lambda: DiTModel(**DIT, cross_attention_dim=12, pool_context=True), {"timestep": EACH} | TEXT),
    "classifier": (
        lambda: NoisyClassifierModel(sample_size=16, in_channels=3, block_out_channels=(16, 32), num_classes=5),
        {"timestep": EACH},
    ),
    "vae": (lambda: VAEModel(**VAE), {}),
    "hierarchical vae": (lambda: HierarchicalVAEModel(**VAE, num_levels=2), {}),
}


def make(name):
    """The network with no part that is zero, and its arguments beside the samples."""
    torch.manual_seed(0)
    network, arguments = NETWORKS[name][0](), NETWORKS[name][1]
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return network, arguments


def on(device, arguments):
    return {name: value.to(device) for name, value in arguments.items()}


def outputs(network, x, arguments):
    if isinstance(network, VAEModel):
        return through_vae(network, x)
    return network(x, **arguments, return_dict=False)[0]


@pytest.mark.product
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_gradients_are_those_of_the_cpu(name, layout, device):
    """In float32 without TF32; the sums are in another order."""
    network, arguments = make(name)
    there = moved(network, device, memory_format=layout)
    expected = outputs(network, X, arguments)
    result = outputs(there, X.to(device, memory_format=layout), on(device, arguments))
    assert_near(result, expected, 2e-4)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (expected * weights).sum().backward()
    (result * weights.to(device)).sum().backward()
    gradients = [
        (name, own.grad, other.grad.cpu())
        for (name, own), other in zip(network.named_parameters(), there.parameters(), strict=True)
        if own.grad is not None
    ]
    largest = max(own.abs().max() for _, own, _ in gradients)
    for parameter, own, other in gradients:
        # Some gradients, as that of a shift of all logits, are zero but for the rounding of larger numbers.
        allowed = 2e-3 * own.abs().max() + 1e-5 * largest
        assert (other - own).abs().max() <= allowed, parameter


@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision_stays_close(name, device):
    """bf16 has 8 bits, and layers add up their rounding; the norm of the error, since single values lose more."""
    network, arguments = make(name)
    with torch.no_grad():
        expected = outputs(network, X, arguments)
        there = moved(network, device)
        with torch.autocast(device, torch.bfloat16):
            result = outputs(there, X.to(device), on(device, arguments))
    error = (result.float().cpu() - expected).norm() / expected.norm()
    # Levels of latents are decoded one from another, each with the rounding of those above it.
    assert error < (0.1 if name == "hierarchical vae" else 0.05)


@pytest.mark.product
@pytest.mark.parametrize("timestep", [7, 7.5, "each", "one"])
@pytest.mark.parametrize("name", [name for name in NETWORKS if "vae" not in name])
def test_no_call_waits_for_the_device(name, timestep, device):
    network, arguments = make(name)
    network, arguments, x = network.to(device), on(device, arguments), X.to(device)
    timestep = {"each": arguments.pop("timestep"), "one": torch.tensor(7, device=device)}.get(timestep, timestep)

    def step():
        network(x, timestep, **arguments, return_dict=False)[0].square().mean().backward()

    step()
    with no_host_sync(device):
        step()


@pytest.mark.parametrize("name", ["unet", "dit", "vae"] if DEVICES == ["cuda"] else ["dit"])
def test_a_compiled_network_computes_what_an_eager_one_does(name, device):
    network, arguments = make(name)
    network, arguments, x = network.to(device), on(device, arguments), X.to(device)
    torch._dynamo.reset()
    # For the CPU tracing alone: making machine code takes long and is no claim about devices.
    compiled = torch.compile(outputs, backend="inductor" if device == "cuda" else "eager")
    results = []
    for function in (outputs, compiled):
        network.zero_grad()
        result = function(network, x, arguments)
        result.square().mean().backward()
        gradients = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
        results.append((result, gradients))
    assert_near(results[1][0], results[0][0], 1e-3)
    assert_near(results[1][1], results[0][1], 5e-3)
