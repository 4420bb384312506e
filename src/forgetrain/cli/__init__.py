from forgetrain.numerics.waiting import sleep_while_waiting

sleep_while_waiting()  # here, since this is imported before any command imports torch
