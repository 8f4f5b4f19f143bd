"""Let the scripts of this folder run from a clone that is not installed.

Python puts the script's folder first on its path, where registry.py or export.py would shadow modules of that name.
The clone's root takes that place.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
