"""What this package is measured by: `python -m benchmarks` lists the commands, README.md says which to take."""
