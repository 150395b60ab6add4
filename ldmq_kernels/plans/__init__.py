"""The plan file, the layers and blocks of a model that it speaks of, and what each choice costs."""
