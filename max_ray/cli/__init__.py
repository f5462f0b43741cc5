"""The command line `max-ray`."""
