"""Storage: how files are written, replaced and read, whoever made them."""
