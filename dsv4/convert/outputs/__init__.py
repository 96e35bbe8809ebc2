"""What a conversion writes: a kind of output for each kind of node in the store."""
