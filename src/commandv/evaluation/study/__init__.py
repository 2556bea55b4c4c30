"""Studies: donors x recipients x behaviours x methods x seeds x scales from one file.

As in `commandv` itself, the public names are listed in `__init__.pyi` and imported when first used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
