"""Tables of our own."""
