"""Ollama's API below `/api`. The model is loaded as long as the server runs; models are not pulled, made or deleted."""
