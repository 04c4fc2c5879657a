"""Mode connectivity: the loss between trained networks, on lines and on trained curves."""
