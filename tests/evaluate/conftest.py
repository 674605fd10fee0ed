"""Fixtures of tests/modules for modules, data and trainer."""

from tests.modules.conftest import codec, data, fit, training

__all__ = ["codec", "data", "fit", "training"]
