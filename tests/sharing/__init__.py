"""Push and pull, against a hub on loopback that takes uploads."""
