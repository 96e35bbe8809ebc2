"""The experts of a layer for few tokens, in one launch."""
