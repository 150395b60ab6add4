"""Files that are damaged and processes that are killed on purpose, with fixed seeds: what comes of each must be right.

`python -m python_tests.mutations KIND --count 10000` tries many; the tests try a few hundred of the same.
"""
