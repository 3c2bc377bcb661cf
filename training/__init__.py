"""The training scripts, for what imports them; a script that is run by its path does not come here."""

import os
import sys


# What a script finds beside itself when it is run.
sys.path.append(os.path.dirname(__file__))
