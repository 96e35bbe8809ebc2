"""The operations of the forward pass, one contract each; `reference` is the oracle and the CPU."""
