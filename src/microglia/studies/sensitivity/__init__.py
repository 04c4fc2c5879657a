"""Sensitivity of each layer alone: accuracy by layer and density, without retraining."""
