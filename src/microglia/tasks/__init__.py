"""Tasks: model, data, loss and metrics as one value."""
