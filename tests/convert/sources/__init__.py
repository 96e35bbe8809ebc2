"""Sources: headers, ranges, files."""
