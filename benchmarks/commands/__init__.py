"""The commands that are no measurement of their own."""
