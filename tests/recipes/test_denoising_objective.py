"""The loss of a batch, the timesteps it is drawn at, and the record it keeps."""

import csv
import warnings
from collections import defaultdict, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator, debug_launcher
from safetensors.torch import load_file, save_file

from diffusers_ext import DiTModel
from diffusers_ext.diffusion.betas import make_betas, rescale_zero_terminal_snr
from diffusers_ext.diffusion.losses import DEFAULT_WEIGHTINGS, bound_loss, denoising_loss
from diffusers_ext.diffusion.noising import PREDICTION_TYPES, NoiseSchedule, add_noise, predict_x0
from diffusers_ext.diffusion.paths import PATHS, PathSchedule
from diffusers_ext.diffusion.reverse_chain import ReverseChain
from diffusers_ext.recipes.denoising import DenoisingConfig
from diffusers_ext.recipes.denoising_objective import DenoisingObjective
from diffusers_ext.recipes.denoising_parts import build_objective
from diffusers_ext.recipes.training_path import build_scheduler
from diffusers_ext.schedulers.levels import model_schedule
from runs import forget_accelerate


def make_objective(num_timesteps=8, prediction_type="v_prediction", **settings):
    return DenoisingObjective(NoiseSchedule(make_betas("cosine", num_timesteps)), prediction_type, **settings)


def make_batch(seed, size=16):
    generator = torch.Generator().manual_seed(seed)
    images = 2 * torch.randint(256, (size, 1, 2, 3), generator=generator).float() / 255 - 1
    noise = torch.randn(size, 1, 2, 3, generator=generator)
    time = torch.rand(size, generator=generator, dtype=torch.float64)
    return {"images": images, "noise": noise, "time": time}


def model(sample, timesteps, class_labels=None):
    """Wrong everywhere, and by how much depends on the timestep."""
    return SimpleNamespace(sample=sample.sin() * (1 + timesteps.view(-1, 1, 1, 1)))


def learned_model(sample, timesteps, class_labels=None):
    return SimpleNamespace(sample=torch.cat([model(sample, timesteps).sample, sample.cos()], 1))


def sample_losses(objective, batch, timesteps, network=model):
    """Squared error and, with learned variance, bound of each sample, by the functions themselves."""
    x0, eps = batch["images"], batch["noise"]
    level = objective.schedule.level(timesteps, x0)
    x_t = add_noise(x0, eps, level)
    output = network(x_t, timesteps).sample
    error = denoising_loss(output[:, :1], x0, eps, level, objective.prediction_type, **objective.weights)
    if output.shape[1] == 1:
        return error, None
    chain = ReverseChain(objective.schedule)
    return error, bound_loss(output, x0, x_t, chain, timesteps, objective.prediction_type)


@pytest.mark.product
@pytest.mark.parametrize("objective", ["simple", "vlb", "hybrid"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "score"])
def test_loss_is_the_mean_of_what_its_name_says(objective, prediction_type):
    weighting = "uniform" if objective == "vlb" else "min_snr"
    loss_of = make_objective(
        prediction_type=prediction_type, objective=objective, weighting=weighting, vlb_weight=0.25
    )
    batch = make_batch(0)
    network = model if objective == "simple" else learned_model
    error, bound = sample_losses(loss_of, batch, (8 * batch["time"]).floor().long(), network)
    expected = {"simple": lambda: error, "vlb": lambda: bound, "hybrid": lambda: error + 0.25 * bound}[objective]()
    torch.testing.assert_close(loss_of(network, batch), expected.mean())


def test_only_the_hybrids_squared_error_trains_the_mean():
    batch, gradients = make_batch(0), {}
    for objective in ("simple", "hybrid"):
        output = learned_model(batch["images"], torch.arange(16)).sample.requires_grad_()
        given = output[:, :1] if objective == "simple" else output
        loss_of = make_objective(objective=objective)
        loss_of(lambda *_, given=given, **__: SimpleNamespace(sample=given), batch).backward()
        gradients[objective] = output.grad
    assert torch.equal(gradients["simple"][:, 0], gradients["hybrid"][:, 0])
    assert (gradients["hybrid"][:, 1] != 0).any() and (gradients["simple"][:, 1] == 0).all()


