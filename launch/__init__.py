"""The command line, and jobs for clusters.

In reading order: ``cli`` (parses the words), ``commands`` (a file for each command or family), ``completion`` (of
words in a shell), ``check`` (does the run fit this machine?), ``start`` (from a folder to the first YAML files),
``jobs`` (scripts for schedulers).
"""
