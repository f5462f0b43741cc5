"""`max_ray.nn.legacy`: names that the pipeline page imports from here."""
