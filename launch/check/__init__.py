"""`cliplift check` and `cliplift doctor`: does the run fit this machine?"""
