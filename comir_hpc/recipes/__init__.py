"""Verbs composed: what takes several of them, from the command line and from Python alike.

==============  =======================================================================
`stores`        files become volumes where a verb is given files
`pair`          two files are registered, and the moving one warped
`adapt`         encoders are made for a pair that nobody has aligned (`working_pair`)
`diagnosis`     a run is measured, and its aligned pair registered
`demo`          all of it on the embedded pair
==============  =======================================================================
"""
