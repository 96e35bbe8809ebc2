"""Numbers and layouts."""
