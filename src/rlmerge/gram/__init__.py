"""Gram matrices of the inputs of linear layers: estimate them, store them."""
