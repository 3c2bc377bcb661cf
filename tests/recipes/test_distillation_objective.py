"""What students are trained towards, with exact networks and beside the samplers themselves."""

import pytest
import torch

from diffusers_ext import (
    ConsistencyScheduler,
    DiTModel,
    ExtDDIMScheduler,
    GuidedDiffusionPipeline,
    TextGuidedDiffusionPipeline,
)
from diffusers_ext.diffusion.noising import add_noise, training_target
from diffusers_ext.guidance.guided_denoiser import GuidedDenoiser
from diffusers_ext.guidance.guiding import classifier_free_guidance
from diffusers_ext.pipelines.call_condition import CallCondition
from diffusers_ext.pipelines.text_condition import TextCondition
from diffusers_ext.recipes.distillation import DistillConfig, student_scheduler
from diffusers_ext.recipes.distillation_objective import STEPS_A_DOUBLING, ConsistencyObjective, ProgressiveObjective
from diffusers_ext.recipes.teacher import Teacher
from mixture_oracle import MixtureDenoiser
from tiny import tiny_unet
from tiny_text import tiny_clip, tiny_t5, tiny_text_unet, tiny_tokenizer


def exact_pipe():
    scheduler = ExtDDIMScheduler(prediction_type="v_prediction", clip_sample=False, timestep_spacing="trailing")
    return GuidedDiffusionPipeline(MixtureDenoiser.make(scheduler), scheduler)


def batch_of(number=6, shape=(2, 1)):
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, number, *shape, generator=generator, dtype=torch.float64)
    time = (torch.arange(number, dtype=torch.float64) + 0.5) / number
    return {"images": x0, "noise": eps, "time": time, "labels": torch.arange(number) % 2}


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_progressive_target_ends_where_two_steps_of_the_sampler_do(num_steps):
    """By the exact network of a mixture, whose trajectories are curved."""
    pipe, batch = exact_pipe(), batch_of()
    teacher, scheduler = Teacher(pipe), pipe.scheduler
    fine = scheduler.list_timesteps(2 * num_steps).tolist()
    objective = ProgressiveObjective(teacher, fine)
    assert len(objective) == num_steps
    for number in range(num_steps):
        t, u, s = (torch.full((6,), each) for each in [*fine, -1][2 * number : 2 * number + 3])
        x = x_t = add_noise(batch["images"], batch["noise"], teacher.schedule.level(t, batch["images"]))
        scheduler.set_timesteps(timesteps=fine)
        for timestep in (t[0], u[0]):
            x = scheduler.step(pipe.denoiser(x, timestep.expand(6), batch["labels"])[0], timestep, x).prev_sample
        target = objective.target(x_t, (t, u, s), {"class_labels": batch["labels"]})
        level = teacher.schedule.level(t, x_t)
        v = training_target(target, (x_t - level.alpha * target) / level.sigma, level, "v_prediction")
        scheduler.set_timesteps(timesteps=fine[::2])
        torch.testing.assert_close(scheduler.step(v, t[0], x_t).prev_sample, x, rtol=1e-9, atol=1e-10)


def test_a_student_with_the_targets_for_outputs_has_no_loss():
    pipe, batch = exact_pipe(), batch_of()
    objective = ProgressiveObjective(Teacher(pipe), [999, 699, 399, 99])
    seen = []

    def ideal(x_t, timesteps, class_labels, return_dict):
        follow = {999: (699, 399), 399: (99, -1)}
        u, s = (torch.tensor([follow[int(t)][i] for t in timesteps]) for i in (0, 1))
        target = objective.target(x_t, (timesteps, u, s), {"class_labels": class_labels})
        level = objective.schedule.level(timesteps, x_t)
        seen.append(timesteps)
        return (training_target(target, (x_t - level.alpha * target) / level.sigma, level, "v_prediction"),)

    assert objective(ideal, batch).item() < 1e-18
    assert seen[0].tolist() == [999, 999, 999, 399, 399, 399]  # the student's own timesteps, each as often
    assert objective.metrics()["loss_q4"] < 1e-18


