"""`max-ray chaos`: kills and stops processes of a local server under load, and compares its streams with undisturbed
ones."""
