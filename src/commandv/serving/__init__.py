"""Answering many at once, each with behaviours of its own: the engine, the OpenAI-compatible server, the page."""
