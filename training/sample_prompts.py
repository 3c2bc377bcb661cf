"""Draw texts at several guidance scales, as one picture.

    python training/sample_prompts.py runs/twemoji64 --prompts "red heart" "green apple" "flag: Sweden"

RUN is the folder, or the name on the Hub, of a pipeline that makes images from texts. Each text has a row and each scale a
column; all pictures of a row start from the same noise.
"""

import runtime  # noqa: F401  before torch is loaded

from diffusers_ext.commands.sample_prompts import SampleConfig, main, run


__all__ = ["SampleConfig", "main", "run"]

if __name__ == "__main__":
    run()