def losses_by_position(objective, batches, length, network=model):
    """The importance sampler as the paper has it, in plain Python: timesteps, probabilities and losses of each batch."""
    history = defaultdict(lambda: deque(maxlen=10))
    for batch in batches:
        time = batch["time"].numpy()
        if all(len(history[t]) == 10 for t in range(length)):
            root = np.array([np.sqrt(np.mean(np.square(history[t]))) for t in range(length)])
            probability = 0.999 * root / root.sum() + 0.001 / length
        else:
            probability = np.full(length, 1 / length)
        sums = np.cumsum(probability)
        timesteps = torch.tensor([int(np.sum(sums <= u * sums[-1])) for u in time])
        losses = sample_losses(objective, batch, timesteps, network)[0].numpy()
        for t, loss in zip(timesteps.tolist(), losses, strict=True):
            history[t].append(float(loss))
        yield timesteps, probability, losses


@pytest.mark.parametrize("size, length", [(16, 8), (64, 3)])
def test_importance_sampling_follows_the_last_ten_losses_of_each_timestep(size, length):
    """Also where a batch holds more than ten of a timestep."""
    objective = make_objective(length, importance_sampling=True)
    batches = [make_batch(seed, size) for seed in range(40)]
    uneven = 0
    for batch, (timesteps, probability, losses) in zip(
        batches, losses_by_position(objective, batches, length), strict=True
    ):
        torch.testing.assert_close(
            objective.timestep_sampler.probabilities(), torch.from_numpy(probability).float(), rtol=1e-5, atol=0
        )
        given, weight = objective.timestep_sampler(batch["time"])
        assert torch.equal(given, timesteps)
        expected = 1 / (length * probability[timesteps])
        np.testing.assert_allclose(weight.numpy(), expected, rtol=1e-5)
        assert objective(model, batch).item() == pytest.approx((losses * expected).mean(), rel=1e-5)
        uneven += probability.max() > 1.5 / length
    assert uneven > 10
    assert objective.timestep_sampler.loss_count.sum() == 40 * size


def warm_objective(length=8, **settings):
    objective = make_objective(length, importance_sampling=True, **settings)
    for seed in range(20):
        objective(model, make_batch(seed))
    assert objective.timestep_sampler.probabilities().std() > 0
    return objective


def test_importance_sampling_leaves_the_expected_loss_and_takes_away_its_variance():
    objective = warm_objective()
    per_timestep = objective.timestep_sampler.loss_history.square().mean(1).sqrt().double()
    time = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    timesteps, weight = objective.timestep_sampler(time)
    drawn = per_timestep[timesteps] * weight
    assert drawn.mean().item() == pytest.approx(per_timestep.mean().item(), rel=1e-3)
    # A loss that is known at each timestep would be estimated without variance, but for the share that stays uniform.
    assert drawn.std() < 0.02 * per_timestep.std()
    assert set(timesteps.tolist()) == set(range(8))


def test_logit_normal_times_have_their_density_and_stay_stratified():
    objective = make_objective(1000, logit_normal=(-0.5, 0.7))
    time = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    timesteps, weight = objective.timestep_sampler(time)
    assert (weight == 1).all() and timesteps.dtype == torch.int64 and (timesteps.diff() >= 0).all()
    # The share of times below each level is the normal distribution of its logit, without the noise of random times.
    logits = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64).logit()
    share = torch.stack([(timesteps < level).double().mean() for level in (50, 300, 500, 900)])
    expected = torch.distributions.Normal(-0.5, 0.7).cdf(logits)
    torch.testing.assert_close(share, expected, rtol=0, atol=1 / 4000 + 1e-9)
    assert objective.timestep_sampler(torch.tensor([0.0, 1 - 1e-17], dtype=torch.float64))[0].tolist() == [0, 999]
    objective.eval()
    assert torch.equal(objective.timestep_sampler(time)[0], (1000 * time).long())


@pytest.mark.parametrize("shift", [3.0, 0.5])
def test_shifted_times_have_their_density_and_stay_stratified(shift):
    """The odds of a time are multiplied by the shift, so that those of a share below a level are divided by it."""
    objective = make_objective(1000, timestep_shift=shift)
    time = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    timesteps, weight = objective.timestep_sampler(time)
    assert (weight == 1).all() and timesteps.dtype == torch.int64 and (timesteps.diff() >= 0).all()
    level = torch.tensor([0.05, 0.3, 0.5, 0.9], dtype=torch.float64)
    share = torch.stack([(timesteps < 1000 * one).double().mean() for one in level])
    torch.testing.assert_close(share, (level.logit() - np.log(shift)).sigmoid(), rtol=0, atol=1 / 4000 + 1e-9)
    assert objective.timestep_sampler(torch.tensor([0.0, 1 - 1e-17], dtype=torch.float64))[0].tolist() == [0, 999]
    objective.eval()
    assert torch.equal(objective.timestep_sampler(time)[0], (1000 * time).long())


