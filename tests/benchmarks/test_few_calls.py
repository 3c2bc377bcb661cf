"""The table of samplers says what was measured, and each row is a sampler that has the pipeline's path."""

import json

import pytest

from diffusers_ext import ConsistencyScheduler, ExtDDIMScheduler, FlowScheduler


@pytest.fixture(scope="module")
def bench(script):
    return script("bench_few_calls")


def listed(pair, number=3):
    scheduler, _ = pair
    scheduler.set_timesteps(number)
    return scheduler.timesteps.tolist()


def test_samplers_of_a_table_of_betas_are_of_the_calibrated_config(bench):
    lists = {"spacing": "trailing", "trajectory": {"3": [990, 500, 20]}, "bound": {"3": [999, 100, 3]}}
    table = {"timesteps": [0, 100, 999], "x0_variance": [1e-4, 0.01, 0.25]}
    chosen = {
        "timestep_spacing": "optimal",
        "optimal_timesteps": lists,
        "analytic_variance": table,
        "multistep_order": 2,
    }
    rows = bench.samplers(dict(ExtDDIMScheduler(variance_type="analytic", **chosen).config))
    trailing = listed((ExtDDIMScheduler(timestep_spacing="trailing"), {}))
    even = ("DDPM, fixed_small", "DDPM, fixed_large", "DDPM, analytic", "DDIM", "analytic DDIM", "DDIM, second order")
    for name in even:
        assert listed(rows[name]) == trailing
    assert listed(rows["second order, by the trajectory"]) == [990, 500, 20]
    orders = {name: rows[name][0].config.get("multistep_order") for name in rows}
    assert orders["DDIM, second order"] == orders["second order, by the trajectory"] == 2
    assert orders["DDIM"] == orders["DDIM, by the trajectory"] == orders["analytic DDIM"] == 1
    assert (
        listed(rows["DDIM, by the trajectory"]) == listed(rows["DDPM, analytic, by the trajectory"]) == [990, 500, 20]
    )
    kinds = {name: rows[name][0].config.variance_type for name in rows if name.startswith("DDPM")}
    assert kinds["DDPM, fixed_large"] == "fixed_large" and kinds["DDPM, fixed_small"] == "fixed_small"
    assert kinds["DDPM, analytic"] == kinds["DDPM, analytic, by the bound"] == "analytic"
    assert sum(name.startswith("diffusers'") for name in rows) == 4


def test_samplers_of_the_linear_path_visit_the_chosen_timesteps_and_their_own(bench):
    lists = {"spacing": "trailing", "trajectory": {"2": [1000, 300]}}
    chosen = {"timestep_spacing": "optimal", "optimal_timesteps": lists, "multistep_order": 2}
    rows = bench.samplers(dict(FlowScheduler(**chosen).config))
    assert listed(rows["Euler, by the trajectory"], 2) == [1000, 300] and listed(rows["Euler"], 2) == [1000, 500]
    assert listed(rows["second order, by the trajectory"], 2) == [1000, 300]
    assert listed(rows["Euler, second order"], 2) == [1000, 500]
    orders = {name: rows[name][0].config.multistep_order for name in rows if not name.startswith("diffusers'")}
    assert [name for name, order in orders.items() if order == 2] == [
        "Euler, second order",
        "second order, by the trajectory",
    ]
    assert all(listed(pair, 2)[0] >= 999 for pair in rows.values())


def test_the_table_has_the_mean_the_range_and_the_number_of_its_pipelines(bench, tmp_path):
    def cell(*distances):
        return {f"seed_{seed}": {"distance": value, "calls": 5.0} for seed, value in enumerate(distances)}

    rows = {
        "DDIM": {"5": cell(4.0, 6.0), "10": cell(2.0)},
        "DDPM": {"10": cell()},
        "students, progressive": {"2": cell(3.0)},
    }
    assert bench.table(rows).splitlines()[2:] == [
        "| DDIM |  | 5 (4 to 6) | 2 (1 of 2) |",
        "| students, progressive | 3 (1 of 2) |  |  |",
    ]
    bench.draw({"guided": rows, "plain": {}}, 0.5, tmp_path / "few.png")
    assert (tmp_path / "few.png").stat().st_size > 1000


def test_no_pipeline_is_loaded_where_every_cell_is_there(bench, tmp_path):
    lists = {"spacing": "trailing", "trajectory": {"3": [990, 500, 20]}, "bound": {"3": [999, 100, 3]}}
    table = {"timesteps": [0, 100, 999], "x0_variance": [1e-4, 0.01, 0.25]}
    path = str(tmp_path)  # of a scheduler, and no network
    ExtDDIMScheduler(optimal_timesteps=lists, timestep_spacing="trailing", analytic_variance=table).save_pretrained(
        tmp_path / "scheduler"
    )
    index = {"_class_name": "GuidedDiffusionPipeline", "call_defaults": {"num_inference_steps": 2}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    cell = {path: {"distance": 1.0, "calls": 3.0}}
    results = {"plain": {"DDIM": {"3": cell}, "students, progressive": {"2": cell}}, "guided": {}}
    options = ["--pipelines", path, "--students", path, "--ways", "plain", "--num_steps", "3", "--samplers", "DDIM"]
    before = json.dumps(results)
    bench.measure_all(bench.parse([path, *options]), None, results, None)
    assert json.dumps(results) == before


def test_students_are_shown_at_the_numbers_of_steps_that_they_have(bench, tmp_path):
    """With those of the halvings before, and a consistency model at all that it has timesteps for."""
    for name, number, scheduler in (
        ("progressive", 1, ExtDDIMScheduler()),
        ("progressive/stages/4_steps", 4, ExtDDIMScheduler()),
        ("progressive/stages/2_steps", 2, ExtDDIMScheduler()),
        ("consistency", 2, ConsistencyScheduler()),
    ):
        scheduler.save_pretrained(tmp_path / name / "scheduler")
        index = {"_class_name": "GuidedDiffusionPipeline", "call_defaults": {"num_inference_steps": number}}
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    cells = bench.cells_of_student(str(tmp_path / "progressive"), [1, 50])
    assert [(name, number) for name, number, _ in cells] == [("students, progressive", number) for number in (1, 2, 4)]
    assert cells[1][2] == str(tmp_path / "progressive/stages/2_steps")
    cells = bench.cells_of_student(str(tmp_path / "consistency"), [4, 1, 50])
    assert cells == [("student, consistency", number, str(tmp_path / "consistency")) for number in (1, 4)]


def test_likelihoods_are_by_variance_and_by_where_their_timesteps_end(bench):
    lists = {"spacing": "trailing", "trajectory": {"2": [990, 20]}, "bound": {"2": [999, 30]}}
    table = {"timesteps": [0, 100, 999], "x0_variance": [1e-4, 0.01, 0.25]}
    calibrated = ExtDDIMScheduler(timestep_spacing="optimal", optimal_timesteps=lists, analytic_variance=table)
    rows = bench.likelihood_samplers(dict(calibrated.config))
    assert rows["fixed_small, leading"].list_timesteps(2, "bound").tolist() == [500, 0]
    assert rows["analytic, trailing"].list_timesteps(2, "bound").tolist() == [999, 499]
    assert rows["analytic, by the bound"].list_timesteps(2, "bound").tolist() == [999, 30]
    assert {name: row.config.variance_type for name, row in rows.items()} == {
        name: name.split(",")[0] for name in rows
    }
    assert "analytic, by the bound" not in bench.likelihood_samplers(
        dict(ExtDDIMScheduler(analytic_variance=table).config)
    )
