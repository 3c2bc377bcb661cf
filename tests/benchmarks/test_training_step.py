"""Steps that benchmarks time are steps of training, by turns, each setting in a process of its own."""

import os

import pytest
import torch

from tiny import tiny_unet


@pytest.fixture(scope="module")
def steps(script):
    return script("training_step")


def test_each_setting_is_a_process_of_its_own_that_trains_its_network(steps, tmp_path):
    def make(name):
        class Watched(steps.OurStep):
            def __call__(self, *batch, **conditions):
                before = [parameter.detach().clone() for parameter in self.model.parameters()]
                super().__call__(*batch, **conditions)
                moved = any(not torch.equal(*pair) for pair in zip(before, self.model.parameters(), strict=True))
                with (tmp_path / name).open("a") as file:
                    file.write(f"{os.getpid()} {tuple(batch[0].shape)} {moved}\n")

        return lambda: Watched(tiny_unet(), False)

    settings = {name: steps.Setting(make(name), keeps_memory=False) for name in ("one", "other")}
    measured = steps.measure(settings, rounds=2, threads=1, shape=(3, 1, 8, 8))
    lines = {name: (tmp_path / name).read_text().splitlines() for name in settings}
    pids = {name: {line.split()[0] for line in of_one} for name, of_one in lines.items()}
    assert all(len(found) == 1 for found in pids.values()) and pids["one"] != pids["other"]
    assert str(os.getpid()) not in {*pids["one"], *pids["other"]}
    assert all(line.endswith("(3, 1, 8, 8) True") for of_one in lines.values() for line in of_one)
    assert {name: len(of_one) for name, of_one in lines.items()} == {"one": 4, "other": 4}  # two of them to warm up
    for row in measured.values():
        assert row.seconds > 0 and row.peak_memory > 1
        assert row.num_parameters == sum(parameter.numel() for parameter in tiny_unet().parameters())


def test_ratios_are_those_to_the_stock_networks(steps, monkeypatch, capsys):
    seconds = {"diffusers, fp32": 4.0, "diffusers, bf16 autocast": 2.0, "diffusers_ext, fp32": 1.0}
    asked = {}

    def measure(settings, rounds, threads, shape, num_classes):
        asked.update({name: setting.keeps_memory for name, setting in settings.items()})
        return {name: steps.Measured(seconds[name], 0, 1, 10**6) for name in settings}

    monkeypatch.setattr(steps, "measure", measure)
    steps.compare(dict.fromkeys(seconds), 1, 1, (2, 1, 8, 8))
    rows = [line.split()[-3:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert rows == [["4.000", "1.000", "2.000"], ["2.000", "0.500", "1.000"], ["1.000", "0.250", "0.500"]]
    assert asked == dict(zip(seconds, [False, False, True], strict=True))  # as their scripts run
