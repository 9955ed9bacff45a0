"""Other engines in Python environments of their own: how to install them, and the scripts that run there."""
