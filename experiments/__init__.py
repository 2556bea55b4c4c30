"""Re-creates a paper's organisms, or tables of our own, with commandv's public API; commandv never imports it."""