@pytest.mark.parametrize("make", [exact_pipe, lambda: GuidedDiffusionPipeline(tiny_unet(2), exact_pipe().scheduler)])
def test_the_guided_target_is_the_guided_prediction_of_the_pipeline(make):
    pipe = make()
    batch = batch_of(shape=(2, 1) if isinstance(pipe.denoiser, MixtureDenoiser) else (1, 8, 8))
    x = batch["images"].float()
    labels, null = batch["labels"], torch.full_like(batch["labels"], 2)
    guided = GuidedDenoiser(
        pipe.denoiser, pipe.scheduler, classifier_free_guidance(2.5), {"class_labels": (labels, null)}, x.shape[1]
    )
    teacher = Teacher(pipe, 2.5, (0.5, 20.0))
    plain = Teacher(pipe)
    for timestep, acts in ((900, False), (500, True), (20, False)):
        t = torch.full((6,), timestep)
        expected = guided(x, t[:1]) if acts else plain.output(x, t, {"class_labels": labels})
        torch.testing.assert_close(teacher.output(x, t, {"class_labels": labels}), expected, rtol=1e-5, atol=1e-5)
        assert acts == (not torch.allclose(plain.output(x, t, {"class_labels": labels}), expected, rtol=1e-3))
    mixed = torch.tensor([900, 500, 20, 900, 500, 20])  # each sample at its own level
    together = teacher.x0(x, mixed, {"class_labels": labels})
    for row, t in enumerate(mixed):
        alone = teacher.x0(x[row : row + 1], t[None], {"class_labels": labels[row : row + 1]})
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make_encoder, mask_padding", [(tiny_clip, False), (tiny_t5, True)])
def test_the_guided_target_of_texts_is_that_of_the_pipeline_whatever_their_lengths(make_encoder, mask_padding):
    tokenizer = tiny_tokenizer()
    scheduler = ExtDDIMScheduler(prediction_type="v_prediction", clip_sample=False)
    parts = {"tokenizer": tokenizer, "text_encoder": make_encoder(tokenizer)}
    pipe = TextGuidedDiffusionPipeline(tiny_text_unet(), scheduler, **parts)
    assert pipe.mask_padding == mask_padding
    texts = ["red dot", "a white edge that is red", ""]
    embeds = pipe.encode_prompt(texts)
    inputs = {"encoder_hidden_states": embeds.states}
    inputs |= {} if embeds.mask is None else {"encoder_attention_mask": embeds.mask}
    x, t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((3,), 500)
    got = Teacher(pipe, 3.0).output(x, t, inputs)
    with_text, without = (
        Teacher(pipe).output(x, t, Teacher(pipe).unconditional(inputs) | own) for own in (inputs, {})
    )
    torch.testing.assert_close(got, without + 3 * (with_text - without), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[2], without[2], rtol=1e-4, atol=1e-4)  # of the empty text
    condition = CallCondition(pipe, TextCondition(pipe, texts, None, 1))
    condition.named.check(pipe, classifier_free_guidance(3.0), t[:1], [True])
    guided = pipe._denoiser(scheduler, classifier_free_guidance(3.0), condition, 3, x.device)
    torch.testing.assert_close(got, guided(x, t[:1]), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="has not learned to do without them"):
        Teacher(TextGuidedDiffusionPipeline(tiny_text_unet(learned_unconditional=False), scheduler, **parts), 3.0)


def test_predictions_are_clipped_as_the_pipeline_clips_them():
    scheduler = ExtDDIMScheduler(prediction_type="v_prediction", clip_sample_range=0.5)
    teacher = Teacher(GuidedDiffusionPipeline(tiny_unet(2), scheduler))
    x, t = 3 * torch.randn(4, 1, 8, 8), torch.tensor([999, 600, 300, 0])
    assert teacher.x0(x, t, {"class_labels": torch.zeros(4, dtype=torch.int64)}).abs().max() == 0.5


def constant_x0(value, schedule):
    """A model that predicts the same x_0 everywhere, a consistency function; it says with which timesteps it is called."""
    calls = []

    def model(x_t, timesteps, class_labels, return_dict):
        calls.append(timesteps)
        level = schedule.level(timesteps, x_t)
        x0 = torch.full_like(x_t, value)
        return (training_target(x0, (x_t - level.alpha * x0) / level.sigma, level, "v_prediction"),)

    return model, calls


