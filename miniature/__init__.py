"""A drawn world, small enough to train every part of TSCIR on two CPU cores."""
