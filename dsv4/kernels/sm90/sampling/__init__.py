"""From logits to the next step's input: drawing tokens, and looking up their embeddings."""
