"""Weights in host memory, and the copies and the memory with which a device uses them."""
