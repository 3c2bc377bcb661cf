"""The parts of a calibration, each against an answer that is known by another road."""

import dataclasses
import itertools
import math
import re
from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from diffusers_ext import (
    ExtDDIMScheduler,
    ExtDDPMScheduler,
    FlowScheduler,
    GuidedDiffusionPipeline,
    TextGuidedDiffusionPipeline,
    UNetModel,
)
from diffusers_ext.calibration import averages, guidance, run, steps, timesteps, variance
from diffusers_ext.calibration import budget as budget_module
from diffusers_ext.calibration import report as reports
from diffusers_ext.calibration.budget import Budget, budget_of_training
from diffusers_ext.calibration.data import Data
from diffusers_ext.calibration.examples import Examples, Parts
from diffusers_ext.calibration.guidance import Guidance, Trials, images_that_fit, search
from diffusers_ext.calibration.run import calibrate
from diffusers_ext.calibration.steps import Stepping
from diffusers_ext.calibration.subject import Subject, own_scheduler
from diffusers_ext.diffusion.analytic_variance import VISIBLE_NOISE
from diffusers_ext.evaluation.labelled_images import LabelledImages
from diffusers_ext.evaluation.real_images import Captions, RealImages
from diffusers_ext.guidance.guiding import guided_steps
from diffusers_ext.machine import process_state
from diffusers_ext.metrics.features import FeatureClassifierModel
from diffusers_ext.schedulers.scheduling_ddim import ExtDDIMScheduler as Sampler
from diffusers_ext.trainer.ema import WeightAverage
from diffusers_ext.trainer.posthoc_ema import AverageSnapshots
from gaussian_oracle import model_output
from mixture_oracle import MixtureDenoiser
from processes import in_ranks
from tiny import tiny_unet
from tiny_text import tiny_clip, tiny_stable_diffusion, tiny_text_unet, tiny_tokenizer


FOREVER, NEVER = Budget(1e9), Budget(0)


