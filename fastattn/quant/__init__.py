"""Low-bit weights and activations: layouts in memory (`packed`), MX formats (`mx`), formats on disk.

`packed` and `mx` hold facts and exact conversions only; they import nothing but `spec`, and every layer
may use them.
"""
