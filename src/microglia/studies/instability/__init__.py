"""Instability analysis: copies with other noise, and the line between them."""
