"""`ldmq bench`: layers of common shapes, one op at shapes of the user's own, or the tuner."""
