"""Placeholder until the real settings arrive."""
def set_num_threads(n): ...
def get_num_threads(): return 1
def cpu_isa(*a): return "none"
