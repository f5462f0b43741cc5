"""Text to tokens and back: tokenizers from a model's files, chat templates, incremental detokenization."""
