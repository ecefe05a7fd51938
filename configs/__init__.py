"""What a user may say: one frozen schema for each stage, and the YAML that becomes one of them.

In reading order: ``sections`` (what every section is, and ConfigError), ``yaml_text`` (YAML read without trusting
it), ``load`` (file, ``base:`` and overrides to a run), ``discovery`` and ``plugins`` (names other packages add),
``where`` and ``where_reader`` (filters of clips: what they mean, and their text read); then the sections ``sources``,
``data`` and ``training``, the schemas of a build, ``sharding``, and of many runs, ``sweeps``, the sections of transfer,
``supervision``, those of learning without labels, ``objectives``, and the schemas made of them, ``runs``. Packaged
recipes lie beside them, in a folder for each stage.
"""
