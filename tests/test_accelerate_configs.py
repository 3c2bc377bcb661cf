"""The configurations of accelerate in `docs/accelerate/`, by accelerate's own reader and launcher, and in a run."""

import os
from pathlib import Path

import pytest
from accelerate import DistributedType, PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from diffusers_ext.commands import doctor
from diffusers_ext.commands.train_ddpm import TrainConfig, main
from processes import in_ranks
from runs import forget_accelerate


ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "accelerate"
FILES = sorted(path.name for path in FOLDER.glob("*.yaml"))


def launched(name, *options):
    """What `accelerate launch` makes of a file, and the environment that it gives to the processes."""
    words = ["--config_file", str(FOLDER / name), *options, "training/train_ddpm.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    return arguments, prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize("name", FILES)
def test_a_configuration_is_read_and_is_one_that_training_takes(name, monkeypatch):
    config = load_config_from_file(str(FOLDER / name))
    expected = "FSDP" if "fsdp2" in name else "MULTI_GPU"
    assert config.distributed_type == DistributedType(expected)
    assert config.num_machines == (2 if "two_nodes" in name else 1)
    assert config.num_processes % config.num_machines == 0
    monkeypatch.setattr(doctor, "default_config_file", str(FOLDER / name))
    (finding,) = doctor.examine_accelerate()
    assert finding.kind == "ok"


@pytest.mark.parametrize("name", FILES)
def test_the_launcher_starts_what_the_file_says(name):
    arguments, environment = launched(name, "--num_processes", "4")
    assert arguments.num_processes == 4 and arguments.multi_gpu == ("fsdp2" not in name)
    assert ("FSDP_VERSION" in environment) == ("fsdp2" in name)
    if "fsdp2" in name:
        assert environment["ACCELERATE_USE_FSDP"] == "true" and environment["FSDP_VERSION"] == "2"
        assert environment["FSDP_AUTO_WRAP_POLICY"] == "TRANSFORMER_BASED_WRAP"


def test_the_second_of_two_machines_has_its_rank_by_an_option():
    for name in (name for name in FILES if "two_nodes" in name):
        arguments, _ = launched(name, "--machine_rank", "1", "--main_process_ip", "192.0.2.7")
        assert (arguments.machine_rank, arguments.num_machines, arguments.num_processes) == (1, 2, 16)
        assert (arguments.main_process_ip, int(arguments.main_process_port)) == ("192.0.2.7", 29500)


def test_two_nodes_are_as_one_but_for_where_they_are():
    for one, two in (("ddp.yaml", "two_nodes.yaml"), ("fsdp2.yaml", "two_nodes_fsdp2.yaml")):
        one, two = (load_config_from_file(str(FOLDER / name)).to_dict() for name in (one, two))
        where = {"num_machines", "num_processes", "machine_rank", "main_process_ip", "main_process_port"}
        assert {k: v for k, v in one.items() if k not in where} == {k: v for k, v in two.items() if k not in where}


def test_fsdp2_cuts_the_network_at_its_blocks(tmp_path):
    """In two processes on a CPU, which accelerate is told are GPUs, since it offers FSDP for those only."""
    _, environment = launched("fsdp2.yaml")
    options = {name: value for name, value in environment.items() if name.startswith(("FSDP_", "ACCELERATE_USE_FSDP"))}
    network = {"model": "dit", "hidden_size": 8, "num_layers": 2, "num_attention_heads": 2}
    small = {"max_train_steps": 2, "train_batch_size": 2, "num_inference_steps": 1, "sample_columns": 1}
    small |= {"max_train_samples": 20, "num_threads": 1, "mixed_precision": "no", "calibrate": False}

    def work():
        import torch.distributed.fsdp as fsdp

        spread, shard = [], fsdp.fully_shard
        fsdp.fully_shard = lambda module, **kwargs: spread.append(type(module).__name__) or shard(module, **kwargs)
        forget_accelerate()
        PartialState(cpu=True)
        os.environ |= options
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        main(TrainConfig(**network, **small, output_dir=str(tmp_path / "run")))
        print("spread:", *spread)

    assert in_ranks(work).count("spread: DiTBlock DiTBlock DiTModel") == 2
    assert (tmp_path / "run" / "model_index.json").is_file()
