"""`covey teach`: machine teaching of a table or of images on one computer, beside what it must be better than."""