def test_pairs_of_noise_levels_come_nearer_with_the_progress_of_the_run():
    objective = ConsistencyObjective(Teacher(exact_pipe()), doublings=3)
    batch, gaps = batch_of(64), []
    for progress in (0.0, 0.3, 0.6, 1.0):
        objective.progress = lambda progress=progress: progress
        model, (r, t) = (made := constant_x0(0.25, objective.schedule))[0], (None, None)
        objective(model, batch)
        r, t = made[1]
        assert (r <= t).all()
        gaps.append((t - r).double().mean().item())
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.5 * gaps[0]
    assert objective.metrics()["doublings"] == 3


def test_by_default_a_doubling_waits_for_its_steps():
    """However short the run is: a student that is hurried unlearns what the pipeline knew."""
    objective = ConsistencyObjective(Teacher(exact_pipe()))
    assert objective.doublings >= 2 and objective.done_doublings == objective.doublings
    done = []
    for steps in (0, STEPS_A_DOUBLING - 1, STEPS_A_DOUBLING, 2 * STEPS_A_DOUBLING):
        objective.steps = lambda steps=steps: steps
        done.append(objective.done_doublings)
    assert done == [0, 0, 1, 2]
    asked = ConsistencyObjective(Teacher(exact_pipe()), doublings=3)
    asked.steps = lambda: 1
    assert asked.done_doublings == 3


def test_a_consistency_function_has_a_loss_only_where_its_partner_is_the_data():
    objective = ConsistencyObjective(Teacher(exact_pipe()), doublings=5)
    batch = batch_of(64)
    t, loss = objective.losses(constant_x0(0.25, objective.schedule)[0], batch)
    r = objective._partners.values[5][t]
    assert 0 < (r == -1).sum() < 64
    assert loss[r >= 0].abs().max() < 1e-9
    # There the target is the data themselves, whatever the network says.
    distance = (batch["images"] - 0.25).flatten(1).square().mean(1)
    weight = objective._weights.values[5][t]
    expected = weight * ((distance + objective.bend**2).sqrt() - objective.bend)
    torch.testing.assert_close(loss[r == -1], expected[r == -1], rtol=1e-6, atol=1e-9)


def test_times_of_a_batch_become_noise_levels_of_a_log_normal_distribution():
    objective = ConsistencyObjective(Teacher(exact_pipe()), noise_mean=0.3, noise_std=0.8)
    time = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    log = objective._noise.values[objective.timesteps(time)].log()
    assert log.mean().item() == pytest.approx(0.3, abs=0.02) and log.std().item() == pytest.approx(0.8, abs=0.02)
    assert objective.timesteps(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)).tolist()[0] == 0


def test_under_guidance_the_cleaner_point_is_the_teachers():
    """So that a consistency function of other data than the batch's has no loss, if the teacher's steps follow it."""
    plain = ConsistencyObjective(Teacher(exact_pipe()), doublings=4)
    guided = ConsistencyObjective(Teacher(exact_pipe(), 3.0), doublings=4, pairs="teacher")
    batch, seen = batch_of(32), {}
    for name, objective in (("plain", plain), ("guided", guided)):

        def model(x_t, timesteps, class_labels, return_dict, name=name):
            seen.setdefault(name, []).append(x_t)
            return (torch.zeros_like(x_t),)

        objective(model, batch)
    assert torch.equal(seen["plain"][1], seen["guided"][1])
    t = guided.timesteps(batch["time"])
    r, x_t = guided._partners.values[4][t], seen["guided"][1]
    x0 = guided.teacher.x0(x_t, t, {"class_labels": batch["labels"]})
    level_t, level_r = guided.schedule.level(t, x_t), guided.schedule.level(r, x_t)
    expected = level_r.alpha * x0 + level_r.sigma * (x_t - level_t.alpha * x0) / level_t.sigma
    torch.testing.assert_close(seen["guided"][0], expected)
    assert not torch.allclose(seen["plain"][0], expected, atol=1e-2)


@pytest.mark.parametrize("pairs", ["data", "teacher"])
def test_pairs_of_the_teacher_teach_what_it_makes_of_other_data(pairs):
    """Its consistency function, here a constant x_0, has no loss along its steps, and along the data's where r is no data."""
    pipe = exact_pipe()
    teacher = Teacher(pipe)
    teacher._call = lambda x_t, timesteps, labels: constant_x0(0.25, teacher.schedule)[0](
        x_t, timesteps, class_labels=labels, return_dict=False
    )[0]
    objective = ConsistencyObjective(teacher, doublings=5, pairs=pairs)
    batch = batch_of(64)
    t, loss = objective.losses(constant_x0(0.25, teacher.schedule)[0], batch)
    at_the_data = objective._partners.values[5][t] == -1
    assert 0 < at_the_data.sum() < 64
    if pairs == "teacher":
        assert loss.abs().max() < 1e-9
    else:
        assert loss[at_the_data].min() > 1e-2


