"""The demo: a real checkpoint and a real corpus, from installed packages. No hub needed."""
