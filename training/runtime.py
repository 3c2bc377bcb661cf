"""`diffusers_ext/runtime.py` for the scripts, which import this before all else.

It is run by its path, since an import of the package would load torch, before which it must have been.
"""

import importlib.util
import os
import runpy


_PACKAGE = importlib.util.find_spec("diffusers_ext").submodule_search_locations[0]
_names = runpy.run_path(os.path.join(_PACKAGE, "runtime.py"))
SPIN_COUNT = _names["SPIN_COUNT"]
_names["settle"]()