def test_dropout_is_the_same_in_both_calls_of_a_consistency_loss():
    objective = ConsistencyObjective(Teacher(exact_pipe()), doublings=0)
    drawn = []

    def model(x_t, timesteps, class_labels, return_dict):
        drawn.append(torch.rand(3))
        return (torch.zeros_like(x_t),)

    objective(model, batch_of())
    assert torch.equal(*drawn)


def test_a_run_goes_on_with_the_teacher_that_it_had():
    pipe = GuidedDiffusionPipeline(tiny_unet(2), exact_pipe().scheduler)
    state = ProgressiveObjective(Teacher(pipe), [900, 100]).state_dict()
    ProgressiveObjective(Teacher(pipe), [900, 100]).load_state_dict(state)
    next(pipe.denoiser.parameters()).data += 1e-3
    with pytest.raises(ValueError, match="of a run with another pipeline to distil"):
        ProgressiveObjective(Teacher(pipe), [900, 100]).load_state_dict(state)


@pytest.mark.parametrize("method", ["progressive", "consistency"])
def test_a_student_forgets_what_was_measured_of_its_teacher(method):
    table = {"timesteps": [0, 500, 999], "x0_variance": [1e-4, 0.1, 0.2]}
    lists = {"spacing": "trailing", "trajectory": {"2": [999, 7]}}
    scheduler = ExtDDIMScheduler.from_config(
        exact_pipe().scheduler.config, variance_type="analytic", analytic_variance=table, optimal_timesteps=lists
    )
    config = DistillConfig(pipeline="runs/digits", method=method, output_dir="runs/student")
    student = student_scheduler(config, Teacher(GuidedDiffusionPipeline(tiny_unet(2), scheduler)))
    assert student.config.get("variance_type") is None and student.config.get("analytic_variance") is None
    student.set_timesteps(2)
    assert student.timesteps[0] == 999 and student.timesteps[1] > 200
    x = torch.randn(1, 1, 8, 8)
    assert student.step(x, student.timesteps[0], x).prev_sample.isfinite().all()


def test_what_cannot_be_distilled_is_refused():
    def teacher_of(prediction_type):
        scheduler = ExtDDIMScheduler(prediction_type=prediction_type)
        return Teacher(GuidedDiffusionPipeline(tiny_unet(2), scheduler))

    for prediction_type in ("epsilon", "score"):
        with pytest.raises(ValueError, match=f"must predict v, x_0 or flow, got {prediction_type}"):
            teacher_of(prediction_type)
    with pytest.raises(ValueError, match="must predict v or flow, .* got sample"):
        ConsistencyObjective(teacher_of("sample"))
    with pytest.raises(ValueError, match="must be teacher for a guidance_scale of 3, .* got data"):
        ConsistencyObjective(Teacher(exact_pipe(), 3.0))
    with pytest.raises(ValueError, match="must be one of data, teacher, got 'both'"):
        ConsistencyObjective(Teacher(exact_pipe()), pairs="both")
    with pytest.raises(ValueError, match="an even number of them, got 3"):
        ProgressiveObjective(teacher_of("sample"), [999, 500, 1])
    with pytest.raises(ValueError, match="must hold noise levels of the path"):
        Teacher(exact_pipe(), 2.0, (1e6, 1e7))
    student = ConsistencyScheduler.from_config(exact_pipe().scheduler.config)
    with pytest.raises(ValueError, match="one of a denoiser, got .* which ConsistencyScheduler samples"):
        Teacher(GuidedDiffusionPipeline(tiny_unet(2), student))


def test_a_student_has_no_output_in_a_middle_layer():
    """Which nothing would train."""
    network = DiTModel(8, 4, 1, hidden_size=16, num_layers=2, num_attention_heads=2, internal_guidance_layer=1)
    student = Teacher(GuidedDiffusionPipeline(network, exact_pipe().scheduler)).copy_network()
    assert student.config.internal_guidance_layer is None and network.config.internal_guidance_layer == 1
    assert {name for name in network.state_dict() if "internal" not in name} == set(student.state_dict())
