"""A worker's engine: runs steps of a loaded model, keeps the KV cache tensors, samples tokens."""
