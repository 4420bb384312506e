"""ForgeTrain: given one model, one kind of hardware and a trusted reference trainer, it forges a pre-training engine
that equals the reference bit for bit, then makes it faster under gates, and trains the model with it."""

__version__ = "0.1.0"
