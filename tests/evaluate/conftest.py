"""The modules, data and trainer of tests/modules."""

from tests.modules.conftest import codec, data, fit, training

__all__ = ["codec", "data", "fit", "training"]
