"""What the machine itself can do, and what the host spends on a call."""
