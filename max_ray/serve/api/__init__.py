"""The HTTP API over one engine. No Ray."""
