"""Sparse attention: parts of the rows that tokens see, and what joins the parts."""
