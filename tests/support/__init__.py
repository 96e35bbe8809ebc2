"""What tests share: interpreter, emulator, oracles, a hub on loopback."""
