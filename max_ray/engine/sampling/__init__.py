"""From logits to tokens: penalties, filters, draws, log probabilities."""
