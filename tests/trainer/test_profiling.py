import json
import re
import time

import pytest

from diffusers_ext.data.prepare import prepare_images
from diffusers_ext.trainer.profiling import TRACED_STEPS
from runs import assert_same_run, forget_accelerate, squared_error, trainer


@pytest.fixture(scope="module")
def data():
    return prepare_images("digits", max_samples=20)


def table(output):
    """Seconds, milliseconds a step (or None) and share of each row."""
    rows = {}
    for line in output.splitlines():
        if match := re.fullmatch(r"(\S.{31}) *(-?[\d.]+) +([\d.]+)? +(-?[\d.]+)%", line):
            name, seconds, a_step, share = match.groups()
            rows[name.strip()] = (float(seconds), a_step and float(a_step), float(share))
    return rows


def slow_error(model, batch):
    time.sleep(0.03)
    return squared_error(model, batch)


def test_table_says_where_the_time_went(data, tmp_path, capsys):
    settings = {"save_images_steps": 5, "on_images": lambda trainer: time.sleep(0.05), "profile": True}
    trainer(data, tmp_path / "run", loss=slow_error, **settings).train()
    output = capsys.readouterr().out
    rows = table(output)
    assert {"waiting for data", "forward and loss", "backward", "clipping of gradients", "optimizer"} < set(rows)
    assert {"EMA", "rest of the step", "making images", "saving", "tracing"} < set(rows)
    assert "adversary" not in rows
    assert rows["forward and loss"][1] > 30  # and longer on a busy machine, as each of these
    # Nine steps are timed part by part, three are traced.
    assert rows["forward and loss"][0] == pytest.approx(9 * rows["forward and loss"][1] / 1000, abs=1e-3)
    assert rows["traced steps"][0] > TRACED_STEPS * 0.03
    assert rows["making images"][0] >= 0.1 and rows["making images"][1] is None
    total = rows.pop("total")
    assert sum(seconds for seconds, _, _ in rows.values()) == pytest.approx(total[0], abs=0.01)
    assert sum(share for _, _, share in rows.values()) == pytest.approx(100, abs=1)
    assert all(seconds > -1e-3 for seconds, _, _ in rows.values())
    shares = re.search(r"time: ([\d.]+)% in the model, ", output)
    beside = ("waiting for data", "making images", "saving", "tracing", "writing its page")
    assert float(shares[1]) == pytest.approx(100 - sum(rows[name][2] for name in beside), abs=8)  # of a later reading


def test_trace_has_the_parts_of_three_steps(data, tmp_path, capsys):
    trainer(data, tmp_path / "run", profile=True, gradient_accumulation_steps=2).train()
    assert f"trace of 3 steps in {tmp_path}/run/profile" in capsys.readouterr().out
    events = json.loads((tmp_path / "run" / "profile" / "profile_0.json").read_text())["traceEvents"]
    names = [event["name"] for event in events if event.get("cat") == "user_annotation"]
    assert [names.count(name) for name in ("step", "backward", "EMA")] == [3, 6, 3]
    assert any("conv" in event["name"] for event in events if event.get("cat") == "cpu_op")


@pytest.mark.parametrize(
    "steps, said", [(4, "no step was traced: tracing begins after 5 steps"), (6, "trace of 1 steps")]
)
def test_a_run_that_ends_before_the_trace_does_says_so(data, tmp_path, capsys, steps, said):
    trainer(data, tmp_path / "run", profile=True, max_train_steps=steps).train()
    output = capsys.readouterr().out
    assert said in output
    assert ("traced steps" in table(output)) == ("tracing" in table(output)) == (steps > 5)
    assert (tmp_path / "run" / "profile" / "profile_0.json").exists() == (steps > 5)


def test_profiling_changes_nothing_and_leaves_nothing_when_off(data, tmp_path, capsys):
    trainer(data, tmp_path / "with", profile=True).train()
    capsys.readouterr()
    trainer(data, tmp_path / "without").train()
    assert_same_run(tmp_path / "with", tmp_path / "without", 12)
    assert not (tmp_path / "without" / "profile").exists()
    output = capsys.readouterr().out
    assert "% in the model" in output and "forward and loss" not in output


def test_an_error_among_the_traced_steps_ends_the_profiler(data, tmp_path):
    def loss(model, batch):
        loss.calls += 1
        if loss.calls == 7:
            raise RuntimeError("in the middle")
        return squared_error(model, batch)

    loss.calls = 0
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer(data, tmp_path / "run", loss=loss, profile=True).train()
    forget_accelerate()
    trainer(data, tmp_path / "again", profile=True).train()  # a profiler that still ran would refuse
    assert (tmp_path / "again" / "profile" / "profile_0.json").exists()
