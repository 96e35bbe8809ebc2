"""A store as a server: many sequences in one engine, and the faces that clients know."""
