"""The run on a GPU machine: what is run in which order, and each kernel in a process of its own."""
