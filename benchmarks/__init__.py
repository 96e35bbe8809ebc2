"""Peers, parity proofs and quality studies: what the project measures, not what a user runs."""