@pytest.mark.parametrize("path", ["vp", "linear"])
@pytest.mark.parametrize(
    "options",
    [
        {"prediction_type": "sample", "loss_weighting": "velocity", "timestep_shift": 2.0},
        {"loss_weighting": "min_snr"},
        {"prediction_type": "sample", "loss_weighting": "min_snr", "timestep_sampling": "logit_normal"},
        {"loss_weighting": "velocity", "timestep_sampling": "logit_normal", "logit_mean": 0.8, "logit_std": 0.8},
    ],
)
def test_weightings_and_times_make_a_loss_on_either_path(path, options):
    """By the options of a run; the loss is the weighted error of x_0 at the times that the options ask for."""
    config = DenoisingConfig(path=path, num_train_timesteps=50, **options)
    scheduler = build_scheduler(config)
    objective, batch = build_objective(config, scheduler), make_batch(0)
    given = batch["time"]
    if "timestep_shift" in options:
        time = 2 * given / (1 + given)
    elif "timestep_sampling" in options:
        spread, mean = (0.8, 0.8) if "logit_std" in options else (1.0, 0.0)
        time = torch.distributions.Normal(mean, spread).icdf(given).sigmoid()
    else:
        time = given
    level = model_schedule(scheduler).level((50 * time).long(), batch["images"].double())
    x0, x_t = batch["images"].double(), level.alpha * batch["images"] + level.sigma * batch["noise"]
    seen = []

    def network(x, timesteps, class_labels=None):
        seen.append(x.double())
        return SimpleNamespace(sample=x.tanh())

    loss = objective(network, batch)
    torch.testing.assert_close(seen[0], x_t, rtol=0, atol=1e-5)
    x0_hat = predict_x0(x_t.tanh(), x_t, level, config.prediction_type)
    snr = level.snr.flatten()
    weight = (
        snr.clamp(max=5) if options["loss_weighting"] == "min_snr" else level.sigma.flatten().clamp(min=0.05) ** -2
    )
    expected = (weight * (x0 - x0_hat).square().flatten(1).mean(1)).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


def test_a_network_is_given_the_labels_of_its_path():
    seen = []

    def network(x, timesteps, class_labels=None):
        seen.append(timesteps)
        return SimpleNamespace(sample=x)

    batch = make_batch(0)
    for first in (0, 1):
        DenoisingObjective(PathSchedule(PATHS["linear"](), 10, first_label=first), "flow")(network, batch)
    timesteps = (10 * batch["time"]).long()
    assert torch.equal(seen[0], timesteps) and torch.equal(seen[1], timesteps + 1)


