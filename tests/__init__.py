"""Here, since this is imported before any test imports torch."""

import os

from forgetrain.numerics.runtime import prepare_process

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # two workers share the cores: what one waits, the other needs
prepare_process()
