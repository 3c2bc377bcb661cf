"""Modules that lie in one file as texts, imported as if they were files of a package.

`diffusers_ext.hub.remote_code` copies the source of this module into the file that it writes, so it imports nothing of
the package.
"""

import importlib
import importlib.abc
import importlib.util
import sys
from types import ModuleType


class BundledModules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds the modules of a package among texts, and loads them.

    Args:
        name: Of the package, as it is imported.
        sources: The text of each module by its name below the package; that of the package itself is "".
        file: Where the texts are written, for tracebacks and `inspect.getsource`.
    """

    def __init__(self, name: str, sources: dict[str, str], file: str):
        self.name, self.sources, self.file = name, sources, file

    def find_spec(self, fullname, path=None, target=None):
        short = self._short(fullname)
        if short not in self.sources:
            return None
        is_package = any(other.startswith(f"{short}." if short else "") and other != short for other in self.sources)
        return importlib.util.spec_from_file_location(
            fullname, self._file_of(short), loader=self, submodule_search_locations=[] if is_package else None
        )

    def get_source(self, fullname):
        return self.sources[self._short(fullname)].lstrip("\n")

    def get_code(self, fullname):
        # A name of its own for each module; no such file exists, and `linecache` then asks `get_source` for the lines.
        return self.source_to_code(self.get_source(fullname), self._file_of(self._short(fullname)))

    def _file_of(self, short: str) -> str:
        return f"{self.file}/{short or '__init__'}.py"

    def _short(self, fullname: str) -> str | None:
        if fullname == self.name:
            return ""
        return fullname.removeprefix(f"{self.name}.") if fullname.startswith(f"{self.name}.") else None


def import_bundled(name: str, sources: dict[str, str], file: str) -> ModuleType:
    """The package of this name, made of `sources` unless it is there: its name says which sources those are."""
    if name not in sys.modules:
        sys.meta_path.append(BundledModules(name, sources, file))
    return importlib.import_module(name)
