"""The backends: the same ops in plain torch, through oneDNN on a CPU, and in Triton."""
