"""Tests that compare with another program, which must be installed for them."""
