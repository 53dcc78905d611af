"""HyperSteer for JAX: a hypernetwork that turns a sentence into a steering vector."""
