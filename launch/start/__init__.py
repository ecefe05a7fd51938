"""`cliplift start`: from a folder of videos to the first YAML files.

In reading order: ``videos`` (what lies in the folder, or what its list says), ``looks`` (some of the videos looked at),
``groups`` (what the file names say belongs together), ``splits`` (who is trained and tested on), ``numbers`` (frames,
crops, batches and steps for this machine and these videos), ``files`` (the YAML files), ``leaks`` (what would spoil a
number), ``begin`` (all of it in order).
"""
