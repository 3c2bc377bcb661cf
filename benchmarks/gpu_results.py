"""Figures of the GPU benchmarks: one JSON file that grows as they come, and a table of it in Markdown.

    python benchmarks/gpu_results.py FOLDER                         writes and prints the table
    python benchmarks/gpu_results.py FOLDER SECTION NAME VALUE      adds a number first

A run that is cut off leaves all figures that it had by then.
"""

import argparse
import json
import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any


JSON_FILE, MARKDOWN_FILE = "gpu.json", "gpu.md"

# The command of `docs/speed.md`, whose output these files are.
COMMAND = "bash benchmarks/gpu.sh"


def machine() -> dict[str, str]:
    """Device and versions."""
    import torch  # takes seconds, which a table of figures need not wait for

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "device": name,
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "cpus": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "command": COMMAND,
    }


def read(folder: Path) -> dict[str, Any]:
    """The figures so far, by section."""
    path = folder / JSON_FILE
    return json.loads(path.read_text()) if path.exists() else {"machine": machine()}


def write(path: Path, text: str) -> None:
    """A file that is there whole or as it was, whenever the process is ended."""
    partial = path.with_name(f".partial-{path.name}")
    partial.write_text(text)
    partial.replace(path)


def record(folder: Path, section: str, key: str, value: Any) -> None:
    """Adds a figure or a row of figures, prints it, and writes the file anew."""
    results = read(folder)
    results.setdefault(section, {})[key] = value
    write(folder / JSON_FILE, json.dumps(results, indent=1) + "\n")
    print(f"{section}: {key}: {json.dumps(value)}", flush=True)


def digits(value: Any) -> str:
    """A figure as a table shows it: three digits, or all before the point."""
    if not isinstance(value, float):
        return "" if value is None else str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    """A Markdown table of rows by name, whose columns are the keys that occur."""
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(digits(row.get(key)) for key in columns)} |" for name, row in rows.items()]
    return lines


def report(results: dict[str, Any]) -> str:
    """All sections in Markdown: rows of figures as tables, single figures as a list."""
    about = results["machine"]
    lines = [
        f"On {about['device']}, torch {about['torch']}, diffusers {about['diffusers']}, Python {about['python']}, "
        f"{about['cpus']} CPU cores, by `{about['command']}`."
    ]
    for section, values in results.items():
        if section == "machine":
            continue
        rows = {name: value for name, value in values.items() if isinstance(value, dict)}
        lines += ["", f"### {section}", ""]
        lines += [f"- {name}: {digits(value)}" for name, value in values.items() if name not in rows]
        lines += [""] * (bool(rows) and len(rows) < len(values)) + (table(rows) if rows else [])
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with gpu.json, which gets a table beside it")
    parser.add_argument("figure", nargs="*", help="SECTION NAME VALUE of a number to add first")
    arguments = parser.parse_args()
    folder = arguments.folder
    if arguments.figure:
        section, name, value = arguments.figure
        record(folder, section, name, float(value))
    text = report(read(folder))
    write(folder / MARKDOWN_FILE, text)
    print(text)
