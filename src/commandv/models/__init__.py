"""Language models: loading, encoding, generation."""
