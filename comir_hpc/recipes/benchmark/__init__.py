"""`comir-hpc benchmark`: every method meets the same displaced pairs, and one table says what came of it.

=============  ==============================================================================
`run`          the verb: what the table lacks, and the plan
`cases`        which cases there are; one of them from its files to its rows
`methods`      what is compared: ours, identity
`peers`        other programs as they ship
`process`      a method in a process of its own, with a time limit
`one`          what that process does
`table`        the CSV that several jobs may write to
`scores`       rates with intervals, paired tests
`figures`      success against displacement, errors, time against success
`page`         the tables as Markdown
=============  ==============================================================================
"""
