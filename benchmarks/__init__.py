"""Measurements; run with `make bench`. Not part of the tests."""
