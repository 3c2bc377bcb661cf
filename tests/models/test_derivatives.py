"""Every derivative of the networks is the numeric one, whichever of PyTorch's ways it is asked in.

Each network is looked at along two directions: `f(a) = weights . network(x + a[0] * u + a[1] * w)`, whose gradient has
two entries and whose Hessian four, small enough for central differences.
"""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from diffusers_ext import DiTModel, NoisyClassifierModel, UNetModel, VAEModel
from diffusers_ext.models.layers import attention, concatenate, group_norm
from diffusers_ext.models.vae_discriminator import PatchDiscriminator


def unet():
    model = UNetModel(8, 1, 1, (8, 16), 1, attention_resolutions=(8,), num_classes=2, cross_attention_dim=6)
    context, mask = draw(2, 3, 6), torch.tensor([[1, 1, 0], [1, 1, 1]])

    def forward(network, x):
        # The same condition for each sample, so that one sample may be taken alone.
        return network(x, 5, torch.tensor([1] * len(x)), context[: len(x)].to(x), mask[: len(x)]).sample

    return model, (1, 8, 8), forward


def series_unet():
    return UNetModel(8, 2, 2, (8, 16), 1, dims=1), (2, 8), lambda network, x: network(x, 5).sample


def dit():
    options = {"hidden_size": 16, "num_layers": 2, "num_attention_heads": 2, "num_classes": 2, "qk_norm": True}
    model = DiTModel(8, 2, 1, num_registers=1, **options)
    return model, (1, 8, 8), lambda network, x: network(x, 5, torch.tensor([1] * len(x))).sample


def vae():
    model = VAEModel(8, 1, 1, (8, 16), 2)
    return model, (1, 8, 8), lambda network, x: network(x, return_dict=False)[0]


def dense_vae():
    model = VAEModel(8, 1, 1, architecture="mlp", latent_dim=3, hidden_dims=(8,))
    return model, (1, 8, 8), lambda network, x: network(x, return_dict=False)[0]


def classifier():
    model = NoisyClassifierModel(8, 1, 3, (8, 16), 1)
    return model, (1, 8, 8), lambda network, x: network(x, 5).logits


def discriminator():
    return PatchDiscriminator(1, 4, 1), (1, 8, 8), lambda network, x: network(x)


NETWORKS = {make.__name__: make for make in (unet, series_unet, dit, vae, dense_vae, classifier, discriminator)}


