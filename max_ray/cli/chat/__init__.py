"""`max-ray chat` and `max-ray run`: a chat in the terminal with any OpenAI-compatible server."""
