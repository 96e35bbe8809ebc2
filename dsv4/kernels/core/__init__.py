"""What a kernel is: its contract, signature, build, library and verification."""
