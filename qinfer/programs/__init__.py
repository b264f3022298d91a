"""The programs of the command line, one per file; `qinfer/__main__.py` knows their names."""
