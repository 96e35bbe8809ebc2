"""The model on a GPU: compiled kernels over packed weights, one graph for each number of rows."""
