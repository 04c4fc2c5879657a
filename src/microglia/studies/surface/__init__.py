"""Loss surfaces: planes and lines around a network, filter-normalized."""
