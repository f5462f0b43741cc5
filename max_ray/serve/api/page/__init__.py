"""The page at `/`: chat, and the running server. Plain files in `files/`, served as they are."""
