"""Engines: built from an exported file or a network, each with a passport that says what it is."""
