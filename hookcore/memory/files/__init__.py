"""Weights in safetensors files, and the mappings and the reads with which they are used."""
