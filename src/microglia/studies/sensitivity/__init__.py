"""What each layer alone can lose: accuracy by layer and density, without retraining."""
