"""Make an example that ships with the package: train it, choose what its calls do, measure it, save it in 16 bits.

    python training/make_example.py
    python training/make_example.py --run runs/example_digits

The second form takes a run that is trained already, and does the rest. `diffusers_ext.example("digits")` loads the result.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import runtime  # noqa: F401  before torch is loaded
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from diffusers_ext.commands import calibrate, evaluate, train_ddpm
from diffusers_ext.hub.modular_index import MODULAR_FILES
from diffusers_ext.hub.remote_code import CODE_FILES
from diffusers_ext.options import option, run_script
from diffusers_ext.trainer.config import parse_duration
from diffusers_ext.trainer.run import save_atomically


# What is trained, by the name of the example: options of train_ddpm.py. A DiT of 0.7 million parameters, 1.5 MB in 16 bits.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "dit",
        "patch_size": 2,
        "hidden_size": 96,
        "num_layers": 4,
        "num_attention_heads": 3,
        "train_batch_size": 64,
        "learning_rate": 0.002,
        "max_train_steps": 800,
        "num_inference_steps": 20,
    }
}
DATA = {"digits": "Optical Recognition of Handwritten Digits (E. Alpaydin and C. Kaynak, 1998; CC BY 4.0)"}
LICENSE = "apache-2.0"

# Of a run's folder, what goes along beside the pipeline.
SHIPPED = ("samples.png", "denoising.png", "train_config.yaml")
MAX_BYTES = 3_000_000

USE = """
```python
import diffusers_ext

pipe = diffusers_ext.example("{name}")
images = pipe(class_labels=[3, 3, 7]).images
```
"""


@dataclass(frozen=True)
class ExampleConfig:
    """Make an example that ships with the package."""

    name: Literal[tuple(RECIPES)] = option("digits", "which example", "what is made")
    run: str | None = option(None, "folder of a run that is trained already; by default it is trained first")
    calibration_time: str = option("1m", "time to choose what its calls do by default, such as 30s or 1m")
    num_images: int = option(1000, "images that are made to measure it", at_least=1)
    output_dir: str = option(str(Path("diffusers_ext") / "examples"), "folder of the examples", "result")

    def __post_init__(self):
        parse_duration(self.calibration_time)  # which refuses what is none


def main(config: ExampleConfig) -> Path:
    """Makes the example and returns its folder."""
    run = config.run
    if run is None:
        options = {"output_dir": f"runs/example_{config.name}", "calibrate": False}
        run = str(train_ddpm.main(train_ddpm.TrainConfig(**RECIPES[config.name] | options)))
    calibrate.main(calibrate.parse([run, "--max_time", config.calibration_time]))
    evaluate.main(evaluate.parse([run, "--num_images", str(config.num_images)]))
    folder = Path(config.output_dir) / config.name
    export(Path(run), folder, config.name)
    return folder


def export(run: Path, folder: Path, name: str) -> None:
    """Saves the pipeline of a run in 16 bits, without the code that the package itself is, and with its card.

    Raises:
        ValueError: if it takes more than `MAX_BYTES`; the folder is then as it was.
    """
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_atomically(DiffusionPipeline.from_pretrained(run, dtype=torch.float16), partial)
    for code in [path for path in partial.rglob("*") if path.name in CODE_FILES + MODULAR_FILES]:
        code.unlink()
    index = json.loads((partial / "model_index.json").read_text(encoding="utf-8"))
    index.pop("auto_map")
    index |= {"_class_name": index["_class_name"][-1], "_name_or_path": name}
    (partial / "model_index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for file in SHIPPED:
        if (run / file).exists():
            shutil.copy(run / file, partial)
    write_card(run, partial, name)
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if size > MAX_BYTES:
        shutil.rmtree(partial)
        raise ValueError(f"an example must have at most {MAX_BYTES} bytes, got {size}: train a smaller network")
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder}: {size / 1e6:.2f} MB")


def write_card(run: Path, folder: Path, name: str) -> None:
    """The card of the run, with what is else for an example: how it is loaded, whose data it was trained on, the licence."""
    card = ModelCard.load(run / "README.md")
    card.data.license = LICENSE
    card.data.model_name = f"diffusers_ext example {name}"
    lines = [(line, re.match(r"- `(\S+\.png)`:|!\[.*\]\((\S+)\)$", line)) for line in card.text.splitlines()]
    card.text = "\n".join(
        line for line, picture in lines if picture is None or (folder / (picture[1] or picture[2])).is_file()
    )
    text = re.sub(r"(?<=\n## Use\n).*?(?=\n## )", USE.format(name=name), card.text, flags=re.DOTALL)
    text = re.sub(r"(?<=\n## Data\n\n)", f"{DATA[name]}, as scikit-learn has it.\n\n", text)
    text = re.sub(r"(?m)^# .*$", f"# {name}", text, count=1)
    text = text.replace("Licence of the weights: unknown", f"Licence of the weights: {LICENSE}")
    card.text = f"{text.rstrip()} They are stored in float16; they were measured in float32, before rounding.\n"
    (folder / "README.md").write_text(str(card), encoding="utf-8")


if __name__ == "__main__":
    run_script(ExampleConfig, main)
