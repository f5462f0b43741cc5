"""The front of an application with several models: an ASGI application that passes requests on to their replicas."""
