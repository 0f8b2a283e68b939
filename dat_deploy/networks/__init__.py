"""The networks: families of them, and checkpoints that nobody vouches for."""
