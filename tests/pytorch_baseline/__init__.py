"""Skipped whole without torch, before any module here imports it."""

import pytest

pytest.importorskip("torch", reason="the baseline needs torch; not run: the PyTorch baseline")
