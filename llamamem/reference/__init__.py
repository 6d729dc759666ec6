"""The maths of the memory in NumPy: the oracle that every other implementation is compared with."""
