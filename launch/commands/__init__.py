"""One file a command of `cliplift`: summary, options and what it runs."""
