"""Is a mixture better than a dense model in the same time on the same machine?"""
