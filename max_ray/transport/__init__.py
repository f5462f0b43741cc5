"""The connections between a replica and the members of its worker group: workers and KV manager, on any node.

    address     where a replica listens: a Unix socket on its own node, TCP for other nodes
    handshake   both sides prove that they know the secret of this epoch, and derive the keys of the session
    frames      magic, version, type, length, counter; payload; a keyed BLAKE2b-128 over all of it
    arrays      numpy arrays and texts in a payload: dtype, shape and bytes, checked before anything is allocated
    codec       one function pair a message type; messages are columns, nothing is pickled
    listener    the replica's end, on an event loop
    blocking    the member's end, for one thread

Nothing here imports Ray or torch, so that a machine with torch, triton and transformers alone can use it.
"""
