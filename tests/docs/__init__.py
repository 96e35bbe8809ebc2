"""Documents that a command or a test can hold to what they say."""
