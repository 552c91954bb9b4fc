"""Measurements, each side by side with what it is compared to; `make bench` takes them all.

They measure the checkout they stand in. Where trainc is not installed, as on a lent machine that has torch alone,
the checkout's folders are found as subpackages of `trainc` without an install.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if find_spec("trainc") is None:
    sys.path.append(str(ROOT))
if find_spec("trainc.kernels") is None:
    import trainc

    trainc.__path__.append(str(ROOT))
