"""The demo of a pipeline as a Hugging Face Space: a folder that is pushed as it is."""

import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import diffusers
import yaml
from huggingface_hub.utils import filter_repo_objects

import diffusers_ext
from diffusers_ext.atomic_files import LOCK, lock_folder
from diffusers_ext.demo.studio import NO_CONDITION_IMAGES, Studio, check_class
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.hub.push import NOT_UPLOADED
from diffusers_ext.hub.saved_folder import saved_class
from diffusers_ext.untrusted import one_line


PIPELINE_FOLDER = "pipeline"  # of a pipeline that is a folder here, in the Space
GRADIO = "6.0.0"  # of a Space, where gradio is not installed here
REQUIREMENT = "diffusers_ext[demo]>={version}"
_APP = '''"""The demo of a diffusion pipeline, by diffusers_ext."""

from pathlib import Path

from diffusers_ext.demo.app import build
from diffusers_ext.evaluation.subject import load_pipeline


app = build(load_pipeline({pipeline}), {title!r})

if __name__ == "__main__":
    app.launch()
'''


def export_space(pipeline: str, folder: str | Path, package_version: str) -> list[str]:
    """Writes `app.py`, `requirements.txt` and `README.md` with the header that a Space asks for, and the pipeline, if it is a
    folder here; one on the Hub is loaded from there. All of it, or nothing.

    Args:
        pipeline: Folder, or name on the Hub.
        folder: A new or an empty one.
        package_version: Of this package, which the Space installs at least.

    Returns: the names of what was written.

    Raises:
        ValueError: if the folder holds something, there is no such pipeline, or the page cannot ask it.
    """
    folder, is_local = Path(folder), Path(pipeline).is_dir()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"--export {folder} must be a new or an empty folder")
    _check_can_be_shown(pipeline)
    title = one_line(Path(pipeline).resolve().name if is_local else pipeline)
    where = f"str(Path(__file__).with_name({PIPELINE_FOLDER!r}))" if is_local else repr(pipeline)
    header = {
        "title": title,
        "colorFrom": "blue",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": _gradio_version(),
        "app_file": "app.py",
        "pinned": False,
    } | ({} if is_local else {"models": [pipeline]})
    texts = {
        "app.py": _APP.format(pipeline=where, title=title),
        "requirements.txt": REQUIREMENT.format(version=package_version) + "\n",
        "README.md": f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---\n\n"
        "Images of a diffusion pipeline: by label or text, from a picture, painted in, and between two seeds.\n\n"
        f"{how_to_install(package_version)}\n",
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    hidden = folder.with_name(f".space-{folder.name}")
    with lock_folder(hidden):
        try:
            _clear(hidden)  # of a process that was killed
            for name, text in texts.items():
                (hidden / name).write_text(text, encoding="utf-8", newline="\n")
            if is_local:
                _copy_pipeline(Path(pipeline), hidden / PIPELINE_FOLDER)
        except BaseException:
            shutil.rmtree(hidden, ignore_errors=True)
            raise
    hidden.replace(folder)
    return [*texts, *([f"{PIPELINE_FOLDER}/"] if is_local else [])]


def how_to_install(package_version: str) -> str:
    """What the one who pushes a Space must know of its requirements: a Space installs them before it has its other files."""
    wheel = f"https://huggingface.co/NAME/resolve/main/diffusers_ext-{package_version}-py3-none-any.whl"
    return (
        f"`requirements.txt` asks pip for `{REQUIREMENT.format(version=package_version)}`. Where no index has it, push a wheel "
        "(`pip wheel --no-deps --wheel-dir dist .` in a checkout) to a public repository `NAME` on the Hub and write "
        f"`diffusers_ext[demo] @ {wheel}` in the place of that line."
    )


def _check_can_be_shown(pipeline: str) -> None:
    """Makes the checks of the page: of a folder all, by loading it, and of a pipeline on the Hub those of its index."""
    if Path(pipeline).is_dir():
        Studio(load_pipeline(pipeline))
        return
    try:
        index = diffusers_ext.DiffusionPipeline.load_config(pipeline)
    except (OSError, ValueError) as error:
        raise ValueError(f"{pipeline} is no folder here, and cannot be had from the Hub: {error}") from error
    name = saved_class(index, Path(diffusers_ext.DiffusionPipeline.config_name))
    known = next((getattr(module, name) for module in (diffusers_ext, diffusers) if hasattr(module, name)), None)
    if known is None:
        raise ValueError(f"{pipeline} must be a pipeline of diffusers_ext, got a {name}")
    check_class(known)
    if index.get("image_condition") is not None:
        raise ValueError(NO_CONDITION_IMAGES)


def _clear(hidden: Path) -> None:
    """Empties a folder but for its lock."""
    for path in hidden.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _copy_pipeline(source: Path, target: Path) -> None:
    """What loading it needs, without what a run keeps for itself, and without pictures."""
    there = sorted(path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    for name in filter_repo_objects(there, ignore_patterns=[*NOT_UPLOADED, "*.png", "samples/*"]):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)


def _gradio_version() -> str:
    try:
        return version("gradio")
    except PackageNotFoundError:
        return GRADIO
