"""Storage: files that hold no pickle, durable runs, saved models."""
