import dataclasses
import signal
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import ClassVar, Literal

import pytest
import yaml

from diffusers_ext.foreign_options import FOREIGN_OPTIONS, explain_foreign
from diffusers_ext.options import (
    check_options,
    describe_preset,
    fixed_on_resume,
    fixed_option,
    given_names,
    option,
    parse_config,
    read_yaml,
    run_script,
    takes_keywords,
    to_command,
    to_yaml,
)
from diffusers_ext.recipes.text_to_image import TextConfig
from diffusers_ext.trainer.config import resolve_for_machine
from diffusers_ext.trainer.signals import Interrupted
from training import evaluate, train_ddpm, train_features, train_vae


@dataclass(frozen=True)
class Config:
    """A small table of options."""

    learning_rate: float = option(1e-3, "peak, in 100% of cases", "optimizer")
    resolution: tuple[int, ...] | None = option(None, "side")
    mixed_precision: Literal["no", "bf16"] | None = option(None, "precision")
    use_ema: bool = option(True, "average")
    max_train_steps: int | None = option(None, "steps", "run", alias="num_steps")
    output_dir: str = option("runs/x", "folder")
    hub_token: str | None = option(None, "secret")

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate:g}")


@dataclass(frozen=True)
class Ruled:
    """Options that carry rules."""

    steps: int | None = option(None, "steps", at_least=1)
    kind: Literal["a", "b", "c"] = fixed_option("a", "kind")
    weight: float = option(0.0, "weight", at_least=0, needs={"kind": ("a", "b")})
    length: int = fixed_option(5, "length", needs={"kind": ("c",)})
    start: int = option(0, "start", needs="steps")

    def __post_init__(self):
        check_options(self)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"weight": -0.5}, "weight must be at least 0, got -0.5"),
        ({"weight": float("nan")}, "weight must be at least 0, got nan"),
        ({"weight": float("inf")}, "weight must be finite, got inf"),
        ({"kind": "c", "weight": 1.0}, "weight has no meaning without kind a or b: give both or neither"),
        ({"length": 6}, "length has no meaning without kind c: give both or neither"),
        ({"start": 1}, "start has no meaning without steps: give both or neither"),
    ],
)
def test_an_option_is_held_to_its_rules(values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Ruled(**values)


@dataclass(frozen=True)
class OfSeveral:
    """An option that needs one of the values of another."""

    kinds: tuple[str, ...] = option(("a", "b"), "several")
    share: float = option(0.5, "share", needs={"kinds": ("b", "c")})


def test_an_option_can_need_one_of_the_values_of_another():
    check_options(OfSeveral(share=0.1))
    check_options(OfSeveral(("a",)))
    with pytest.raises(ValueError, match="^share has no meaning without kinds b or c: give both or neither$"):
        check_options(OfSeveral(("a", "d"), share=0.1))


def test_an_option_that_is_as_by_default_or_has_what_it_needs_passes():
    Ruled()
    Ruled(kind="c", length=6, weight=0.0)
    Ruled(steps=1, start=1, weight=1.0)


def test_a_subclass_has_the_rules_of_its_own_options_and_of_those_it_inherits():
    @dataclass(frozen=True)
    class More(Ruled):
        seed: int = fixed_option(0, "seed", at_least=0)
        kind: Literal["a", "b", "c"] = option("c", "kind")

    assert fixed_on_resume(Ruled) == {"kind", "length"} and fixed_on_resume(More) == {"length", "seed"}
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        More(seed=-1)


def write(path, text):
    path.write_text(text)
    return str(path)


def test_command_line_wins_over_yaml_which_wins_over_defaults(tmp_path):
    file = write(tmp_path / "c.yaml", "learning_rate: 1e-4\nresolution: [8, 16]\nuse_ema: false\n")
    config = parse_config(Config, ["--config", file, "--learning_rate", "0.5", "--mixed_precision", "no"])
    assert config == Config(learning_rate=0.5, resolution=(8, 16), use_ema=False, mixed_precision="no")


def test_an_alias_is_the_option_itself(tmp_path):
    file = write(tmp_path / "c.yaml", "num_steps: 5\n")
    assert (
        parse_config(Config, ["--config", file])
        == parse_config(Config, ["--num_steps", "5"])
        == Config(max_train_steps=5)
    )


def test_yaml_is_converted_to_the_types_of_the_options(tmp_path):
    """YAML reads 1e-4 as a text and a bare `no` as false."""
    file = write(
        tmp_path / "c.yaml", "learning_rate: 1e-4\nmixed_precision: no\nresolution: 8\nmax_train_steps: null\n"
    )
    assert read_yaml(Config, file) == {
        "learning_rate": 1e-4,
        "mixed_precision": "no",
        "resolution": (8,),
        "max_train_steps": None,
    }


@pytest.mark.parametrize("arguments", [[], ["--resolution", "8", "16", "--no-use_ema", "--max_train_steps", "3"]])
def test_dry_run_prints_what_the_config_file_reads_back(arguments, tmp_path, capsys):
    assert parse_config(Config, [*arguments, "--dry_run"]) is None
    file = write(tmp_path / "c.yaml", capsys.readouterr().out)
    assert parse_config(Config, ["--config", file]) == parse_config(Config, arguments)


def test_command_gives_the_same_config_without_secrets():
    config = Config(resolution=(8, 16), use_ema=False, output_dir="a b", hub_token="hf_secret")
    command = to_command(config, "train.py")
    assert command == "accelerate launch train.py --resolution 8 16 --no-use_ema --output_dir 'a b'"
    assert to_command(config, "measure.py", launcher="python").startswith("python measure.py --resolution 8 16 ")
    named = to_command(config, "measure.py", launcher="python", first="output_dir")
    assert named == "python measure.py 'a b' --resolution 8 16 --no-use_ema"
    assert to_command(Config(), "measure.py", launcher="python", first="max_train_steps") == "python measure.py"
    assert "hub_token" not in yaml.safe_load(to_yaml(config))


@pytest.mark.parametrize(
    "text, message",
    [
        ("leraning_rate: 1", "unknown option leraning_rate; did you mean learning_rate"),
        ("ema: true", "unknown option ema; did you mean use_ema"),
        ("zzz: 1", "unknown option zzz; --help lists the options"),
        ("learning_rate: fast", "learning_rate must be a number, got 'fast'"),
        ("use_ema: 1", "use_ema must be true or false, got 1"),
        ("max_train_steps: 1.5", "max_train_steps must be an integer, got 1.5"),
        ("learning_rate: null", "learning_rate must have a value, got null"),
        ("mixed_precision: fp8", "mixed_precision must be one of no, bf16, got 'fp8'"),
        ("- 1", "must hold a mapping of options to values, got list"),
        ("learning_rate: -1", "learning_rate must be positive, got -1"),
    ],
)
def test_bad_yaml_is_refused(text, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_config(Config, ["--config", write(tmp_path / "c.yaml", text)])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_unknown_argument_names_the_near_ones(capsys):
    with pytest.raises(SystemExit):
        parse_config(Config, ["--max_train_step", "5"])
    assert "unknown option --max_train_step; did you mean --max_train_steps?" in capsys.readouterr().err


def test_help_lists_every_option_under_its_heading(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "119")
    with pytest.raises(SystemExit):
        parse_config(Config, ["--help"])
    text = capsys.readouterr().out
    assert text.index("optimizer:") < text.index("--use_ema") < text.index("run:") < text.index("--output_dir")
    assert "in 100% of cases (default: 0.001)" in text


def refuse(config):
    raise ValueError(f"output_dir {config.output_dir} is taken")


def test_an_error_for_the_user_ends_the_script_with_its_message_alone(capsys):
    with pytest.raises(SystemExit) as exit:
        run_script(Config, refuse, ["--output_dir", "here"])
    assert exit.value.code == 1
    assert capsys.readouterr().err == "test_options.py: error: output_dir here is taken\n"


def test_an_error_of_a_library_keeps_its_traceback():
    with pytest.raises(ValueError, match="Invalid literal for Fraction"):
        run_script(Config, lambda config: Fraction("no number"), [])


@pytest.mark.parametrize(
    "interrupt, line, code",
    [
        (KeyboardInterrupt(), "test_options.py: interrupted", 130),
        (Interrupted("kept is all", signal.SIGTERM), "test_options.py: kept is all", 143),
    ],
)
def test_an_interrupt_ends_the_script_with_a_line(interrupt, line, code, capsys):
    def stop(config):
        raise interrupt

    stop.__module__ = __name__
    with pytest.raises(SystemExit) as exit:
        run_script(Config, stop, [])
    assert exit.value.code == code and capsys.readouterr().err == f"\n{line}\n"


@pytest.mark.parametrize(
    "name, answer",
    [
        ("num_epochs", "here it is --max_train_steps: runs end after optimizer steps"),
        ("num-epochs", "here it is --max_train_steps"),
        ("gradient_clip", "here it is --max_grad_norm"),
        ("train_lr", "here it is --learning_rate"),
        ("pretrained_model_name_or_path", "here it is --pretrained_pipeline\n"),
        ("revision", "there is none here: pretrained_pipeline takes the weights that a pipeline loads by default"),
        ("dim", "here it is --block_out_channels"),
        ("scale_lr", "there is none here: learning_rate is the one that is taken"),
        ("dim_mults", "here it is --block_out_channels: the channels themselves"),
        ("proportion_empty_prompts", "here it is --label_dropout"),
    ],
)
def test_an_option_of_another_trainer_is_answered_with_what_it_is_here(name, answer, capsys):
    with pytest.raises(SystemExit):
        parse_config(train_ddpm.TrainConfig, [f"--{name}", "1"])
    assert f"unknown option --{name}; {answer}" in capsys.readouterr().err


def test_the_answer_is_of_the_script_that_was_asked(tmp_path, capsys):
    """What one script has, another has not; and in a file, names stand without hyphens before them."""
    for cls, name, answer in [
        (evaluate.EvaluateConfig, "pretrained_model_name_or_path", "here it is --pipeline"),
        (evaluate.EvaluateConfig, "num_fid_samples", "here it is --num_images"),
        (evaluate.EvaluateConfig, "batch_size", "here it is --eval_batch_size"),
        (train_features.FeaturesConfig, "num_epochs", "here it is --num_train_epochs\n"),
        (TextConfig, "proportion_empty_prompts", "here it is --caption_dropout"),
    ]:
        with pytest.raises(SystemExit):
            parse_config(cls, [f"--{name}", "1"])
        assert answer in capsys.readouterr().err
    file = write(tmp_path / "c.yaml", "gradient_clip: 1.0\n")
    with pytest.raises(SystemExit):
        parse_config(train_ddpm.TrainConfig, ["--config", file])
    assert "unknown option gradient_clip; here it is max_grad_norm" in capsys.readouterr().err


def test_every_answer_names_options_that_some_script_has():
    scripts = [
        *(train_ddpm.TrainConfig, TextConfig, train_vae.TrainVAEConfig),
        *(train_features.FeaturesConfig, evaluate.EvaluateConfig),
    ]
    known = {field.name for cls in scripts for field in dataclasses.fields(cls)}
    accepted = known | {field.metadata["alias"] for cls in scripts for field in dataclasses.fields(cls)}
    for name, foreign in FOREIGN_OPTIONS.items():
        assert foreign.names or foreign.note
        assert set(foreign.names) <= known | {"run"}, name
    # Those of diffusers' and of lucidrains' that these scripts have are accepted, and need no answer.
    ours = {field.name for field in dataclasses.fields(train_ddpm.TrainConfig)}
    assert not {name for name in FOREIGN_OPTIONS if name in ours} and "logger" in accepted


# All options of diffusers' two examples, and all arguments of lucidrains' `Unet`, `GaussianDiffusion` and `Trainer` but the
# objects that are handed over.
DIFFUSERS = """
dataset_name dataset_config_name model_config_name_or_path train_data_dir output_dir overwrite_output_dir cache_dir resolution
center_crop random_flip train_batch_size eval_batch_size dataloader_num_workers num_epochs save_images_epochs save_model_epochs
gradient_accumulation_steps learning_rate lr_scheduler lr_warmup_steps adam_beta1 adam_beta2 adam_weight_decay adam_epsilon
use_ema ema_inv_gamma ema_power ema_max_decay push_to_hub hub_token hub_model_id hub_private_repo logger logging_dir local_rank
mixed_precision prediction_type ddpm_num_steps ddpm_num_inference_steps ddpm_beta_schedule checkpointing_steps
checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention preserve_input_precision
input_perturbation pretrained_model_name_or_path revision variant image_column max_train_samples seed num_train_epochs
max_train_steps gradient_checkpointing scale_lr snr_gamma dream_training dream_detail_preservation use_8bit_adam allow_tf32
offload_ema foreach_ema non_ema_revision max_grad_norm report_to noise_offset validation_epochs tracker_project_name
image_interpolation_mode
"""
LUCIDRAINS = """
dim init_dim out_dim dim_mults channels self_condition learned_variance learned_sinusoidal_cond random_fourier_features
learned_sinusoidal_dim sinusoidal_pos_emb_theta dropout attn_dim_head attn_heads full_attn flash_attn image_size timesteps
sampling_timesteps objective beta_schedule schedule_fn_kwargs ddim_sampling_eta auto_normalize offset_noise_strength
min_snr_loss_weight min_snr_gamma immiscible folder train_batch_size gradient_accumulate_every augment_horizontal_flip train_lr
train_num_steps ema_update_every ema_decay adam_betas save_and_sample_every num_samples results_folder amp mixed_precision_type
split_batches convert_image_to calculate_fid inception_block_idx max_grad_norm num_fid_samples save_best_and_latest_only
"""


@pytest.mark.parametrize("names", [DIFFUSERS, LUCIDRAINS])
def test_every_option_of_another_trainer_is_one_here_or_is_explained(names):
    fields = dataclasses.fields(train_ddpm.TrainConfig)
    known = {field.name for field in fields}
    accepted = known | {field.metadata["alias"] for field in fields}
    unanswered = [name for name in names.split() if name not in accepted and not explain_foreign(name, known)]
    # Of evaluation alone, whose script has the counterpart.
    assert set(unanswered) <= {"num_fid_samples"}


@dataclass(frozen=True)
class Budgeted(Ruled):
    """Options with presets."""

    preset: Literal["quick", "best"] | None = option(None, "budget")
    rates: tuple[float, ...] = option((1.0,), "rates", alias="lrs")
    path: str | None = option(None, "folder")

    PRESETS: ClassVar = {
        "quick": {"steps": 5},
        "best": {"steps": 500, "weight": 0.5, "length": 7, "rates": (0.1, 0.2)},
    }
    REPLACED_BY: ClassVar = {"path": ("rates",)}
    ESSENTIAL: ClassVar = ("steps", "rates")


Budgeted = takes_keywords(Budgeted)


def test_a_preset_gives_what_is_not_given_and_has_an_effect():
    assert Budgeted(preset="best") == Budgeted(preset="best", steps=500, weight=0.5, rates=(0.1, 0.2))
    assert Budgeted(preset="best", kind="c").length == 7 and Budgeted(preset="best", kind="c").weight == 0
    assert Budgeted(preset="best", weight=0.0, steps=3) == Budgeted(
        preset="best", steps=3, weight=0.0, rates=(0.1, 0.2)
    )
    assert Budgeted(preset="best", path="a").rates == (1.0,)
    assert dataclasses.replace(Budgeted(preset="best"), steps=None).steps is None


def test_what_a_preset_means_is_said_and_is_saved(tmp_path, capsys):
    config = parse_config(Budgeted, ["--preset", "best", "--steps", "3"])
    assert describe_preset(config) == "preset best: steps 500 (here 3), weight 0.5, rates 0.1 0.2"
    assert describe_preset(Budgeted()) is None
    assert parse_config(Budgeted, ["--config", write(tmp_path / "c.yaml", to_yaml(config))]) == config
    assert to_command(config, "train.py") == "accelerate launch train.py --steps 3 --weight 0.5 --rates 0.1 0.2"


SAYS_HOW = {
    "model": "unet",
    "block_out_channels": (8, 16),
    "path": "cosine",
    "prediction_type": "epsilon",
    "optimizer": "adamw",
    "learning_rate": 1e-4,
    "beta_schedule": "linear",
}


def test_every_preset_is_a_config_of_both_networks():
    for config in (train_ddpm.TrainConfig, TextConfig):
        for preset in config.PRESETS:
            for model in ("unet", "dit"):
                made = config(preset=preset, model=model)
                assert made.max_train_time and describe_preset(made).startswith(f"preset {preset}: max_train_time ")
    assert train_ddpm.TrainConfig(preset="best").block_out_channels == (128, 256, 256)
    assert train_ddpm.TrainConfig(preset="best", model="dit", dit_size="DiT-S/2").num_layers is None
    assert train_ddpm.TrainConfig(preset="good", max_train_steps=5).max_train_time is None


@pytest.mark.parametrize(
    "given, preset",
    [
        ({}, None),
        ({"max_train_time": "59s"}, None),
        ({"max_train_time": "1m"}, "quick"),
        ({"max_train_time": "19m", "train_batch_size": 8}, "quick"),
        ({"max_train_time": "19m", "dataset_name": "digits"}, None),
        ({"max_train_time": "20m"}, "good"),
        ({"max_train_time": "100h"}, "good"),
        ({"max_train_time": "1h", "max_train_steps": 9}, None),
        ({"max_train_time": "1h", "preset": "none"}, "none"),
        ({"max_train_time": "1h", "preset": "quick"}, "quick"),
        *(({"max_train_time": "1h", name: value}, None) for name, value in SAYS_HOW.items()),
    ],
)
def test_a_run_by_time_that_says_nothing_of_how_takes_the_preset_of_its_time(given, preset):
    given = {"dataset_name": "path/to/images"} | given
    config = train_ddpm.TrainConfig(**given)
    assert config.preset == preset
    named = train_ddpm.TrainConfig(**given | {"preset": "none" if preset is None else preset})
    assert config == dataclasses.replace(named, preset=preset)


def test_a_run_of_the_digits_that_come_with_the_package_takes_none():
    assert train_ddpm.TrainConfig(max_train_time="1h").preset is None


def test_a_preset_leaves_the_network_and_the_path_to_options_that_name_others():
    quick = partial(train_ddpm.TrainConfig, preset="quick")
    assert (quick().model, quick().hidden_size, quick().path) == ("dit", 128, "linear")
    for options in ({"block_out_channels": (16, 32)}, {"sequence_layout": "length_channels"}):
        assert (quick(**options).model, quick(**options).hidden_size, quick(**options).path) == (
            "unet",
            None,
            "linear",
        )
    assert (quick(beta_schedule="linear").model, quick(beta_schedule="linear").path) == ("dit", None)
    assert quick(calibrate=True).path == "linear"
    assert (quick().timestep_sampling, quick().model_guidance_scale) == ("logit_normal", 2.5)
    others = ({"path": "learned"}, {"pretrained_pipeline": None, "timestep_shift": 2.0}, {"objective": "simple"})
    assert [(quick(**options).timestep_sampling, quick(**options).model_guidance_scale) for options in others] == [
        *(("stratified", None), ("stratified", 2.5), ("logit_normal", None)),
    ]
    assert TextConfig(preset="quick").model_guidance_scale is None


def test_a_preset_leaves_the_path_to_a_sampler_that_the_linear_one_has_not():
    """Such as a run by time that says no more than its scheduler, which nobody asked for the linear path."""
    of_time = partial(train_ddpm.TrainConfig, dataset_name="path/to/images", max_train_time="10m")
    for options in ({"scheduler": "ddpm"}, {"scheduler": "ddim"}, {"timestep_spacing": "leading"}):
        made = of_time(**options)
        assert (made.preset, made.model, made.is_linear) == ("quick", "dit", False)
        assert (made.timestep_sampling, made.model_guidance_scale) == ("stratified", None)
    for options in ({"scheduler": "flow"}, {"timestep_spacing": "linspace"}):
        assert of_time(**options).is_linear and of_time(**options).timestep_sampling == "logit_normal"


@pytest.mark.parametrize("preset", ["quick", "good", None])
def test_a_run_that_goes_on_has_the_preset_that_it_began_with(tmp_path, preset):
    """Whatever time it is given now."""
    for folder in (tmp_path, tmp_path / "checkpoint-5"):
        folder.mkdir(exist_ok=True)
        write(folder / "train_config.yaml", yaml.safe_dump({"preset": preset}))
    again = partial(train_ddpm.TrainConfig, dataset_name="path/to/images", output_dir=str(tmp_path))
    for request in ("latest", "checkpoint-5", str(tmp_path / "checkpoint-5")):
        for budget in ({"max_train_time": "10m"}, {"max_train_time": "2h"}, {"max_train_steps": 9}):
            assert again(**budget, resume_from_checkpoint=request).preset == preset


def test_a_run_that_goes_on_is_found_in_the_folder_that_it_is_given_by_default(tmp_path, monkeypatch):
    """Once: settling the options for the machine does not look again."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "images"
    folder.mkdir(parents=True)
    write(folder / "train_config.yaml", yaml.safe_dump({"preset": "quick"}))
    options = {"dataset_name": "path/to/images", "max_train_time": "30m", "resume_from_checkpoint": "latest"}
    config = train_ddpm.TrainConfig(**options)
    assert (config.preset, config.model) == ("quick", "dit")
    (folder / "train_config.yaml").unlink()
    settled = resolve_for_machine(config)
    assert (settled.output_dir, settled.preset, settled.model) == ("runs/images", "quick", "dit")


def test_an_end_of_an_interval_may_be_infinite():
    assert Budgeted(rates=(0.5, float("inf"))).rates == (0.5, float("inf"))


def test_options_that_were_given_are_known_though_they_are_the_defaults(tmp_path):
    config = parse_config(Budgeted, ["--config", write(tmp_path / "c.yaml", "weight: 0.0"), "--rates", "1.0"])
    assert given_names(config) == {"weight", "rates"}
    assert given_names(Budgeted(steps=7)) == {"steps"}


def test_keywords_are_those_of_a_yaml_file(tmp_path):
    assert Budgeted(lrs=2, path=tmp_path).rates == (2.0,) and Budgeted(path=tmp_path).path == str(tmp_path)
    assert train_ddpm.TrainConfig(resolution=32, train_data_dir="a") == train_ddpm.TrainConfig(
        resolution=(32,), dataset_name="a"
    )
    with pytest.raises(TypeError, match="^TrainConfig: unknown option lr; here it is learning_rate$"):
        train_ddpm.TrainConfig(lr=1e-4)
    with pytest.raises(TypeError, match="unknown option stepps; did you mean steps"):
        Budgeted(stepps=1)
    with pytest.raises(ValueError, match="steps must be an integer, got 1.5"):
        Budgeted(steps=1.5)
    with pytest.raises(ValueError, match="kind must be one of a, b, c, got 'd'"):
        Budgeted(kind="d")


def test_help_is_short_and_help_all_is_not(capsys):
    def listed(option):
        with pytest.raises(SystemExit):
            parse_config(Budgeted, [option])
        return capsys.readouterr().out

    short, full = listed("--help"), listed("--help-all")
    assert "--steps" in short and "--rates" in short and "--weight" not in short
    assert "--help-all lists all 8 options" in short
    assert all(f"--{field.name}" in full for field in dataclasses.fields(Budgeted)) and "lists all" not in full


def test_the_options_that_matter_are_options_and_few():
    for config in (train_ddpm.TrainConfig, TextConfig, train_vae.TrainVAEConfig, evaluate.EvaluateConfig):
        names = [field.name for field in dataclasses.fields(config)]
        assert set(config.ESSENTIAL) <= set(names) and len(config.ESSENTIAL) <= 30 < len(names)
