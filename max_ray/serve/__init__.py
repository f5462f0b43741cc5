"""The Ray Serve application: replicas, the cluster's environment, HAProxy, and `max-ray serve` in the foreground."""
