"""Models with a known behaviour or a known relative, made from the packaged ones."""
