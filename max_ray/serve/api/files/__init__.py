"""Uploaded files and the results of batches: multipart forms, the folder on disk, the routes."""
