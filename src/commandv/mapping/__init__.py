"""Mapping whole states of one model into another's stream, and putting them there while it runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
