"""Checksums of chunks on the device."""
