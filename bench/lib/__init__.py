"""What the benchmarks share: arguments, timing, limits, records, tables and figures."""
