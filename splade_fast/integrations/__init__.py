"""Drop-ins for code that is already there, one module for each library."""
