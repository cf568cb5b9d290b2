"""A stand-in for the hub: a tiny random model of the right architecture under every name that the reference's tests load."""
