"""Diagonal Fisher information: estimate it, store it, combine it, judge it, or take it from an optimizer's state."""
