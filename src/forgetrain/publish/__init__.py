"""Publishing a trained model where people use models."""
