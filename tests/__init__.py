from forgetrain.numerics.runtime import prepare_process

prepare_process()  # here, since this is imported before any test imports torch
