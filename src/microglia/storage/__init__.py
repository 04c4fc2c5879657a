"""Storage: files that hold no pickle, durable runs, saved models, and what was done to them."""

import microglia.storage.masked  # noqa: F401 # registers the change
