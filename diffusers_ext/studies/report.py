"""What a study leaves: a page with a table, a figure, and the numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from diffusers_ext.atomic_files import atomic_write
from diffusers_ext.figures import save_picture


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Report:
    """The answer to a question.

    Attributes:
        title: The question.
        lines: What was measured, and what came out, a paragraph each.
        rows: Of the table, each from the name of a column to its value; all with the same columns.
        figure: Of Matplotlib, or a picture.
    """

    title: str
    lines: Sequence[str]
    rows: Sequence[Mapping[str, str | float | int | None]]
    figure: "Figure | Image.Image"

    def table(self) -> str:
        """In Markdown."""
        columns = list(self.rows[0])
        lines = [columns, ["---"] * len(columns), *([_text(row[name]) for name in columns] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def write(self, folder: Path, name: str) -> Path:
        """Writes `NAME.md`, `NAME.png` and `NAME.json`, and returns the first."""
        folder.mkdir(parents=True, exist_ok=True)
        save_picture(self.figure, folder / f"{name}.png")
        with atomic_write(folder / f"{name}.json") as partial:
            partial.write_text(json.dumps({"title": self.title, "rows": list(self.rows)}, indent=2) + "\n")
        parts = [f"# {self.title}", *self.lines, self.table(), f"![{self.title}]({name}.png)"]
        with atomic_write(folder / f"{name}.md") as partial:
            partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
        return folder / f"{name}.md"


def _text(value: str | float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value).replace("|", "\\|")  # which would end the cell
