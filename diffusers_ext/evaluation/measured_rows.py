"""Measures that are made one after the other, and kept in a file, so that a command that was stopped goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers_ext.untrusted import read_json


class MeasuredRows:
    """Rows of measures in a JSON file, each of them known by some of its entries.

    Args:
        path: The file.
        made_with: What all rows share, as JSON has it.
        command: That made them.
        keys: The entries by which a row is known; another of the same takes its place.
    """

    def __init__(self, path: Path, made_with: dict, command: str, keys: Sequence[str]):
        self.path, self.made_with, self.command = path, made_with, command
        self.keys, self.rows, self.held_out = tuple(keys), [], None

    def load(self) -> list[dict]:
        """The rows of an earlier command.

        Raises:
            ValueError: if it was with other images or another model, or the file is of another command.
        """
        if not self.path.is_file():
            return []
        saved = read_json(self.path)
        if not (isinstance(saved.get("made_with"), dict) and isinstance(saved.get("results"), list)):
            raise ValueError(
                f"{self.path} must have results of this command, made_with and results, got {', '.join(saved) or 'nothing'}: give "
                "another file or folder for the results"
            )
        before = saved["made_with"]
        changed = [name for name in (*self.made_with, *before) if before.get(name) != self.made_with.get(name)]
        if changed:
            raise ValueError(
                f"{self.path} is of another {changed[0]}, {before.get(changed[0])}, got {self.made_with.get(changed[0])}: give "
                "--overwrite to start over, or another folder for the results"
            )
        return saved["results"]

    def find(self, **wanted: Any) -> dict | None:
        """The row with these entries, if it is there."""
        wanted = as_json(wanted)
        return next((row for row in self.rows if all(row.get(k) == v for k, v in wanted.items())), None)

    def add(self, row: dict) -> None:
        """Adds a row, in place of any that is known by the same."""
        row = as_json(row)
        key = [row[name] for name in self.keys]
        self.rows = [other for other in self.rows if [other[name] for name in self.keys] != key] + [row]

    def contents(self) -> dict:
        return {
            "command": self.command,
            "made_with": self.made_with,
            "held_out": self.held_out,
            "results": self.rows,
        }


def as_json(value: Any) -> Any:
    """A value as it is when it has been written and read again."""
    return json.loads(json.dumps(value, default=str))