class GaussianDenoiser(UNetModel):
    """The exact network of independent normal pixels of the variance of `gaussian_oracle`."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return (model_output(self.scheduler.schedule, "epsilon", sample, timestep),)


def gaussian_subject(**config):
    scheduler = ExtDDIMScheduler(timestep_spacing="trailing", clip_sample=False, **config)
    model = GaussianDenoiser(8, 1, 1, block_out_channels=(4,), layers_per_block=1)
    model.scheduler = scheduler
    return Subject.of(GuidedDiffusionPipeline(model, scheduler), 10)


def gaussian_images(number=64, std=0.5):
    generator = torch.Generator().manual_seed(0)
    pixels = (torch.randn(number, 1, 8, 8, generator=generator) * std).clamp(-1, 1)
    return LabelledImages(((pixels + 1) * 127.5).round().to(torch.uint8), torch.full([number], -1), [])


def mixture_subject(scheduler=None):
    scheduler = scheduler or ExtDDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    pipe = GuidedDiffusionPipeline(MixtureDenoiser.make(scheduler), scheduler)
    return Subject.of(pipe, 5)


def test_the_table_is_the_variance_of_x0_given_x_t():
    images = gaussian_images()
    train, subject = Examples(images), gaussian_subject()
    prediction = variance.measure(subject, train, FOREVER, seed=0)
    level = subject.pipe.scheduler.schedule.level(prediction.grid, torch.zeros(1, dtype=torch.float64))
    # Of the images as they are, cut at the ends of the range: their own variance under the same linear denoiser.
    own = ((images.images.double() / 127.5 - 1) ** 2).mean()
    gain = 0.25 * level.alpha / (0.25 * level.alpha**2 + level.sigma**2)
    expected = (1 - level.alpha * gain) ** 2 * own + gain**2 * level.sigma**2
    torch.testing.assert_close(prediction.x0_variance, expected, rtol=0.06, atol=0)
    table = prediction.table(VISIBLE_NOISE)
    assert table["timesteps"] == sorted(table["timesteps"]) and len(str(table)) < 2000 and table["last_noise"] > 0
    assert prediction.num_images == 64 and variance.measure(subject, train, NEVER, seed=0).num_images == variance.BATCH


def test_lists_by_the_bound_cost_no_more_than_the_spacing():
    subject = gaussian_subject()
    prediction = variance.measure(subject, Examples(gaussian_images()), NEVER, seed=0)
    lists, bits = variance.lists_by_bound(subject, prediction, [1, 2, 5, 10, 50])
    for number, timesteps_ in lists.items():
        assert len(timesteps_) == number and timesteps_ == sorted(timesteps_, reverse=True)
        assert bits[number]["chosen"] <= bits[number]["spacing"] + 2e-3  # the table is interpolated for the spacing
    assert bits[1]["chosen"] + 0.05 > bits[5]["chosen"] > bits[50]["chosen"] - 0.05  # each has noise of its own


@pytest.mark.parametrize("prediction_type", [None, "flow", "epsilon"])
def test_chosen_timesteps_end_nearer_to_a_fine_trajectory_than_the_spacing(prediction_type):
    linear = (
        None
        if prediction_type is None
        else FlowScheduler(timestep_spacing="trailing", prediction_type=prediction_type)
    )
    subject = mixture_subject(linear)
    teacher = timesteps.Teacher.make(subject, 32, {"guidance_scale": 2.0}, seed=0)
    lists, distances = timesteps.choose(teacher, [5, 3, 10], FOREVER)
    assert list(lists) == [3, 5, 10]
    for number, pair in distances.items():
        assert pair["chosen"] < 0.7 * pair["spacing"]
        assert teacher.distance(lists[number]) == pytest.approx(pair["chosen"])
    # From other noise too, when the scheduler has them.
    noise = torch.randn(64, 2, 1, generator=torch.Generator().manual_seed(1))
    call = {"class_labels": [0, 1] * 32, "guidance_scale": 2.0, "latents": noise, "output_type": "latent"}
    fine = subject.pipe(**call, num_inference_steps=200).images
    before = subject.pipe(**call, num_inference_steps=5).images
    subject.choose(
        optimal_timesteps={"spacing": "trailing", "trajectory": {str(n): each for n, each in lists.items()}},
        timestep_spacing="optimal",
    )
    after = subject.pipe(**call, num_inference_steps=5).images
    assert (after - fine).square().mean() < 0.6 * (before - fine).square().mean()
    both, looked_at = timesteps.choose(teacher, [4, 7], NEVER)
    assert list(looked_at) == [4] and list(both) == [4, 7]
    assert teacher.distance(both[7]) < 0.7 * teacher.distance(subject.own_timesteps(7))


def test_a_step_of_the_pipelines_default_does_not_slip_into_the_teacher():
    """Without guidance of its own a trajectory has none, whatever the pipeline does by default."""
    subject = mixture_subject()
    plain = timesteps.Teacher.make(subject, 2, {}, seed=0)
    subject.pipe.register_to_config(call_defaults={"guidance_scale": 5.0})
    assert torch.equal(timesteps.Teacher.make(subject, 2, {}, seed=0).ends, plain.ends)


def test_steps_are_those_of_least_distance_where_that_is_clear_and_images_were_compared():
    every, two = steps.candidates([9, 4], [9, 3], has_orders=True), steps.candidates([9, 4], [9, 4], has_orders=True)
    assert every[0] == Stepping(1, "spacing") and len(set(every)) == 4
    assert two == [Stepping(1), Stepping(2)]
    assert steps.candidates([9, 4], [9, 3], has_orders=False) == [Stepping(1), Stepping(1, "trajectory")]

    def choose(least, among, budget=FOREVER):
        distances = dict(zip(among, (4.0, *least), strict=True))
        return steps.choose(lambda each: {"frechet_distance": distances[each]}, among, budget)

    best, tried = choose([3.9, 3.5, 3.6], every)
    assert best == Stepping(2, "trajectory")
    assert tried[0] == {"order": 1, "timesteps": "spacing", "frechet_distance": 4.0} and len(tried) == 4
    assert choose([3.9], two)[0] == Stepping(1)  # by less than 3 %
    assert choose([3.8], two)[0] == Stepping(2)
    assert choose([3.0], two, NEVER) == (Stepping(), [])  # what was not compared is not chosen


def test_processes_decide_by_the_clock_of_the_first(monkeypatch):
    def work():
        clock = itertools.count(0, 1 + 1000 * process_state().process_index)
        monkeypatch.setattr(budget_module, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
        trials = Trials(bowl(Guidance(3.0)), Budget(20))
        print(f"{search(trials)} of {len(trials.tried)} guidances")

    first, second = re.findall(r"Guidance.* of (\d+) guidances", in_ranks(work))
    assert first == second and 1 < int(first) < 12


def bowl(best, depth=1.0):
    """A distance that is least at `best`."""

    def measure(each):
        away = (
            (math.log(each.scale / best.scale) * 2) ** 2
            + (each.start - best.start) ** 2
            + (each.stop - best.stop) ** 2
        )
        none = 0.0 if each.scale > 1 else 1.0
        return {"frechet_distance": 2.0 - depth + depth * min(away + none, 1.0)}

    return measure


@pytest.mark.parametrize("best", [Guidance(2.0, 0.3, 0.7), Guidance(5.0, 0.2, 0.6), Guidance(1.3, 0.0, 1.0)])
def test_the_search_ends_near_the_least_distance(best):
    found = search(Trials(bowl(best), FOREVER))
    assert abs(math.log(found.scale / best.scale)) < 0.2
    assert abs(found.start - best.start) <= 0.11 and abs(found.stop - best.stop) <= 0.11


def test_the_search_guides_only_where_that_gains_and_stops_when_the_time_is_over():
    assert search(Trials(bowl(Guidance(3.0), depth=0.02), FOREVER)) == Guidance()
    worse = Trials(lambda each: {"frechet_distance": each.scale}, FOREVER)
    assert search(worse) == Guidance() and any(1 < each.scale < 1.5 for each in worse.tried)
    trials = Trials(bowl(Guidance(3.0)), NEVER)
    assert search(trials) == Guidance() or len(trials.tried) == 1
    assert trials.records()[0] == {"scale": 1.0, "start": 0.0, "stop": 1.0, "frechet_distance": pytest.approx(2.0)}


@pytest.mark.parametrize(("start", "stop"), [(0.0, 0.8), (0.2, 1.0), (0.25, 0.5), (0.0, 1.0)])
@pytest.mark.parametrize("number", [4, 10, 50])
def test_the_saved_interval_holds_the_same_steps(start, stop, number):
    scheduler = Sampler(timestep_spacing="trailing")
    scheduler.set_timesteps(number)
    call = Guidance(2.0, start, stop).call(scheduler.timesteps.tolist())
    expected = guided_steps((start, stop), scheduler, scheduler.timesteps)
    assert guided_steps(call.get("guidance_interval"), scheduler, scheduler.timesteps) == expected
    assert Guidance().call(scheduler.timesteps.tolist()) == {"guidance_scale": 1.0}


def real_images(held_out=None):
    images, labels = torch.arange(40, dtype=torch.uint8).view(40, 1, 1, 1).expand(-1, 1, 8, 8), torch.arange(40) % 2
    return RealImages(LabelledImages(images, labels, ["a", "b"]), held_out, "data", "crop", ())


def test_few_steps_keep_the_timesteps_near_the_trajectory_as_far_as_they_are_nearer():
    looked_at = []

    def measure(number, kind):
        looked_at.append((number, kind))
        return {4: 1.0, 3: 1.5, 2: 2.0}[number] + {4: -0.1, 3: 0.0, 2: 0.1}[number] * (kind == "trajectory")

    least, tried = steps.fewest_by_trajectory(measure, [10, 4, 3, 2], FOREVER)
    assert least == 3 and tried[-1] == {"num_inference_steps": 2, "spacing": 2.0, "trajectory": 2.1}
    worse = steps.fewest_by_trajectory(lambda number, kind: float(kind == "trajectory"), [10, 4, 3, 2], FOREVER)
    assert worse == (10, [{"num_inference_steps": 4, "spacing": 0.0, "trajectory": 1.0}])
    looked_at.clear()
    assert steps.fewest_by_trajectory(measure, [10, 4, 3, 2], NEVER) == (10, []) and not looked_at


def test_below_the_fewest_steps_a_pipeline_visits_its_own_timesteps(monkeypatch):
    """What a calibration says of few steps is what its pipeline does in them."""
    by_trajectory = steps.Stepping(1, "trajectory")
    monkeypatch.setattr(steps, "choose", lambda measure, those, budget: (by_trajectory, [{"frechet_distance": 1.0}]))
    monkeypatch.setattr(steps, "fewest_by_trajectory", lambda measure, numbers, budget: (4, []))
    subject, features = labelled_subject(), FeatureClassifierModel(8, 1, 2, (8, 16), label_names=["a", "b"])
    subject.num_steps = 5
    found = calibrate(subject, Data(real_images(), None, features), 0.01)
    assert found["steps"]["fewest_by_trajectory"] == 4
    plain = ExtDDIMScheduler.from_config(subject.pipe.scheduler.config, optimal_timesteps=None)
    chosen = subject.pipe.scheduler.config.optimal_timesteps["trajectory"]
    for number in (2, 3):
        assert chosen[str(number)] == plain.list_timesteps(number).tolist()


def labelled_subject():
    torch.manual_seed(0)
    scheduler = ExtDDIMScheduler(timestep_spacing="trailing")
    return Subject.of(GuidedDiffusionPipeline(tiny_unet(num_classes=2), scheduler), 2)


def test_what_keeps_to_its_time_leaves_out_what_takes_longer(tmp_path):
    torch.manual_seed(0)
    features = FeatureClassifierModel(8, 1, 2, (8, 16), label_names=["a", "b"])
    data = Data(real_images(), None, features)
    assert timesteps.images_that_fit(labelled_subject(), {}, NEVER) == 4
    assert timesteps.images_that_fit(labelled_subject(), {}, FOREVER) == 32
    hasty = calibrate(labelled_subject(), data, 0.01, keeps_time=True)
    assert hasty["left_out"][0].startswith("Nothing was chosen by images, of which 4 sets of 200 in 2 steps take")
    assert not reports.draw(hasty | {"distance_from_fine_trajectory": {"2": {}}}, tmp_path / "nothing.png")
    assert "guidance" not in hasty and "gained" not in hasty and "2" in hasty["distance_from_fine_trajectory"]


def test_in_a_hurry_images_are_compared_in_few_steps(monkeypatch, tmp_path):
    """A step of an image takes 10 ms by this clock: 100 sets of 8 in 50 steps take 400 s, and in 10 steps 80 s."""
    torch.manual_seed(0)
    features = FeatureClassifierModel(8, 1, 2, (8, 16), label_names=["a", "b"])
    for name in ("FEWEST_IMAGES", "MOST_IMAGES", "TIMED_IMAGES"):
        monkeypatch.setattr(guidance, name, 8)
    monkeypatch.setattr(run, "LEAST_SETS", 100)
    now = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: now[0])
    monkeypatch.setattr(budget_module, "time", clock)
    monkeypatch.setattr(run, "time", clock)
    images = guidance.Ruler.images

    def slow(ruler, each, timesteps_, steps_=None, number=None):
        number, given = number or ruler.num_images, {"timesteps": timesteps_} if steps_ is None else dict(steps_)
        now[0] += 0.01 * number * (given.get("num_inference_steps") or len(given["timesteps"]))
        return images(ruler, each, timesteps_, steps_, number)

    monkeypatch.setattr(guidance.Ruler, "images", slow)
    subject = labelled_subject()
    subject.num_steps = 50
    found = calibrate(subject, Data(real_images(), None, features), 200, keeps_time=True)
    assert found["guidance"]["num_inference_steps"] == 10 == found["steps"]["num_inference_steps"]
    assert [row["num_inference_steps"] for row in found["gained"]] == [10]
    assert found["call_defaults"]["num_inference_steps"] == 50 and "in 10 steps" in " ".join(reports.describe(found))
    assert reports.draw(found, tmp_path / "calibration.png")
    patient = calibrate(subject, Data(real_images(), None, features), 10_000, keeps_time=True)
    assert patient["guidance"]["num_inference_steps"] == 50
    assert [row["num_inference_steps"] for row in patient["gained"]] == [50, 10]


@pytest.mark.parametrize("length", [2, 20, 40])
def test_a_chain_that_is_shorter_than_the_fine_trajectory_is_calibrated(length):
    scheduler = ExtDDIMScheduler(
        num_train_timesteps=length, beta_reference_timesteps=1000, timestep_spacing="trailing"
    )
    subject = Subject.of(GuidedDiffusionPipeline(tiny_unet(num_classes=2), scheduler), 2)
    assert timesteps.images_that_fit(subject, {}, FOREVER) == 32
    found = calibrate(subject, Data(real_images(), None, None), 0.01, keeps_time=True)
    assert found["distance_from_fine_trajectory"]


@pytest.mark.parametrize("num_steps", [1, 10, 100])
def test_timesteps_that_nothing_compared_are_not_visited(num_steps, monkeypatch):
    """In any number of steps: in one, both kinds are the same, and beyond the grid of the search there is no list."""
    torch.manual_seed(0)
    plain = ExtDDIMScheduler(timestep_spacing="trailing")
    subject = Subject.of(GuidedDiffusionPipeline(tiny_unet(), plain), num_steps)
    found = {1: [999], 4: [999, 600, 300, 100], 10: plain.list_timesteps(10).tolist()}
    monkeypatch.setattr(timesteps, "choose", lambda teacher, numbers, budget: (found, {}))
    calibrate(subject, Data(real_images(), None, None), 0.01)
    chosen = subject.pipe.scheduler.config.optimal_timesteps["trajectory"]
    for number in {num_steps, *map(int, chosen)}:
        expected = plain.list_timesteps(number).tolist()
        assert subject.pipe.scheduler.list_timesteps(number).tolist() == expected


def test_the_variance_is_that_of_the_weights_that_were_chosen(monkeypatch, tmp_path):
    torch.manual_seed(0)
    subject = labelled_subject()
    features = FeatureClassifierModel(8, 1, 2, (8, 16), label_names=["a", "b"])

    def others(parts, run, measure, budget):
        """A width whose weights predict nothing."""
        for parameter in parts["denoiser"].parameters():
            parameter.data.zero_()
        return 0.1, []

    monkeypatch.setattr(averages, "choose_width", others)
    found = calibrate(subject, Data(real_images(), None, features), 0.01, run=tmp_path)
    of_others = labelled_subject()
    others(of_others.pipe.components, None, None, None)
    expected = calibrate(of_others, Data(real_images(), None, None), 0.01)
    assert found["averages"]["chosen"] == 0.1
    assert found["analytic_variance"]["x0_variance"] == expected["analytic_variance"]["x0_variance"]


def test_a_test_split_is_no_part_of_the_choice_nor_of_the_report():
    other = LabelledImages(
        torch.full((9, 1, 8, 8), 200, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64), ["a", "b"]
    )
    parts = Parts.of(real_images(other), "test", seed=0)
    chosen, reported = (set(part.images.images[:, 0, 0, 0].tolist()) for part in (parts.choose, parts.report))
    assert not chosen & reported and chosen | reported == set(range(40))
    assert not parts.held_out
    for name in ("validation", "train[90%:]"):
        parts = Parts.of(real_images(other), name, seed=0)
        assert len(parts.choose) == 9 and len(parts.report) == 40 and parts.held_out


def distance_from_average(network, folder):
    """Walks about with the network, takes snapshots of its averages, and measures how far it is from that of width 0.07."""
    snapshots, wanted = AverageSnapshots(network, (0.05, 0.1), folder), WeightAverage(network, std=0.07)
    for step in range(1, 201):
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += 0.1 * torch.randn(parameter.shape) + 0.05
        snapshots.update(network)
        wanted.update(network)
        if step % 20 == 0:
            snapshots.write(step)
    target = wanted.averages()
    return lambda: sum((p - target[name]).square().sum().item() for name, p in network.named_parameters())


def test_the_width_of_the_average_with_the_least_distance_stays(tmp_path):
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    measure = distance_from_average(network, tmp_path)
    saved = {name: parameter.clone() for name, parameter in network.named_parameters()}
    width, tried = averages.choose_width({"denoiser": network}, tmp_path, measure, FOREVER)
    assert width == 0.07 and measure() < 1e-2 * tried[0]["frechet_distance"] and len(tried) > 3
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(saved[name])
    width, tried = averages.choose_width({"denoiser": network}, tmp_path, lambda: 1.0, FOREVER)
    assert width is None and all(torch.equal(parameter, saved[name]) for name, parameter in network.named_parameters())
    assert averages.choose_width({"denoiser": nn.Linear(2, 2)}, tmp_path, lambda: 1.0, FOREVER) == (None, [])
    assert averages.choose_width({"denoiser": network}, tmp_path / "none", lambda: 1.0, FOREVER) == (None, [])


def test_pipelines_of_diffusers_get_a_scheduler_that_takes_the_place_of_their_own():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"))
    subject = Subject.of(pipe, 5)
    assert (
        isinstance(subject.pipe.scheduler, ExtDDPMScheduler) and not subject.keeps_defaults and not subject.can_guide
    )
    subject.choose(analytic_variance={"timesteps": [0, 999], "x0_variance": [0.01, 0.2]}, variance_type="analytic")
    assert pipe.scheduler.config.variance_type == "analytic"
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"


def test_a_pipeline_of_diffusers_on_the_linear_path_gets_the_flow_scheduler():
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    pipe = diffusers.DDPMPipeline(unet, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    subject = Subject.of(pipe, 5)
    assert isinstance(subject.pipe.scheduler, FlowScheduler) and not subject.has_betas
    pipe.scheduler.set_timesteps(5)
    assert subject.own_timesteps(5) == pipe.scheduler.timesteps.round().int().tolist()
    for key in ("invert_sigmas", "use_dynamic_shifting"):
        with pytest.raises(ValueError, match=f"from timestep T to 0 and know its shift by itself.*{key}=True"):
            own_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(**{key: True}))


def text_pipeline(**config):
    tokenizer = tiny_tokenizer()
    parts = {"tokenizer": tokenizer, "text_encoder": tiny_clip(tokenizer)}
    pipe = TextGuidedDiffusionPipeline(tiny_text_unet(**config), ExtDDIMScheduler(clip_sample=False), **parts)
    return pipe


def coloured_examples(number=6):
    pixels = torch.randint(256, (number, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = LabelledImages(pixels, torch.full([number], -1), [])
    return Examples(images, ("red dot", "blue bar", "white edge", "green dot", "", "a")[:number])


def test_the_network_of_a_pipeline_of_texts_sees_the_text_of_each_image():
    pipe, examples = text_pipeline(), coloured_examples()
    subject = Subject.of(pipe, 5)
    assert subject.of_texts and subject.needs_examples and subject.can_guide and subject.default_scale == 4.0
    x0, condition = subject.clean_samples(examples)
    torch.testing.assert_close(x0, examples.images.images / 127.5 - 1)
    t = torch.full((len(x0),), 500)
    got = subject.network(condition, len(x0))(x0, t)
    embeds = pipe.encode_prompt(list(examples.captions))
    expected = pipe.denoiser(x0, t, encoder_hidden_states=embeds.states, encoder_attention_mask=embeds.mask).sample
    torch.testing.assert_close(got, expected)
    drawn = examples.draw(8, seed=1)
    assert subject.ask_in_turn(8, examples, seed=1) == {"prompts": list(drawn.captions)}
    assert sorted(drawn.captions[:6]) == sorted(examples.captions) and drawn.captions[6:] == drawn.captions[:2]


def test_stable_diffusion_is_measured_as_its_calls_are_and_gets_a_scheduler_that_swaps_in():
    pipe = tiny_stable_diffusion(diffusers.DDIMScheduler(clip_sample=False))
    subject = Subject.of(pipe, 4)
    assert subject.default_scale == 7.5 and not subject.keeps_defaults
    x0, condition = subject.clean_samples(coloured_examples(3))
    t = torch.full((3,), 300)
    ids = pipe.tokenizer(["red dot", "blue bar", "white edge"], padding="max_length", return_tensors="pt").input_ids
    expected = pipe.unet(x0, t, encoder_hidden_states=pipe.text_encoder(ids)[0]).sample
    torch.testing.assert_close(subject.network(condition, 3)(x0, t), expected, atol=1e-5, rtol=1e-5)
    found = calibrate(subject, Data(coloured_real_images(), None, None), 0.01)
    assert "call_defaults" not in found and pipe.scheduler is subject.pipe.scheduler
    assert pipe.scheduler.config.variance_type == "analytic" and isinstance(pipe.scheduler, ExtDDIMScheduler)
    pipe.set_progress_bar_config(disable=True)
    assert torch.isfinite(pipe("red dot", num_inference_steps=2, output_type="pt").images).all()


def coloured_real_images():
    examples = coloured_examples()
    texts = Captions(examples.captions, None, "text", "train")
    return RealImages(examples.images, None, "data", "crop", (), train_captions=texts)


def test_texts_are_guided_as_by_default_unless_another_scale_is_better():
    pipe = text_pipeline()
    worse = Trials(lambda each: {"frechet_distance": 1.0 if each.scale == 4 else 0.99}, FOREVER)
    assert search(worse, Guidance(4.0)) == Guidance(4.0)
    assert search(Trials(bowl(Guidance(1.5)), FOREVER), Guidance(4.0)).scale == pytest.approx(1.5, rel=0.2)
    torch.manual_seed(0)
    features = FeatureClassifierModel(8, 3, 2, (8, 16))
    seen = Data(enough(coloured_real_images()), None, features)
    found = calibrate(Subject.of(pipe, 2), seen, 0.01)
    assert "guidance" not in found and pipe.config.call_defaults == {"num_inference_steps": 2}
    assert any("that the network was trained on need less of it" in line for line in found["left_out"])
    real = dataclasses.replace(seen.real, held_out=seen.real.train, held_out_captions=seen.real.train_captions)
    found = calibrate(Subject.of(pipe, 2), Data(real, "validation", features), 0.01)
    assert found["guidance"]["default"] == 4.0 and found["guidance"]["tried"][0]["scale"] == 4.0
    scale = found["guidance"]["chosen"]["scale"]
    assert pipe.config.call_defaults.get("guidance_scale", 4.0) == scale
    # Features without labels see too little of what guidance gives.
    blind = calibrate(Subject.of(pipe, 2), Data(real, "validation", FeatureClassifierModel(8, 3, None, (8, 16))), 0.01)
    assert "guidance" not in blind and "features of a classifier" in blind["left_out"][0] and blind["gained"]
    assert pipe.config.call_defaults == {"num_inference_steps": 2}
    without = Subject.of(text_pipeline(learned_unconditional=False), 2)
    assert without.default_scale == 1.0 and not without.can_guide


def enough(real):
    """The same images a few times, so that there are more than neighbours of each."""
    rows = torch.arange(len(real.train)).repeat(4)
    texts = dataclasses.replace(real.train_captions, texts=real.train_captions.texts * 4)
    return dataclasses.replace(real, train=real.train.take(rows), train_captions=texts)


def test_pipelines_that_are_called_otherwise_are_refused():
    pipe = text_pipeline()
    pipe.register_modules(tokenizer=None, text_encoder=None)
    with pytest.raises(ValueError, match="must have its tokenizer and text_encoder"):
        Subject.of(pipe, 5)
    pipe = tiny_stable_diffusion(diffusers.DDIMScheduler())
    pipe.text_encoder_2 = pipe.text_encoder
    with pytest.raises(ValueError, match="hidden states of one text encoder, or with neither, got StableDiffusion"):
        Subject.of(pipe, 5)


def test_parts_that_were_trained_together_have_their_average_together(tmp_path):
    torch.manual_seed(0)
    parts = {"denoiser": nn.Linear(3, 2), "text_encoder": nn.Linear(2, 2), "vae": nn.Linear(2, 2)}
    together = nn.ModuleDict({name: parts[name] for name in ("denoiser", "text_encoder")})
    measure = distance_from_average(together, tmp_path)
    before = parts["vae"].weight.clone()
    width, tried = averages.choose_width(parts, tmp_path, measure, FOREVER)
    assert width == 0.07 and measure() < 1e-2 * tried[0]["frechet_distance"]
    assert torch.equal(parts["vae"].weight, before)


def test_time_is_a_tenth_of_the_training_and_at_least_half_a_minute():
    assert budget_of_training(3600) == 360 and budget_of_training(120) == 30
    budget = Budget(100)
    assert 99 < budget.left <= 100 and 49 < budget.part(0.5).seconds <= 50 and Budget(0).left == 0
    assert images_that_fit(0.01, 160.0) == 1000
    assert images_that_fit(10.0, 1.0) == guidance.FEWEST_IMAGES and images_that_fit(0.0, 1.0) == guidance.MOST_IMAGES


def test_a_learned_variance_stays():
    model = tiny_unet()
    subject = Subject.of(GuidedDiffusionPipeline(model, ExtDDPMScheduler(variance_type="fixed_small")), 5)
    assert not subject.learns_variance
    subject = Subject.of(GuidedDiffusionPipeline(model, ExtDDIMScheduler(variance_type="learned_range")), 5)
    assert subject.learns_variance
