import numpy as np
import pytest
from diffusers import DDPMScheduler

from diffusers_ext.diffusion.timesteps import TIMESTEP_SPACINGS, check_timesteps, make_timesteps


@pytest.mark.parametrize("spacing", TIMESTEP_SPACINGS)
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_every_number_of_steps_gives_a_descending_list_in_range(spacing, steps_offset):
    for n in range(1, 1001):
        timesteps = make_timesteps(spacing, n, 1000, steps_offset)
        assert timesteps.dtype == np.int64 and timesteps.shape == (n,)
        assert (np.diff(timesteps) < 0).all()
        assert 0 <= timesteps[-1] and timesteps[0] <= 999


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps_offset", [0, 1])
def test_lists_are_those_of_diffusers_where_those_are_in_range(spacing, steps_offset):
    """diffusers leaves the path for "leading" at n = T with an offset, and for "trailing" appends a -1 at some n."""
    stock = DDPMScheduler(timestep_spacing=spacing, steps_offset=steps_offset)
    num_wrong = 0
    for n in range(1, 1001):
        stock.set_timesteps(n)
        theirs, ours = stock.timesteps.numpy(), make_timesteps(spacing, n, 1000, steps_offset)
        if theirs[0] <= 999 and theirs[-1] >= 0:
            assert np.array_equal(theirs, ours)
        else:
            num_wrong += 1
            assert np.array_equal(theirs[:n], ours) or spacing == "leading"
    assert num_wrong == {"leading": steps_offset, "trailing": 62, "linspace": 0}[spacing]


def test_offset_is_cut_where_it_would_leave_the_path():
    assert make_timesteps("leading", 1000, 1000, steps_offset=1).tolist() == list(range(999, -1, -1))
    assert make_timesteps("leading", 10, 1000, steps_offset=500)[0] == 999


def test_spacings_by_hand():
    assert make_timesteps("leading", 4, 10).tolist() == [6, 4, 2, 0]
    assert make_timesteps("trailing", 4, 10).tolist() == [9, 7, 4, 1]  # 10, 7.5, 5, 2.5, halves to even
    assert make_timesteps("linspace", 4, 10).tolist() == [9, 6, 3, 0]
    assert make_timesteps("quadratic", 4, 10).tolist() == [9, 4, 1, 0]  # 9 (i / 3)^2
    assert make_timesteps("quadratic", 1, 10).tolist() == [9]


def test_quadratic_steps_grow_with_the_noise():
    gaps = -np.diff(make_timesteps("quadratic", 20, 1000))
    assert (np.diff(gaps) <= 1).all() and gaps[0] > 10 * gaps[-1]


@pytest.mark.parametrize("n", [0, -1, 1001, 2.0, True, None])
def test_number_of_steps_out_of_range_is_refused(n):
    with pytest.raises(ValueError, match=r"num_inference_steps must be an integer in \[1, 1000\]"):
        make_timesteps("leading", n, 1000)


def test_unknown_spacing_names_the_choices():
    with pytest.raises(ValueError, match="one of leading, trailing, linspace, quadratic, got 'karras'"):
        make_timesteps("karras", 10, 1000)


@pytest.mark.parametrize(
    ("timesteps", "message"),
    [
        ([], "at least one integer"),
        ([[3, 2]], "at least one integer"),
        ([3, 2.5], "must be integers"),
        (["a"], "must be integers"),
        ([1000, 3], r"in \[0, 999\], got 1000"),
        ([3, -1], r"in \[0, 999\], got -1"),
        ([3, 5], "descending order, got 3 before 5"),
        ([5, 5, 3], "descending order, got 5 before 5"),
    ],
)
def test_bad_lists_are_refused(timesteps, message):
    with pytest.raises(ValueError, match=message):
        check_timesteps(timesteps, 1000)


def test_good_lists_are_kept():
    assert check_timesteps([999, 500.0, 0], 1000).tolist() == [999, 500, 0]
