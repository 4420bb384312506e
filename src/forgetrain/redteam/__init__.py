"""The red team: engines that are wrong or hostile, each of which the judge must reject and name."""
