"""The plan file, the layers and blocks of a model that it names, and the costs of each layer plan."""
