"""``python -m mim3d`` is the command ``mim3d``."""

import os
import sys

# Python puts the folder where the user stands first, and nothing in it may pass for one of the packages imported next.
# Where it holds mim3d itself, new processes must find that there.
if not sys.flags.safe_path:
    here = sys.path.pop(0)
    if here == os.path.dirname(os.path.dirname(__file__)):
        sys.path.append(here)

from mim3d.cli import main

sys.exit(main())
