"""Prompt sets, and the built-in ones."""
