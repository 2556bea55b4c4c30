from __future__ import annotations

from caching import cache as cache
