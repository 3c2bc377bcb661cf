"""The command `demo`: a page in the browser on which a pipeline is tried out."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import diffusers_ext
from diffusers_ext import examples
from diffusers_ext.demo.space import export_space, how_to_install
from diffusers_ext.demo.studio import Studio
from diffusers_ext.evaluation.subject import load_pipeline
from diffusers_ext.examples import example_names


def run(arguments: Sequence[str] | None = None, program: str = "diffusers-ext demo") -> None:
    """Reads the command line, then serves the page until it is interrupted, or exports it.

    Raises:
        SystemExit: with a line that says why, if it cannot.
    """
    given = _parser(program).parse_args(arguments)
    if given.pipeline in example_names() and not Path(given.pipeline).is_dir():
        given.pipeline = str(Path(examples.__file__).parent / given.pipeline)
    try:
        if given.export is not None:
            names = export_space(given.pipeline, given.export, diffusers_ext.__version__)
            print(f"{given.export} has {', '.join(names)}: a Space, to push")
            print(how_to_install(diffusers_ext.__version__))
            return
        try:
            from diffusers_ext.demo.app import build_page
        except ImportError as error:
            raise ImportError(
                f"the demo needs gradio, which is not installed: pip install 'diffusers_ext[demo]' ({error})"
            ) from error
        pipe = load_pipeline(given.pipeline)
        if given.device:
            pipe = pipe.to(given.device)
        page = build_page(Studio(pipe), given.pipeline)
        page.launch(server_name=given.host, server_port=given.port, inbrowser=given.open)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        sys.exit(f"{program}: {error}")


def _parser(program: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(program, description="Try out a pipeline on a page in the browser.")
    parser.add_argument("pipeline", help="a folder, a name on the Hub, or an example of the package, such as digits")
    parser.add_argument("--export", metavar="FOLDER", help="write the demo as a Hugging Face Space and serve nothing")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to serve at; by default this machine alone reaches it"
    )
    parser.add_argument("--port", type=int, help="by default the first free one from 7860 on")
    parser.add_argument("--device", help="such as cuda; by default the CPU")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    return parser
