"""Is the mixture better than a dense model of equal active parameters?"""
