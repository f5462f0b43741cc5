"""Ray actors: the registry, worker groups and KV managers, and the executor that drives a group.

Imported only where Ray runs. See ARCHITECTURE.md for which process owns what.

    names are imported from their modules: `spawn.get_registry`, `worker_group.GroupExecutor`, `messages.GroupSpec`
"""
