"""What bytes mean: codecs, layouts with their inverses, dialects, the packed store, the config."""
