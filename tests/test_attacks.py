"""Every file of ``attack_corpus``, in processes with limits: one error or a right result."""

from __future__ import annotations

import pytest

pytest.importorskip("av", reason="audio files need PyAV: pip install 'mlx-contentvec[audio]'")
pytest.importorskip("torch", reason="scripts/test installs it")
pytest.importorskip("transformers", reason="scripts/test installs it")
