"""Whole models with random weights: calls on a GPU and on a CPU, cold starts, and the shapes of their layers."""
