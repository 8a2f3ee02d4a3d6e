"""The parts of a backbone that a plugin surrounds: one file for each kind of site."""
