"""Batches of requests: checked input files, their state on disk, the runner, the routes."""
