"""The model: its configuration, its tensors by name, the dialects of their names, recipes."""
