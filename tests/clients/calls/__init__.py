"""The calls of each client: one module a client, run in that client's environment (see `tests.clients.harness`)."""
