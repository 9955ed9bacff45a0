"""Other engines, each in a Python environment of its own: how to install them and the scripts that run there."""
