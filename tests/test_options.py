import dataclasses
import signal
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import pytest
import yaml

from diffusers_ext.foreign_options import FOREIGN_OPTIONS
from diffusers_ext.options import (
    check_options,
    fixed_on_resume,
    fixed_option,
    option,
    parse_config,
    read_yaml,
    run_script,
    to_command,
    to_yaml,
)
from diffusers_ext.recipes.text_to_image import TextConfig
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
        ({"kind": "c", "weight": 1.0}, "weight has no meaning without kind a or b: give both or neither"),
        ({"length": 6}, "length has no meaning without kind c: give both or neither"),
        ({"start": 1}, "start has no meaning without steps: give both or neither"),
    ],
)
def test_an_option_is_held_to_its_rules(values, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Ruled(**values)


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
        ("pretrained_model_name_or_path", "there is none here: models are trained from scratch; a run goes on by"),
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
