"""The checks of a packed store, each with what it compares."""
