"""Which cases of products of parameters the suite runs."""

from itertools import product

import pytest

from cases import covering


@pytest.mark.parametrize("sizes", [(1,), (4,), (3, 5), (2, 2, 4), (1, 7)])
def test_each_value_occurs_in_as_few_cases_as_there_are_values_of_the_longest_parameter(sizes):
    cases = [dict(zip("abc", values, strict=False)) for values in product(*map(range, sizes))]
    chosen = covering(cases)
    assert chosen == sorted(set(chosen)) and len(chosen) == max(sizes)
    assert {value for index in chosen for value in cases[index].items()} == {v for case in cases for v in case.items()}


def test_a_product_with_holes_is_covered():
    cases = [{"a": 0, "b": 0}, {"a": 0, "b": 1}, {"a": 0, "b": 2}, {"a": 1, "b": 2}]
    assert covering(cases) == [0, 1, 3] and covering([]) == []


@pytest.mark.product
@pytest.mark.parametrize("first, second", [(0, 0), (0, 1), (1, 0)])
@pytest.mark.parametrize("third", ["a", "b"])
def test_rows_of_values_stay_whole(first, second, third, request, pytestconfig):
    """This test is such a product, of which these are the cases that are run: three, or all six."""
    cases = [item for item in request.session.items if item.originalname == "test_rows_of_values_stay_whole"]
    asked_alone = len({(item.callspec.params["first"], item.callspec.params["second"]) for item in cases}) < 3
    assert asked_alone or len(cases) == (6 if pytestconfig.getoption("cases") == "all" else 3)
