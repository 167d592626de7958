"""Speed claims, measured: `make bench`, or `python -m benchmarks NAME`. Never run by the tests."""
