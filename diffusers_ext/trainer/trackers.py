"""Which trackers of accelerate a run reports to."""

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers


ALL = "all"


def tracker_names(report_to: str | None) -> list[str]:
    """The trackers that an option names, with commas between them; "all" stays what it is.

    Raises:
        ValueError: if one of them is none that accelerate knows, or if "all" is one of several.
    """
    if report_to is None:
        return []
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]  # those that a user has registered with accelerate among them
    names = list(dict.fromkeys(name.strip() for name in report_to.split(",")))
    if ALL in names and len(names) > 1:
        raise ValueError(f"report_to all stands for all trackers, so it stands alone, got {report_to!r}")
    if unknown := [name for name in names if name not in (ALL, *known)]:
        raise ValueError(f"report_to must be of {', '.join(known)}, or all, got {', '.join(map(repr, unknown))}")
    return names


def installed_trackers(report_to: str | None) -> list[str]:
    """The trackers that an option names, all of them installed.

    Raises:
        ValueError: as `tracker_names`; and if one of them is not installed, or if "all" finds none.
    """
    names, there = tracker_names(report_to), [str(name) for name in get_available_trackers()]
    if names == [ALL]:
        if not there:
            raise ValueError("report_to all finds no tracker: install one of them, such as tensorboard")
        return there
    builtin = {name for name in names if LOGGER_TYPE_TO_CLASS[name].__module__ == "accelerate.tracking"}
    if missing := [name for name in names if name in builtin and name not in there]:
        raise ValueError(
            f"report_to {report_to} needs what is not installed: pip install {' '.join(missing)}, or leave it out; "
            f"installed are: {', '.join(there) or 'none'}"
        )
    return names
