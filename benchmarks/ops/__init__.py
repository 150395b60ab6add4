"""One benchmark an op, of the op's name: its cases at the models' shapes, and what it is measured beside."""
