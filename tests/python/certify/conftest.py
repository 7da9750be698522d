"""Settings of the certificate's tests."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Layers of a few numbers wait for a second thread longer than they work."""
