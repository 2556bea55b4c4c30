"""Transfer: from two profiles and a donor's adapter to an adapter of the recipient."""
