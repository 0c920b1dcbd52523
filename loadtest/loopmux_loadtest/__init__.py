"""Load generator and benchmarks, run by hand."""