def draw(*shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


def randomised(make):
    """With random numbers in all parameters: as a network is made, much of it is multiplied by zero."""
    torch.manual_seed(0)
    model, shape, forward = make()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.double(), shape, forward


def along_two_directions(make, training=False):
    model, shape, forward = randomised(make)
    model.train(training)
    x, u, w = draw(2, *shape), draw(3, *shape)[:2], draw(4, *shape)[:2]
    with torch.no_grad():
        weights = draw(*forward(model, x).shape)
    return lambda a: (weights * forward(model, x + a[0] * u + a[1] * w)).sum()


A, DIRECTION, STEP = torch.tensor([0.1, -0.2], dtype=torch.float64), torch.tensor([0.6, 1.1]).double(), 1e-5


def differences(f, a):
    """Central differences of f along both axes, stacked."""
    with torch.no_grad():
        return torch.stack([(f(a + STEP * axis) - f(a - STEP * axis)) / (2 * STEP) for axis in torch.eye(2).double()])


def gradient(f, a, **options):
    a = a.clone().requires_grad_()
    return torch.autograd.grad(f(a), a, **options)[0]


def assert_near(got, expected):
    """Central differences in double precision are good to about eight digits here."""
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.product
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_first_derivatives_are_the_numeric_ones(make, training):
    f = along_two_directions(make, training)
    expected = differences(f, A)
    assert_near(gradient(f, A), expected)
    assert_near(grad(f)(A), expected)
    assert_near(vjp(f, A)[1](torch.ones(()).double())[0], expected)
    assert_near(jacrev(f)(A), expected)
    assert_near(jacfwd(f)(A), expected)
    assert_near(jvp(f, (A,), (DIRECTION,))[1], expected @ DIRECTION)
    with forward_ad.dual_level():
        assert_near(forward_ad.unpack_dual(f(forward_ad.make_dual(A, DIRECTION))).tangent, expected @ DIRECTION)


@pytest.mark.product
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_second_derivatives_are_the_numeric_ones(make, training):
    f = along_two_directions(make, training)
    with torch.enable_grad():
        expected = torch.stack(
            [
                (gradient(f, A + STEP * axis) - gradient(f, A - STEP * axis)) / (2 * STEP)
                for axis in torch.eye(2).double()
            ]
        )
    assert expected.abs().min() > 1e-4
    assert_near(torch.autograd.functional.hessian(f, A), expected)
    assert_near(torch.autograd.functional.hvp(f, A, DIRECTION)[1], expected @ DIRECTION)
    assert_near(torch.autograd.functional.vhp(f, A, DIRECTION)[1], expected @ DIRECTION)
    assert_near(hessian(f)(A), expected)
    assert_near(jacrev(grad(f))(A), expected)
    assert_near(jvp(grad(f), (A,), (DIRECTION,))[1], expected @ DIRECTION)


@pytest.mark.parametrize("make", [unet, dit, vae, classifier])
def test_a_gradient_penalty_trains_every_parameter_as_its_numeric_gradient_says(make):
    """What is differentiated twice is in the inputs first and in the parameters then, with and without checkpointing."""
    model, shape, forward = randomised(make)
    x = draw(2, *shape)

    def penalty():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(forward(model, leaf).square().sum(), leaf, create_graph=True)[0].square().mean()

    parameters = [p for p in model.parameters() if p.requires_grad]
    directions = [draw(*p.shape) for p in parameters]

    def slope():
        grads = torch.autograd.grad(penalty(), parameters, allow_unused=True)
        pairs = zip(grads, directions, strict=True)
        return sum((g * d).sum() for g, d in pairs if g is not None).detach()

    def moved(by):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(direction, alpha=by)
        return penalty().detach()

    plain = slope()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(slope(), plain)
    step = 1e-6
    high, low = moved(step), moved(-2 * step)
    torch.testing.assert_close(plain, (high - low) / (2 * step), rtol=1e-4, atol=0)


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_vmap_gives_each_sample_s_gradient_of_the_parameters(make):
    model, shape, forward = randomised(make)
    x, parameters = draw(2, *shape), dict(model.named_parameters())

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = model

        def forward(self, x):
            return forward(self.network, x)

    whole = Whole()

    def loss(parameters, sample):
        return functional_call(whole, parameters, (sample[None],)).square().sum()

    named = {f"network.{name}": p.detach() for name, p in parameters.items()}
    got = vmap(grad(loss), in_dims=(None, 0))(named, x)
    for i, sample in enumerate(x):
        expected = torch.autograd.grad(
            forward(model, sample[None]).square().sum(), parameters.values(), allow_unused=True
        )
        for name, value in zip(parameters, expected, strict=True):
            assert_near(got[f"network.{name}"][i], torch.zeros_like(parameters[name]) if value is None else value)


@pytest.mark.product
@pytest.mark.parametrize("make", [unet, series_unet, dit, vae, classifier])  # the others have PyTorch's layers alone
@pytest.mark.parametrize("create_graph", [False, True])
def test_many_gradients_at_once_are_those_one_by_one(make, create_graph):
    model, shape, forward = randomised(make)
    x = draw(2, *shape).requires_grad_()
    y = forward(model, x)
    probes = draw(3, *y.shape)
    together = torch.autograd.grad(y, x, probes, retain_graph=True, is_grads_batched=True, create_graph=create_graph)[
        0
    ]
    for got, probe in zip(together, probes, strict=True):
        assert_near(got, torch.autograd.grad(y, x, probe, retain_graph=True)[0])


def test_the_layers_pass_the_numeric_checks_of_first_and_second_order():
    channels_last = torch.channels_last
    x, skip = (draw(2, n, 3, 2).contiguous(memory_format=channels_last).requires_grad_() for n in (4, 5))
    for samples in (1, 2):
        affine = [(draw(samples, 4) + n).requires_grad_() for n in (1, 0)]
        inputs = (x, *affine, 2)
        assert type(group_norm(*inputs).grad_fn).__name__ == "_GroupNormBackward"
        assert torch.autograd.gradcheck(group_norm, inputs, check_batched_grad=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(group_norm, inputs, check_batched_grad=True)
    assert torch.autograd.gradcheck(concatenate, (x, skip), check_batched_grad=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(concatenate, (x, skip), check_batched_grad=True)
    qkv = [draw(2, 1, n, 3).requires_grad_() for n in (4, 2, 2)]
    for mask in (None, draw(2, 1, 1, 2)):
        assert type(attention(*qkv, mask).grad_fn).__name__ == "_AttentionBackward"
        inputs = (*qkv, mask)
        assert torch.autograd.gradcheck(attention, inputs, check_batched_grad=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(attention, inputs, check_batched_grad=True)


def test_inputs_that_were_made_of_one_another_get_their_own_gradients():
    """Autograd for an input must not count the way through another input a second time."""
    x = draw(2, 4, 3, 2).contiguous(memory_format=torch.channels_last).requires_grad_()
    for f in (
        lambda x: attention(x, x, x.sin()),
        lambda x: group_norm(x, x.sin().mean((2, 3)), x.mean((2, 3)), 2),
        lambda x: concatenate(x, x.sin()),
    ):
        weights = draw(*f(x).shape)
        first = torch.autograd.grad(f(x), x, weights)[0]
        torch.testing.assert_close(torch.autograd.grad(f(x), x, weights, create_graph=True)[0], first)
        assert torch.autograd.gradgradcheck(f, (x,))


@pytest.mark.parametrize("make", [unet, dit, vae, classifier])
def test_second_derivatives_in_bfloat16_are_as_close_as_its_rounding(make):
    """bfloat16 has a backward pass of its own, and three digits."""
    model, shape, forward = randomised(make)
    x = draw(2, *shape).bfloat16()
    model = model.bfloat16()
    exact = copy.deepcopy(model).double()

    def penalty(network, x):
        leaf = x.clone().requires_grad_()
        first = torch.autograd.grad(forward(network, leaf).square().sum(), leaf, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), leaf)[0]

    got, expected = penalty(model, x).double(), penalty(exact, x.double())
    assert (got - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("make", [unet, dit, vae, classifier])
def test_torch_func_refuses_gradient_checkpointing(make):
    """By an error of PyTorch's, and not by another derivative."""
    model, shape, forward = randomised(make)
    model.enable_gradient_checkpointing()
    with pytest.raises(RuntimeError, match="saved tensor hooks"):
        grad(lambda x: forward(model, x).sum())(draw(2, *shape))
