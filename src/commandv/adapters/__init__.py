"""Adapters: their form, their kinds, their files, and attaching them."""
