"""Text in and out: tokenizer, sampling, the decode loop, one answer, a conversation."""
