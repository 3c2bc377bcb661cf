"""`diffusers-ext doctor`: what it finds right and wrong, with the code that it ends with."""

import re
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from diffusers_ext.commands import doctor
from diffusers_ext.commands.doctor import DoctorConfig, examine, examine_folder, examine_version, main


ROOT = Path(__file__).parents[1]


def test_the_tested_versions_are_those_of_the_constraints():
    pinned = dict(re.findall(r"^([\w-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    assert {name: pinned[name] for name in doctor.TESTED} == doctor.TESTED


@pytest.mark.parametrize(
    "installed, kind, text",
    [
        ("2.13.0+cpu", "ok", "2.13.0+cpu (tested: 2.13.0)"),
        ("2.7.1", "ok", "2.7.1 (tested: 2.13.0)"),
        ("2.14.0.dev1", "note", "2.14.0.dev1 is newer than 2.13.0, which is tested"),
        ("2.5.1", "wrong", "2.5.1, and >=2.6 is needed: pip install 'torch==2.13.0'"),
        (None, "wrong", "not installed: pip install 'torch==2.13.0'"),
    ],
)
def test_a_version_is_held_against_what_is_needed_and_what_is_tested(installed, kind, text):
    assert examine_version("torch", installed, Requirement("torch>=2.6"), "2.13.0") == (kind, "torch", text)


def test_a_disk_without_room_and_a_folder_that_is_not_ones_own_are_wrong(tmp_path, monkeypatch):
    assert examine_folder("runs", tmp_path / "not" / "yet").subject == "runs"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: (100, 99, 5 * 10**9))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5e8})())
    assert examine_folder("runs", tmp_path).kind == "wrong"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5e9})())
    assert examine_folder("runs", tmp_path).kind == "note"
    (tmp_path / "file").write_text("")
    assert "cannot be written to" in examine_folder("runs", tmp_path / "file" / "runs").text


@pytest.mark.parametrize(
    "there, described, precision",
    [
        ({"avx2", "avx512", "amx_bf16"}, "AVX-512, AMX (bf16 in hardware)", torch.bfloat16),
        ({"avx2", "avx512", "avx512_bf16"}, "AVX-512, AVX-512 BF16 (bf16 in hardware)", torch.bfloat16),
        ({"avx2"}, "AVX2, no bf16 in hardware", torch.float32),
    ],
)
def test_what_is_fast_follows_from_what_the_processor_has(there, described, precision, monkeypatch):
    monkeypatch.setattr(doctor, "capabilities", lambda: there)
    monkeypatch.setattr(doctor, "default_device", lambda: "cpu")
    monkeypatch.setattr(doctor, "fast_precision", lambda device: precision)
    assert doctor.describe_capabilities() == described
    said = {finding.subject: finding.text for finding in doctor.say_what_is_fast()}["precision"]
    assert said.startswith(
        f"--mixed_precision {'bf16' if precision == torch.bfloat16 else 'no'}, which is the default"
    )


@pytest.mark.parametrize(
    "text, kind, said",
    [
        ("distributed_type: 'NO'\nmixed_precision: 'no'\n", "ok", "NO, mixed precision no"),
        ("distributed_type: DEEPSPEED\ndeepspeed_config: {}\n", "wrong", "training is by DDP or FSDP2"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 1}\n", "wrong", "training is by DDP or FSDP2"),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_version: 2}\n", "ok", "FSDP"),
        ("distributed_type: 'NO'\nmixed_precision: fp16\n", "wrong", "which needs a GPU"),
        ("no_such_key: 1\n", "wrong", "cannot be read"),
    ],
)
def test_a_configuration_of_accelerate_that_training_refuses_is_wrong(text, kind, said, tmp_path, monkeypatch):
    path = tmp_path / "default_config.yaml"
    path.write_text("compute_environment: LOCAL_MACHINE\nnum_processes: 1\nuse_cpu: true\n" + text)
    monkeypatch.setattr(doctor, "default_config_file", str(path))
    monkeypatch.setattr(doctor, "default_device", lambda: "cpu")
    (finding,) = doctor.examine_accelerate()
    assert finding.kind == kind and said in finding.text


def test_threads_that_leave_cores_idle_are_noted_and_too_many_are_wrong(monkeypatch):
    monkeypatch.setattr(doctor, "available_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(doctor.psutil, "cpu_count", lambda logical: 4)
    for value, kind in (("1", "note"), ("4", "ok"), ("9", "wrong")):
        monkeypatch.setenv("OMP_NUM_THREADS", value)
        assert next(doctor.examine_threads()).kind == kind


def test_it_looks_at_all_and_ends_with_1_if_something_is_wrong(tmp_path, monkeypatch, capsys):
    config = DoctorConfig(output_dir=str(tmp_path))
    found = examine(config)
    assert {finding.subject for group in found.values() for finding in group} >= {
        "processor",
        "precision",
        "torch",
        "runs",
    }
    assert all(finding.text and "None" not in finding.text for group in found.values() for finding in group)
    fine = {"machine": [doctor.Finding("ok", "cores", "2"), doctor.Finding("note", "load", "9")]}
    monkeypatch.setattr(doctor, "examine", lambda config: fine)
    main(config)
    assert capsys.readouterr().out.endswith(" ! load               9\nnothing wrong (x), 1 note (!)\n")
    fine["disk"] = [doctor.Finding("wrong", "runs", "full")]
    with pytest.raises(SystemExit) as exit:
        main(config)
    assert exit.value.code == 1 and capsys.readouterr().out.endswith("1 wrong (x), 1 note (!)\n")
