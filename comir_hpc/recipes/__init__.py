"""Verbs composed: what takes several of them, from the command line and from Python alike.

`stores` makes volumes of files where a verb is given files, `pair` registers two of them, `diagnosis` measures a run and registers its aligned pair.
"""
