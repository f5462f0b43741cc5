"""Tests mirror the tree; CPU and offline by default."""
