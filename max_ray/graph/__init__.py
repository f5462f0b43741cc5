"""`max_ray.graph`: names that the pipeline page imports from here."""
