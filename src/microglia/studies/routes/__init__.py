"""Routes: which filters each input uses in a gated network."""
