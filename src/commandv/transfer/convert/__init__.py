"""Converters between two residual streams, fitted on paired rows; affine ones are folded rather than materialised."""
