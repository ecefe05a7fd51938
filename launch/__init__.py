"""The command line, and jobs for clusters.

In reading order: ``cli`` (parses the words), ``commands`` (a file for each command or family), ``completion`` (of
words in a shell), ``check`` (does the run fit this machine?), ``jobs`` (scripts for schedulers).
"""
