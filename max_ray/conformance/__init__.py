"""Whether a model family computes what its reference does: the suite of `max-ray check` and the parity table."""
