"""Saved pipelines and models on the Hub, and their code, from the command line.

    python -m diffusers_ext.hub push FOLDER REPO      upload what a run has saved, in one commit
    python -m diffusers_ext.hub code FOLDER           write the code into it that loads it without this package

The access token is that of the environment variable HF_TOKEN, or the one that `hf auth login` has stored. It is no
option, since the command line of a process is no secret.
"""

import argparse
import sys
from pathlib import Path

from diffusers_ext.hub.push import push_folder
from diffusers_ext.hub.remote_code import CODE_FILES, add_code, files_with_code


PROGRAM = "python -m diffusers_ext.hub"


def main(arguments: list[str] | None = None, program: str = PROGRAM) -> None:
    options = parser(program).parse_args(arguments)
    try:
        print(options.command(options))
    except (ValueError, OSError) as error:  # those of a user, PermissionError among them, and of the network
        sys.exit(f"{program}: {error}")


def run(arguments: list[str], program: str) -> None:
    """As the command `diffusers-ext push`, whose name is the last word of the program's."""
    program, _, name = program.rpartition(" ")
    main([name, *arguments], program)


def parser(program: str = PROGRAM) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="push|code")
    push = commands.add_parser("push", help="upload a saved pipeline or model, in one commit")
    push.add_argument("folder", help="of a run, or of save_pretrained")
    push.add_argument("repo", help="name, in the namespace of the token's owner, or namespace/name")
    push.add_argument("--private", action="store_true", default=None, help="nobody else may see it")
    push.add_argument("--message", help="of the commit")
    push.add_argument("--branch", help="where to, in place of main; made if it does not exist")
    push.set_defaults(command=_push)
    code = commands.add_parser("code", help="write the code that loads a saved folder without this package into it")
    code.add_argument("folder", help="of a run, or of save_pretrained")
    code.set_defaults(command=_code)
    return parser


def _push(options: argparse.Namespace) -> str:
    address = push_folder(
        options.folder, options.repo, private=options.private, commit_message=options.message, branch=options.branch
    )
    return f"pushed to {address}"


def _code(options: argparse.Namespace) -> str:
    if not any(Path(options.folder, name).is_file() for name in ("model_index.json", "config.json")):
        raise ValueError(
            f"{options.folder} must be a folder of a saved pipeline or model: it has no model_index.json and no config.json"
        )
    names = [name for name in files_with_code(options.folder) if name.rpartition("/")[2] in CODE_FILES]
    if not names:
        return f"{options.folder} holds nothing of diffusers_ext, so nothing was written"
    add_code(options.folder)
    return f"written to {options.folder}: {', '.join(names)}"


if __name__ == "__main__":
    main()
