"""ForgeTrain: given one model, one kind of hardware and a trusted reference trainer, it forges a pre-training engine
that equals the reference bit for bit, then makes it faster under gates, and trains the model with it."""

__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """``forgetrain.capture`` loads torch, so it is imported when it is asked for."""
    if name == "capture":
        import importlib

        return importlib.import_module("forgetrain.capture")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
