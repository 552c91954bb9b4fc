"""What `benchmarks/gpu.py` measures: its rows in order, how they run one by one, and what was predicted of them."""
