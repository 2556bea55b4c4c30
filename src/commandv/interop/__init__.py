"""Files of other projects: one module per format."""
