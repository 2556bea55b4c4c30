"""One adapter of a donor carried into one recipient: by every method that applies, tuned, measured, certified."""
