"""`covey demo`: the main job end to end, on real parts and real data, in about a minute."""
