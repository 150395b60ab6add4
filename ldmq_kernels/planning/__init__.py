"""From measured noise and costs to a precision for each layer."""
