"""timm and transformers for tests."""

from typing import Any

import pytest

from benchmarks.zoo import library_models


def import_library(name: str) -> Any:
    """Return timm or transformers; skip the test, or the file that asks at its top, where it is not installed."""
    try:
        return library_models.import_library(name)
    except ImportError as error:
        pytest.skip(str(error), allow_module_level=True)
