"""What tests and benchmarks measure with. It imports neither of them."""
