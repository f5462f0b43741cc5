"""The embeddings task: files, families, pipeline, loop, routes, command line, actors."""
