"""The command line, and jobs for clusters.

In reading order: ``cli`` (parses the words), ``commands`` (a file for each command or family), ``check`` (does the
run fit this machine?), ``jobs`` (scripts for schedulers).
"""
