"""Storage: files without pickle, durable runs, saved models, and the changes made to models."""

import microglia.storage.masked  # noqa: F401 # registers the change
