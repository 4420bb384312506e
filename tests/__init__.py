from forgetrain.numerics.waiting import wait_briefly

wait_briefly()  # here, since this is imported before any test imports torch
