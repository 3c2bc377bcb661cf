"""The whole command on tiny networks: stages, resuming, students as pipelines, and what is refused."""

import dataclasses
import shutil

import datasets
import diffusers
import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import ClassifierFreeGuidance
from PIL import Image
from safetensors.torch import load_file

from diffusers_ext import (
    ConsistencyScheduler,
    ExtDDIMScheduler,
    FlowScheduler,
    GuidedDiffusionPipeline,
    TextGuidedDiffusionPipeline,
    UNetModel,
)
from diffusers_ext.calibration.subject import STUDENT_STEPS, Subject
from diffusers_ext.commands import evaluate as evaluate_command
from diffusers_ext.diffusion.distillation import angle_timesteps
from diffusers_ext.diffusion.timesteps import make_timesteps
from diffusers_ext.models.statistics import DataStatisticsModel
from diffusers_ext.recipes.distillation import complete, guided_by_default, paired_by_default
from diffusers_ext.recipes.distillation_data import load_student_data
from diffusers_ext.recipes.teacher import Teacher, load_teacher
from diffusers_ext.trainer.run_folder import read_metrics
from runs import assert_same_run, forget_accelerate
from tiny import tiny_unet
from tiny_text import (
    CAPTIONS,
    save_pictures,
    tiny_clip,
    tiny_stable_diffusion,
    tiny_t5,
    tiny_text_unet,
    tiny_tokenizer,
)
from tiny_vae import tiny_vae
from training import cache_latents, calibrate, distill, evaluate


LABELS = ["cat", "dog"]
SETTINGS = {"num_train_timesteps": 40, "beta_reference_timesteps": 1000, "timestep_spacing": "trailing"}
WEIGHTS = "denoiser/diffusion_pytorch_model.safetensors"


