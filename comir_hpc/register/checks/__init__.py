"""Checks of an answer: what is measured of it, and what verdict follows.

=============  ===========================================================================
`evidence`     gathers what is measured of one answer
`itself`       tries the method on the moving volume alone
`cross_check`  two halves of the specimen, registered separately
`verdict`      judges by the evidence: PASS, WARN or FAIL
`account`      writes the answer, its evidence and its verdict down
=============  ===========================================================================
"""
