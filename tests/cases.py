"""Which cases of a test with several parameters are run: of a product, so many that each value of each parameter occurs."""

from collections.abc import Hashable, Mapping, Sequence


def covering(cases: Sequence[Mapping[str, Hashable]]) -> list[int]:
    """The indices of a few cases in which each value of each parameter occurs, in order.

    The next case is the first of those that bring the most values that have not occurred: of a product of two parameters it
    walks the diagonal.

    Args:
        cases: The values of the parameters of each case.
    """
    missing = {value for case in cases for value in case.items()}
    chosen = []
    while missing:
        best = max(range(len(cases)), key=lambda index: len(missing & cases[index].items()))
        missing -= cases[best].items()
        chosen.append(best)
    return sorted(chosen)


def parameters_of(item) -> dict[str, tuple[int, ...]]:
    """What tells the values of a test's parameters apart: of each `parametrize`, whose rows stay whole, and of each fixture."""
    values = {name: (id(value),) for name, value in item.callspec.params.items()}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].replace(" ", "").split(",") if isinstance(mark.args[0], str) else mark.args[0]
        values[" ".join(names)] = tuple(number for name in names for number in values.pop(name))
    return values