@pytest.mark.parametrize("name", PATHS)
def test_the_likelihood_loss_is_that_of_its_timesteps_on_every_path(name):
    schedule, batch = PathSchedule(PATHS[name](), 8), make_batch(0)
    timesteps = (8 * batch["time"]).long()
    level = schedule.level(timesteps, batch["images"])
    x_t = add_noise(batch["images"], batch["noise"], level)
    error = (predict_x0(x_t.cos(), x_t, level, "v_prediction") - batch["images"]).square().flatten(1).mean(1)
    snr = torch.cat([schedule.alpha[:-1] / schedule.sigma[:-1]]).square()
    weight = 4 * (snr[timesteps - 1] - snr[timesteps])
    loss_of = DenoisingObjective(schedule, "v_prediction", weighting="likelihood")
    output = loss_of.losses(x_t.cos(), batch["images"], batch["noise"], x_t, timesteps)[1]
    inner = timesteps > 0
    torch.testing.assert_close(output[inner].double(), (weight * error)[inner], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", PATHS)
def test_losses_that_cannot_learn_are_warned_of_on_every_path(name):
    """With the default weighting of each prediction type a model learns all levels."""
    schedule = PathSchedule(PATHS[name](), 1000, first_label=1)
    for prediction_type in PREDICTION_TYPES:
        if schedule.alpha[-2] == 0 and prediction_type in ("epsilon", "score"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            DenoisingObjective(schedule, prediction_type)
    if name == "ve":  # whose levels are even in log snr: it takes many more of them
        schedule = PathSchedule(PATHS["ve"](sigma_min=1e-9), 1000)
    # x_0 with the weight of the bound is learned at the cleanest levels alone.
    with pytest.warns(UserWarning, match="puts the loss on .* of the noise levels"):
        DenoisingObjective(schedule, "sample", weighting="likelihood")


def test_evaluation_is_uniform_and_leaves_no_trace():
    objective = warm_objective().eval()
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    batch = make_batch(100)
    timesteps = (8 * batch["time"]).floor().long()
    torch.testing.assert_close(objective(model, batch), sample_losses(objective, batch, timesteps)[0].mean())
    for name, value in objective.state_dict().items():
        assert torch.equal(value, before[name]), name
    objective.train()
    assert not torch.equal(objective.timestep_sampler(batch["time"])[0], timesteps)


def test_state_goes_through_a_file_bit_by_bit(tmp_path):
    first = warm_objective(objective="simple")
    first.metrics()
    first(model, make_batch(50))
    save_file(first.state_dict(), tmp_path / "objective.safetensors")
    second = make_objective(importance_sampling=True)
    second.load_state_dict(load_file(tmp_path / "objective.safetensors"))
    for seed in range(60, 65):
        assert torch.equal(first(model, make_batch(seed)), second(model, make_batch(seed)))
    assert first.metrics() == second.metrics() and first.loss_record.curve() == second.loss_record.curve()


def test_a_state_that_names_its_buffers_alone_is_loaded():
    """As checkpoints have them in which the objective was one module."""
    first, second = warm_objective(), make_objective(importance_sampling=True)
    short = {name.rpartition(".")[2]: value for name, value in first.state_dict().items()}
    assert short.keys() == {"recent_sums", "faded_sums", "loss_history", "loss_count"}
    second.load_state_dict(short)
    for name, value in second.state_dict().items():
        assert torch.equal(value, first.state_dict()[name]), name
    with pytest.raises(RuntimeError, match="Missing key.*timestep_sampler.loss_history"):
        second.load_state_dict({name: value for name, value in short.items() if name != "loss_history"})


@pytest.mark.parametrize("objective", ["simple", "hybrid"])
def test_metrics_are_the_means_by_quarter_since_the_last_report(objective):
    loss_of = make_objective(100, objective=objective, weighting="min_snr")
    network = model if objective == "simple" else learned_model
    for seed in range(3):
        loss_of(network, make_batch(seed))
    loss_of.metrics()
    batches = [make_batch(seed, 200) for seed in (7, 8)]
    for batch in batches:
        loss_of(network, batch)
    metrics = loss_of.metrics()

    times = torch.cat([batch["time"] for batch in batches])
    pairs = [sample_losses(loss_of, batch, (100 * batch["time"]).floor().long(), network) for batch in batches]
    error = torch.cat([pair[0] for pair in pairs])
    plain = make_objective(100)
    unweighted = torch.cat([sample_losses(plain, batch, (100 * batch["time"]).floor().long())[0] for batch in batches])
    loss = error
    if objective == "hybrid":
        bound = torch.cat([pair[1] for pair in pairs])
        loss = error + 1e-3 * bound
        assert metrics.pop("vlb_bits_per_dim") == pytest.approx(bound.mean().item() / np.log(2), rel=1e-4)
    expected = {}
    for quarter in range(4):
        here = (times * 4).floor() == quarter
        expected[f"loss_q{quarter + 1}"] = loss[here].mean().item()
        expected[f"error_q{quarter + 1}"] = unweighted[here].mean().item()
    assert metrics == pytest.approx(expected, rel=1e-4)
    assert loss_of.metrics() == {}


def test_curve_has_the_loss_of_each_interval_over_its_log_snr(tmp_path):
    objective = make_objective(100)
    batch = make_batch(0, 2000)
    objective(model, batch)
    assert list(objective.draw(tmp_path)) == ["loss_by_snr.png"]
    with (tmp_path / "loss_by_snr.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["first_timestep", "last_timestep", "log_snr", "error", "loss"]
    assert len(rows) == 40 and rows[0]["first_timestep"] == "0" and rows[-1]["last_timestep"] == "99"
    timesteps = (100 * batch["time"]).floor().long()
    losses = sample_losses(objective, batch, timesteps)[0]
    alpha_bar = torch.cumprod(1 - make_betas("cosine", 100), 0)
    for row in rows:
        first, last = int(row["first_timestep"]), int(row["last_timestep"])
        here = (timesteps >= first) & (timesteps <= last)
        assert float(row["loss"]) == float(row["error"]) == pytest.approx(losses[here].mean().item(), rel=1e-4)
        log_snr = (alpha_bar / (1 - alpha_bar))[first : last + 1].log().mean().item()
        assert float(row["log_snr"]) == pytest.approx(log_snr, rel=1e-6)
    assert (tmp_path / "loss_by_snr.png").read_bytes()[:4] == b"\x89PNG"


def test_curve_forgets_what_came_before_the_last_reports(tmp_path):
    objective = make_objective(1)
    for _ in range(3):
        objective(model, make_batch(0))
        objective.metrics()
    before = objective.loss_record.curve()[0]["loss"]
    for _ in range(60):
        objective(lambda sample, *_, **__: SimpleNamespace(sample=0 * sample), make_batch(1))
        objective.metrics()
    blank = sample_losses(
        objective, make_batch(1), torch.zeros(16, dtype=torch.int64), lambda x, _: SimpleNamespace(sample=0 * x)
    )
    assert objective.loss_record.curve()[0]["loss"] == pytest.approx(blank[0].mean().item(), rel=0.02) != before


def test_a_curve_of_nothing_is_not_drawn_and_zero_snr_has_no_place_on_it(tmp_path):
    objective = make_objective()
    assert objective.draw(tmp_path) == {} and not list(tmp_path.iterdir()) and objective.metrics() == {}
    schedule = NoiseSchedule(rescale_zero_terminal_snr(make_betas("linear", 8)))
    objective = DenoisingObjective(schedule, "v_prediction", objective="vlb")
    loss = objective(learned_model, make_batch(0, 100))
    assert torch.isfinite(loss)
    assert [row["last_timestep"] for row in objective.loss_record.curve()] == list(range(7))
    objective.draw(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def train_on_a_part_of_each_batch(folder):
    """What each of several processes does; leaves its states in the folder."""
    forget_accelerate()  # of the process that this one was forked from
    accelerator = Accelerator(cpu=True)
    rank, number = accelerator.process_index, accelerator.num_processes
    for importance_sampling in (True, False):
        settings = {"objective": "hybrid", "importance_sampling": importance_sampling}
        objective = make_objective(**settings, accelerator=accelerator)
        for seed in range(30):
            part = slice(rank * 16 // number, (rank + 1) * 16 // number)
            objective(learned_model, {name: value[part] for name, value in make_batch(seed).items()})
            if not importance_sampling and seed == 20:  # as at a checkpoint, from which the run goes on
                objective.collect()
                state = {name: value.clone() for name, value in objective.state_dict().items()}
                objective = make_objective(**settings, accelerator=accelerator)
                objective.load_state_dict(state)
        if not importance_sampling:
            objective.collect()
        save_file(objective.state_dict(), folder / f"{importance_sampling}-{rank}-of-{number}.safetensors")


def test_two_processes_keep_the_state_of_one(tmp_path):
    """With importance sampling after each step; without it whenever they are collected, over a resume too."""
    debug_launcher(train_on_a_part_of_each_batch, args=(tmp_path,), num_processes=2)
    for importance_sampling in (True, False):
        paths = [tmp_path / f"{importance_sampling}-{rank}-of-2.safetensors" for rank in range(2)]
        first, second = map(load_file, paths)
        alone = make_objective(objective="hybrid", importance_sampling=importance_sampling)
        for seed in range(30):
            alone(learned_model, make_batch(seed))
        assert not importance_sampling or alone.timestep_sampler.probabilities().std() > 0
        assert first.keys() == alone.state_dict().keys() and alone.loss_record.recent_sums[:, 0].sum() > 0
        for name, value in alone.state_dict().items():
            assert torch.equal(first[name], second[name]), name
            torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"objective": "elbo"}, "objective must be one of simple, vlb, hybrid, got 'elbo'"),
        ({"weighting": "snr"}, "loss_weighting must be one of uniform, .*, got 'snr'"),
        (
            {"objective": "vlb", "weighting": "p2"},
            "vlb is the bound itself, which no loss_weighting changes, got 'p2'",
        ),
        ({"objective": "hybrid", "vlb_weight": 0.0}, "vlb_weight must be positive, got 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_objective(**settings)


def test_a_model_with_the_wrong_channels_is_refused():
    with pytest.raises(ValueError, match=r"hybrid needs a model whose output has twice the channels of its input"):
        make_objective(objective="hybrid")(model, make_batch(0))
    with pytest.raises(ValueError, match=r"simple needs a model whose output has the channels of its input"):
        make_objective()(learned_model, make_batch(0))


def test_a_weighting_that_trains_few_levels_is_warned_of_and_is_nobodys_default():
    schedule = NoiseSchedule(make_betas("linear", 1000))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        defaults = {name: DenoisingObjective(schedule, name).weights["weighting"] for name in PREDICTION_TYPES}
    assert defaults == DEFAULT_WEIGHTINGS
    with pytest.warns(
        UserWarning, match="uniform with prediction_type score puts the loss on 0.7% .* score is simple"
    ):
        DenoisingObjective(schedule, "score", weighting="uniform")


def with_middle_layer(sample, timesteps, class_labels=None):
    return SimpleNamespace(sample=model(sample, timesteps).sample, internal_sample=sample.cos())


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_the_middle_layers_loss_is_added_in_training_and_not_recorded(weighting):
    batch, weight = make_batch(0), 0.3
    of_output, of_middle = (make_objective(weighting=weighting) for _ in range(2))
    both = make_objective(weighting=weighting, internal_weight=weight)
    loss = both(with_middle_layer, batch)
    middle = of_middle(lambda sample, *args, **kwargs: SimpleNamespace(sample=sample.cos()), batch)
    torch.testing.assert_close(loss, of_output(model, batch) + weight * middle)
    assert both.metrics() == of_output.metrics()
    both.eval()
    assert torch.equal(both(with_middle_layer, batch), of_output.eval()(model, batch))


def test_a_middle_layer_of_weight_0_trains_what_a_network_without_one_does():
    """To the bit, and its own parameters get a gradient of zero, which distributed training waits for."""
    networks = []
    for layer in (None, 1):
        torch.manual_seed(0)
        network = DiTModel(
            (2, 4), 1, 1, hidden_size=8, num_layers=2, num_attention_heads=2, internal_guidance_layer=layer
        )
        generator = torch.Generator().manual_seed(1)
        for name, parameter in network.named_parameters():
            if "internal" not in name:
                parameter.data.normal_(std=0.2, generator=generator)
        networks.append(network)
    batch = make_batch(0) | {name: torch.randn(16, 1, 2, 4) for name in ("images", "noise")}
    losses = [
        make_objective(internal_weight=weight)(network, batch)
        for network, weight in zip(networks, (None, 0.0), strict=True)
    ]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    plain, other = (dict(network.named_parameters()) for network in networks)
    assert all(torch.equal(other[name].grad, parameter.grad) for name, parameter in plain.items())
    assert all(not p.grad.any() for name, p in other.items() if "internal" in name)
    make_objective(internal_weight=0.5)(networks[1], batch).backward()
    assert other["internal_patch_out.weight"].grad.any()


def test_a_middle_layers_weight_that_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="internal_guidance_loss_weight must be finite and at least 0, got -1"):
        make_objective(internal_weight=-1.0)
    with pytest.raises(ValueError, match="needs a model with an output in a middle layer"):
        make_objective(internal_weight=0.5)(model, make_batch(0))


@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "simple"},
        {"weighting": "simple", "importance_sampling": True},
        {"weighting": "likelihood"},
        {"objective": "vlb"},
        {"objective": "hybrid"},
    ],
)
def test_a_path_whose_first_level_has_no_noise_is_refused_where_the_loss_divides_by_it(options):
    schedule = NoiseSchedule(make_betas("linear", 50, beta_start=0.0))
    with pytest.raises(
        ValueError, match=r"(must have a weight|needs noise) at each .*level.* at timestep 0.*first beta"
    ):
        DenoisingObjective(schedule, "epsilon", **options)
    DenoisingObjective(schedule, "epsilon")  # by its default every error of eps counts the same, there too
