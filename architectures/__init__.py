"""Model families. Each is a folder with an ARCHITECTURES list; nothing in max_ray imports this package by name."""
