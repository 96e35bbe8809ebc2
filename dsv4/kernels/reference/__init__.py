"""The operations in plain torch: what every other implementation is held against."""