def v_scheduler(**config):
    return ExtDDIMScheduler(**SETTINGS | {"prediction_type": "v_prediction"} | config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Images by label, and a pipeline of them with the options of the run that it is of."""
    folder = tmp_path_factory.mktemp("distill")
    pixels = np.random.default_rng(0)
    for index, label in enumerate(LABELS):
        (folder / "data" / label).mkdir(parents=True)
        for i in range(8):
            picture = pixels.integers(60 + 100 * index, size=(8, 8)).astype(np.uint8)
            Image.fromarray(picture).save(folder / "data" / label / f"{i}.png")
    pipe = GuidedDiffusionPipeline(tiny_unet(num_classes=2), v_scheduler(), id2label=dict(enumerate(LABELS)))
    pipe.save_pretrained(folder / "pipe")
    options = {"dataset_name": str(folder / "data"), "resolution": [8, 8], "resize_mode": "crop"}
    (folder / "pipe" / "train_config.yaml").write_text(yaml.safe_dump(options))
    return folder


def options(folders, *more, pipeline="pipe"):
    return distill.parse(
        [
            *(str(folders / pipeline), "--train_batch_size", "4", "--num_threads", "1", "--sample_columns", "2"),
            *(
                "--lr_warmup_steps",
                "1",
                "--checkpointing_steps",
                "2",
                "--logging_steps",
                "2",
                "--mixed_precision",
                "no",
            ),
            *more,
        ]
    )


def run(folders, *more, **which):
    forget_accelerate()
    return distill.main(options(folders, *more, **which))


PROGRESSIVE = ("--teacher_steps", "8", "--student_steps", "2", "--steps_per_stage", "4", "--guidance_scale", "1.5")


def test_stages_on_the_way_are_not_pushed(folders):
    words = ("--push_to_hub", "--hub_model_id", "a/b", "--hub_private_repo", "--output_dir", "out")
    *others, last = options(folders, *PROGRESSIVE, *words).stages()
    assert [(each.push_to_hub, each.hub_model_id) for each in others] == [(False, None)]
    assert (last.push_to_hub, last.hub_model_id, last.hub_private_repo) == (True, "a/b", True)


@pytest.fixture(scope="module")
def progressive(folders):
    return run(folders, *PROGRESSIVE, "--output_dir", str(folders / "progressive"))


def listed_by_call(pipe, **call):
    pipe.set_progress_bar_config(disable=True)
    images = pipe(class_labels=[0, 1], generator=torch.Generator().manual_seed(0), output_type="pt", **call).images
    assert images.isfinite().all()
    return pipe.scheduler.timesteps.tolist()


def test_each_stage_is_a_pipeline_that_makes_its_steps_unguided(folders, progressive):
    for steps, folder in ((4, progressive / "stages" / "4_steps"), (2, progressive)):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        assert type(pipe) is GuidedDiffusionPipeline and pipe.config.call_defaults == {
            "num_inference_steps": steps,
            "guidance_scale": 1.0,
        }
        assert type(pipe.scheduler) is ExtDDIMScheduler
        listed = listed_by_call(pipe)
        assert listed == make_timesteps("trailing", 8, 40).tolist()[:: 8 // steps] and pipe.guidance_scale == 1
        card = (folder / "README.md").read_text()
        assert "training/distill.py" in card and "--teacher_steps 8" in card
        assert "`GuidedDiffusionPipeline` distilled from `" in card
        assert all((folder / name).is_file() for name in ("samples.png", "loss.png", "index.html"))
        saved = yaml.safe_load((folder / "train_config.yaml").read_text())
        assert saved["guidance_scale"] == (1.5 if steps == 4 else 1.0) and saved["teacher_steps"] == 2 * steps
    teacher, student = load_file(folders / "pipe" / WEIGHTS), load_file(progressive / WEIGHTS)
    assert any(not torch.equal(teacher[name], student[name]) for name in teacher)


@pytest.mark.parametrize("stage", ["4_steps", "2_steps"])
def test_a_run_that_was_broken_off_ends_in_the_same_student(folders, progressive, stage, tmp_path):
    """In the first stage or the last, after its second step; what was done before is not done again."""
    again = tmp_path / "again"
    shutil.copytree(progressive, again)
    broken = again / "stages" / stage if stage == "4_steps" else again
    for later in [
        broken / "checkpoint-4",
        *([again / "checkpoint-2", again / "checkpoint-4"] if broken != again else []),
    ]:
        shutil.rmtree(later)
    for folder in {broken, again}:
        (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match="holds another run"):
        run(folders, *PROGRESSIVE, "--output_dir", str(again))
    first = again / "stages" / "4_steps" / "samples.png"
    before = first.stat().st_mtime_ns
    run(folders, *PROGRESSIVE, "--output_dir", str(again), "--resume_from_checkpoint", "latest")
    assert (first.stat().st_mtime_ns == before) == (broken == again)
    # The second stage's options name the folder of the first, which is another here; the numbers are the same.
    assert_same_run(again / "stages" / "4_steps", progressive / "stages" / "4_steps", 4)
    assert_same_run(again, progressive, 4)
    ours, theirs = load_file(again / WEIGHTS), load_file(progressive / WEIGHTS)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_finished_stage_of_another_distillation_is_not_gone_on_from(folders, progressive, tmp_path):
    """Under another guidance, or of other weights, which the last stage alone does not know of."""
    again = tmp_path / "again"
    shutil.copytree(progressive, again)
    (again / "model_index.json").unlink()
    shutil.rmtree(again / "checkpoint-4")
    go_on = ("--output_dir", str(again), "--resume_from_checkpoint", "latest")
    with pytest.raises(ValueError, match="is of a run with guidance_scale 1.5, got 4.0"):
        run(folders, *PROGRESSIVE[:-1], "4", *go_on)
    shutil.copytree(folders / "pipe", tmp_path / "other")
    network = tiny_unet(num_classes=2)
    next(network.parameters()).data += 1e-3
    network.save_pretrained(tmp_path / "other" / "denoiser")
    with pytest.raises(ValueError, match="another pipeline to distil, whose weights are others"):
        run(tmp_path, *PROGRESSIVE, *go_on, pipeline="other")
    run(folders, *PROGRESSIVE, *go_on)


def test_students_of_normalised_data_and_of_sequences_answer_in_the_units_of_the_data(folders, tmp_path):
    statistics = DataStatisticsModel(8, 1)
    statistics.mean.fill_(-0.5)
    statistics.std.fill_(0.25)
    names = dict(enumerate(LABELS))
    scheduler = v_scheduler(clip_sample_range=6.0)
    pipe = GuidedDiffusionPipeline(tiny_unet(num_classes=2), scheduler, id2label=names, statistics=statistics)
    pipe.save_pretrained(tmp_path / "normalised")
    data = ("--dataset_name", str(folders / "data"), "--max_train_steps", "1", "--teacher_steps", "4")
    config = options(tmp_path, *data, pipeline="normalised")
    _, _, _, space = load_student_data(config, Accelerator(), Teacher(load_teacher(config.pipeline).pipe))
    batch = space.encoder(torch.device("cpu"))(
        {"images": torch.full((1, 1, 8, 8), -0.25), "own_labels": torch.zeros(1)}
    )
    torch.testing.assert_close(batch["images"], torch.ones(1, 1, 8, 8))
    folder = run(tmp_path, *data, "--output_dir", str(tmp_path / "of_normalised"), pipeline="normalised")
    student = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(student.statistics.mean, statistics.mean) and torch.equal(
        student.statistics.std, statistics.std
    )

    np.savez(tmp_path / "sequences.npz", values=np.random.default_rng(0).normal(50, 9, size=(12, 16, 1)))
    scale = {"shift": [50.0], "scale": [20.0]}
    series = UNetModel(16, 1, 1, dims=1, block_out_channels=(8, 8), layers_per_block=1)
    GuidedDiffusionPipeline(series, v_scheduler(), value_scale=scale).save_pretrained(tmp_path / "series")
    data = ("--dataset_name", str(tmp_path / "sequences.npz"), *data[2:])
    folder = run(tmp_path, *data, "--output_dir", str(tmp_path / "of_series"), pipeline="series")
    assert diffusers.DiffusionPipeline.from_pretrained(folder).config.value_scale == scale


def test_options_that_are_given_are_not_those_of_the_pipelines_run(folders, tmp_path):
    """Though they are the defaults; those of a machine are of that run alone."""
    pipe = shutil.copytree(folders / "pipe", tmp_path / "flipped")
    saved = yaml.safe_load((pipe / "train_config.yaml").read_text())
    (pipe / "train_config.yaml").write_text(
        yaml.safe_dump(saved | {"random_flip": True, "preprocessing_num_workers": 4})
    )
    taken = complete(options(tmp_path, pipeline="flipped"))
    assert taken.random_flip and taken.preprocessing_num_workers == 1 and taken.resolution == (8, 8)
    assert not complete(options(tmp_path, "--no-random_flip", pipeline="flipped")).random_flip


def test_a_consistency_model_is_sampled_in_one_step_and_in_some(folders, tmp_path):
    folder = run(
        folders,
        *("--method", "consistency", "--max_train_steps", "3", "--doublings", "2", "--student_steps", "1"),
        *("--guidance_scale", "2", "--guidance_interval", "0.2", "5", "--output_dir", str(tmp_path / "out")),
    )
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(pipe.scheduler) is ConsistencyScheduler
    assert listed_by_call(pipe) == [39]
    assert listed_by_call(pipe, num_inference_steps=2) == angle_timesteps(pipe.scheduler.schedule, 2)
    assert not pipe.scheduler.config.get("analytic_variance") and pipe.config.clip_guided_noise == "always"
    assert yaml.safe_load((folder / "train_config.yaml").read_text())["consistency_pairs"] == "teacher"


def test_a_student_learns_the_guidance_of_its_pipelines_calls(folders):
    """As calibration saves it: in an interval of timesteps, which are noise levels to the student."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folders / "pipe")

    def guided(pipe, *more):
        return guided_by_default(options(folders, *more), Subject.of(pipe, 1))

    assert guided(pipe).guidance_scale == 1 and guided(pipe).guidance_interval is None
    pipe.register_to_config(call_defaults={"guidance_scale": 2.5, "guidance_interval": {"timestep": [4.5, 20.5]}})
    config, schedule = guided(pipe), pipe.scheduler.schedule
    noise = schedule.sigma / schedule.alpha
    assert config.guidance_scale == 2.5 and config.guidance_interval == (noise[5].item(), noise[20].item())
    teacher = Teacher(pipe, config.guidance_scale, config.guidance_interval)
    scales = teacher._scales.gather(torch.arange(40), torch.zeros(40, 1))[0].flatten()
    assert scales.tolist() == [1.0] * 5 + [2.5] * 16 + [1.0] * 19
    linear = GuidedDiffusionPipeline(tiny_unet(num_classes=2), FlowScheduler(num_train_timesteps=40))
    linear.register_to_config(call_defaults=pipe.config.call_defaults)
    assert guided(linear).guidance_interval == pytest.approx((5 / 35, 20 / 20))  # its timestep t is at sigma t / 40
    pipe.register_to_config(call_defaults={"guidance_scale": 2.0, "guidance_interval": {"sigma": [0.3, 5.0]}})
    assert guided(pipe).guidance_interval == (0.3, 5.0)
    assert guided(pipe, "--guidance_scale", "1").guidance_interval is None
    # Pipelines of diffusers as their own calls are.
    assert guided(tiny_stable_diffusion(v_scheduler(clip_sample=False))).guidance_scale == 7.5
    pipe.guider = ClassifierFreeGuidance()
    with pytest.raises(ValueError, match="guided by its ClassifierFreeGuidance, which is not what a student learns"):
        guided(pipe)


def test_a_consistency_model_learns_along_the_steps_of_a_pipeline_with_guidance(folders, tmp_path):
    """Guided by its calls, or in its training, of which its run's options tell."""

    def pairs(*more, pipeline="pipe"):
        config = options(folders, "--method", "consistency", *more, pipeline=pipeline)
        config = dataclasses.replace(config, guidance_scale=config.guidance_scale or 1.0)
        return paired_by_default(config, load_teacher(config.pipeline)).consistency_pairs

    assert pairs() == "data" and pairs("--guidance_scale", "2") == "teacher"
    assert pairs("--consistency_pairs", "teacher") == "teacher"
    learned = shutil.copytree(folders / "pipe", tmp_path / "learned")
    saved = yaml.safe_load((learned / "train_config.yaml").read_text()) | {"model_guidance_scale": 3.0}
    (learned / "train_config.yaml").write_text(yaml.safe_dump(saved))
    assert pairs(pipeline=learned) == "teacher" and pairs("--consistency_pairs", "data", pipeline=learned) == "data"
    student = GuidedDiffusionPipeline(tiny_unet(num_classes=2), v_scheduler())
    student.scheduler.register_to_config(**{STUDENT_STEPS: 2})
    student.save_pretrained(tmp_path / "student")
    assert pairs(pipeline=tmp_path / "student") == "teacher"  # whose guidance is in it, whatever its options say
    with pytest.raises(ValueError, match="must be teacher for a guidance_scale of 2, .* got data"):
        pairs("--guidance_scale", "2", "--consistency_pairs", "data")


def test_a_student_is_not_calibrated(progressive):
    with pytest.raises(ValueError, match="got a student of 2 steps, which was distilled for its own"):
        calibrate.main(calibrate.parse([str(progressive)]))


def test_a_pipeline_of_diffusers_and_one_of_latents_are_distilled(folders, tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(8, 1, 1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, **blocks)
    stock = diffusers.DDPMScheduler(num_train_timesteps=40, beta_end=0.3, prediction_type="v_prediction")
    diffusers.DDPMPipeline(unet, stock).save_pretrained(tmp_path / "stock")
    torch.manual_seed(0)
    latent = GuidedDiffusionPipeline(
        UNetModel(4, 2, 2, block_out_channels=(8, 8), layers_per_block=1),
        v_scheduler(clip_sample=False),
        vae=tiny_vae(2, 1),
    )
    latent.save_pretrained(tmp_path / "latent")
    linear = UNetModel(8, 1, 1, block_out_channels=(8, 8), layers_per_block=1)
    GuidedDiffusionPipeline(linear, FlowScheduler(num_train_timesteps=40)).save_pretrained(tmp_path / "linear")
    data = ("--dataset_name", str(folders / "data"), "--max_train_steps", "1", "--teacher_steps", "4")
    for name in ("stock", "latent", "linear"):
        folder = run(tmp_path, *data, "--output_dir", str(tmp_path / f"of_{name}"), pipeline=name)
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
        pipe.set_progress_bar_config(disable=True)
        assert np.isfinite(pipe(output_type="np").images).all() and len(pipe.scheduler.timesteps) == 2
        assert (pipe.vae is None) == (name != "latent")
        if name == "linear":
            assert type(pipe.scheduler) is FlowScheduler and pipe.scheduler.timesteps.tolist() == [40, 20]


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (("--method", "other"), "invalid choice"),
        (("--teacher_steps", "12"), "teacher_steps must be student_steps times a power of 2, 4, 8, 16, 32 and so on"),
        (("--student_steps", "12"), "teacher_steps must be student_steps times a power of 2"),
        (("--guidance_interval", "0.2", "5"), "guidance_interval has no meaning without a guidance_scale"),
        (("--guidance_scale", "2", "--guidance_interval", "5", "0.2"), "the lower first"),
        (("--doublings", "3"), "doublings has no meaning without method consistency"),
        (
            ("--method", "consistency", "--teacher_steps", "8"),
            "teacher_steps has no meaning without method progressive",
        ),
        (("--method", "consistency", "--student_steps", "9"), "student_steps must be at most 8"),
        (("--steps_per_stage", "3", "--max_train_steps", "7"), "both say how many optimizer steps"),
        (("--resume_from_checkpoint", "some/checkpoint-2"), "must be latest for 4 stages"),
    ],
)
def test_options_that_contradict_one_another_are_refused(folders, more, reason, capsys):
    with pytest.raises(SystemExit):
        options(folders, *more)
    assert reason in capsys.readouterr().err.replace("\n", " ")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Captions, one of them empty, and pipelines of them whose encoders see their padding (clip) or not (t5)."""
    folder = tmp_path_factory.mktemp("texts")
    save_pictures(folder / "data", "train", CAPTIONS, [*CAPTIONS[:-1], ""])
    save_pictures(folder / "data", "validation", CAPTIONS[:4])
    save_pictures(folder / "lacking", "train", CAPTIONS)
    save_pictures(folder / "lacking", "validation", CAPTIONS[:4], [*CAPTIONS[:3], None])
    saved = {
        "dataset_name": str(folder / "data"),
        "resolution": [8, 8],
        "caption_column": None,
        "caption_dropout": 0.1,
    }
    for name, make in (("clip", tiny_clip), ("t5", tiny_t5)):
        tokenizer = tiny_tokenizer()
        pipe = TextGuidedDiffusionPipeline(
            tiny_text_unet(), v_scheduler(), tokenizer, make(tokenizer), max_text_length=8
        )
        pipe.save_pretrained(folder / name)
        (folder / name / "train_config.yaml").write_text(yaml.safe_dump(saved))
    return folder


FEW = ("--max_train_steps", "3", "--student_steps", "2", "--teacher_steps", "4")


@pytest.mark.parametrize("encoder, method", [("clip", "progressive"), ("t5", "progressive"), ("t5", "consistency")])
def test_students_of_texts_are_asked_by_texts_and_not_guided(encoder, method, texts, tmp_path):
    more = FEW if method == "progressive" else (*FEW[:4], "--method", method)
    more += ("--validation_split", "validation", "--output_dir", str(tmp_path / "student"))
    folder = run(texts, *more, pipeline=encoder)
    saved = yaml.safe_load((folder / "train_config.yaml").read_text())
    assert (saved["guidance_scale"], saved["label_dropout"], saved["label_column"]) == (4.0, 0.1, None)
    assert saved["caption_column"] == "text" and read_metrics(folder / "metrics.jsonl")[-1]["val_loss"] > 0
    teacher, student = (diffusers.DiffusionPipeline.from_pretrained(each) for each in (texts / encoder, folder))
    assert student.config.call_defaults == {"num_inference_steps": 2, "guidance_scale": 1.0}
    assert (student.max_text_length, student.mask_padding) == (8, teacher.mask_padding)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-to-image" in card and "samples, a row for each text" in card
    assert "captions of the column text, by the pipeline's text encoder" in card
    student.set_progress_bar_config(disable=True)
    generators = [[torch.Generator().manual_seed(seed)] for seed in (0, 0, 1)]
    calls = [
        student("red dot", generator=each, output_type="pt", **said).images
        for each, said in zip(generators, ({}, {"guidance_scale": 1.0}, {}), strict=True)
    ]
    assert torch.equal(calls[0], calls[1]) and not torch.equal(calls[0], calls[2])
    assert not torch.equal(student.denoiser.conv_in.weight, teacher.denoiser.conv_in.weight)
    assert evaluate_command.complete(evaluate.EvaluateConfig(pipeline=str(folder)), student).guidance_scale is None
    if encoder == "t5" and method == "progressive":
        again = ("--max_train_steps", "1", "--student_steps", "1", "--teacher_steps", "2")
        last = run(tmp_path, *again, "--output_dir", str(tmp_path / "one"), pipeline="student")
        assert yaml.safe_load((last / "train_config.yaml").read_text())["guidance_scale"] == 1.0


def test_a_student_without_empty_texts_says_so_unless_a_caption_is_empty(texts, tmp_path):
    for name, known in (("data", True), ("lacking", False)):
        more = (*FEW, "--label_dropout", "0", "--dataset_name", str(texts / name), "--resolution", "8")
        student = run(texts, *more, "--output_dir", str(tmp_path / name), pipeline="clip")
        assert diffusers.DiffusionPipeline.from_pretrained(student).knows_empty_text == known


@pytest.mark.parametrize(
    ("more", "pipeline", "reason"),
    [
        (("--streaming",), "clip", "streaming reads no captions ahead"),
        (("--unconditional",), "clip", "unconditional has no meaning for a pipeline of texts"),
        (("--label_names", "a", "b"), "clip", "label_names has no meaning for a pipeline of texts"),
        (("--caption_column", "nosuch"), "clip", "caption_column 'nosuch' is not in the data set"),
        (("--caption_column", "text"), "pipe", "caption_column is for pipelines of texts"),
    ],
)
def test_options_of_texts_and_of_labels_are_for_their_own_pipelines(more, pipeline, reason, texts, folders, tmp_path):
    with pytest.raises(ValueError, match=reason):
        of = folders if pipeline == "pipe" else texts
        run(of, *more, *FEW, "--output_dir", str(tmp_path / "out"), pipeline=pipeline)
    if more == ("--streaming",):
        data = ("--dataset_name", str(texts / "lacking"), "--validation_split", "validation")
        with pytest.raises(ValueError, match="caption_column 'text' is empty in 1 of 4 rows of the split validation"):
            run(texts, *data, *FEW, "--output_dir", str(tmp_path / "out"), pipeline=pipeline)


def test_a_student_by_label_on_latents_is_measured_by_its_own_labels(tmp_path):
    """Though its images have another column that is called label, and a guidance of its teacher's is not the student's."""
    rows = {
        "image": [Image.new("L", (8, 8), 20 * i) for i in range(8)],
        "kind": [i % 2 for i in range(8)],
        "label": list(range(8)),
    }
    kinds = datasets.ClassLabel(names=LABELS)
    features = {"image": datasets.Image(), "kind": kinds, "label": datasets.Value("int64")}
    (tmp_path / "data").mkdir()
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    table.to_parquet(tmp_path / "data" / "train.parquet")
    vae = tiny_vae(channels=1)
    vae.save_pretrained(tmp_path / "vae")
    latents = {"dataset_name": str(tmp_path / "data"), "label_column": "kind", "vae": str(tmp_path / "vae")}
    forget_accelerate()
    cache_latents.main(cache_latents.CacheConfig(**latents, output_dir=str(tmp_path / "latents"), num_threads=1))
    side = 8 // 2 ** (len(vae.config.block_out_channels) - 1)
    network = UNetModel(
        side, *[vae.config.latent_channels] * 2, block_out_channels=(8, 8), layers_per_block=1, num_classes=2
    )
    pipe = GuidedDiffusionPipeline(network, v_scheduler(clip_sample=False), vae=vae, id2label=dict(enumerate(LABELS)))
    pipe.save_pretrained(tmp_path / "pipe")
    more = (
        "--dataset_name",
        str(tmp_path / "latents"),
        "--guidance_scale",
        "3",
        "--output_dir",
        str(tmp_path / "student"),
    )
    folder = run(tmp_path, *FEW, *more)
    student = diffusers.DiffusionPipeline.from_pretrained(folder)
    config = evaluate_command.complete(evaluate.EvaluateConfig(pipeline=str(folder)), student)
    assert (config.label_column, config.caption_column, config.guidance_scale) == ("kind", None, None)


def test_pipelines_and_images_that_do_not_fit_are_refused(folders, tmp_path):
    names = dict(enumerate(LABELS))
    network = tiny_unet(num_classes=2)
    GuidedDiffusionPipeline(network, ExtDDIMScheduler(**SETTINGS), id2label=names).save_pretrained(
        tmp_path / "epsilon"
    )
    flow = FlowScheduler(num_train_timesteps=40)
    GuidedDiffusionPipeline(network, flow, id2label=names).save_pretrained(tmp_path / "flow")
    GuidedDiffusionPipeline(network, v_scheduler(), id2label={0: "dog", 1: "cat"}).save_pretrained(
        tmp_path / "swapped"
    )
    GuidedDiffusionPipeline(tiny_unet(), v_scheduler()).save_pretrained(tmp_path / "plain")
    whole = tiny_unet(num_classes=2)
    whole.register_to_config(learned_unconditional=False)
    GuidedDiffusionPipeline(whole, v_scheduler(), id2label=names).save_pretrained(tmp_path / "whole")
    data, out = ("--dataset_name", str(folders / "data")), ("--output_dir", str(tmp_path / "out"))
    for pipeline, more, reason in (
        ("epsilon", data, "must predict v, x_0 or flow, got epsilon"),
        ("flow", (*data, "--method", "consistency", "--student_steps", "1"), "consistency is for paths of betas"),
        ("swapped", data, "labels of .* must be those of the pipeline, dog, cat, got cat, dog"),
        ("plain", (*data, "--guidance_scale", "2"), "guidance_scale must be 1 for a pipeline without labels"),
        (
            "whole",
            (*data, "--label_dropout", "0.1"),
            "must be 0 for a pipeline that has not learned to do without labels or texts",
        ),
        ("plain", (), "has no train_config.yaml that names its data set"),
        ("plain", (*data, "--resolution", "16"), "whose samples are 1x8x8, got 1x16x16"),
        ("plain", (*data, "--teacher_steps", "64"), "at most the number of timesteps of the pipeline's path, 40"),
    ):
        with pytest.raises(ValueError, match=reason):
            run(tmp_path, *more, *out, pipeline=pipeline)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        options(tmp_path, "--output_dir", str(tmp_path / "plain"), pipeline="plain")
