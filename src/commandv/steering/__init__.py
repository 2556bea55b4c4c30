"""Steering: directions from what a model's own states tell apart, applied natively or carried into another model."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
