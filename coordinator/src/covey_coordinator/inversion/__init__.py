"""What a curious coordinator can read off one update: inversion checks, one module per attack.

`check.first_inversion_check` runs the cheap ones on one real update. TensorFlow and SciPy are imported only
when a check runs; `metrics` and `dense` are pure NumPy.
"""
