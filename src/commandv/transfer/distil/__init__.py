"""Carrying a behaviour through words: what a donor says, and what its adapter changes in that, into a recipient."""
