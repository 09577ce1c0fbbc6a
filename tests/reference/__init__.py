"""Float64 NumPy versions of the operations, written from their formulas alone."""
