"""The door for training scripts of your own: ``from forgetrain.capture import Capture`` (docs/capture.md)."""

from forgetrain.reference.capture import Capture
from forgetrain.reference.capture_names import NameMap

__all__ = ["Capture", "NameMap"]
