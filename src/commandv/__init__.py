"""Copy a behaviour from one language model, paste it into another.

The public names are listed in `__init__.pyi` and imported when first used, so that `commandv -h` need not load torch.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
