"""Profiles: a model's residual stream at keyed places in texts."""
