"""What the offloading benchmarks share: models, ways to run them, the simulator, the search, the cost."""
